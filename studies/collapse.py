"""The collapse study: effective rank and reconstruction PSNR under the three objectives.

python -m studies.collapse --data tiny-imagenet-200 [--config studies/configs/collapse-again.toml --seeds 3 4 5]

Trains the same small network with the objectives naive, stop_gradient and dsd, on the same images with the same seed.
Writes NAME.png, with both metrics on held-out images against steps, and NAME.json, where NAME is that of the
configuration. Four minutes per seed on two cores.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import add_flag, output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from export.markdown import markdown_table
from training.run_config import OBJECTIVES, load_config
from training.train import train

CONFIG = Path(__file__).with_name("configs") / "collapse.toml"
CURVES = {"effective_rank": "effective rank of the latents", "psnr": "reconstruction PSNR, dB"}
NUMBERS = (*CURVES, "image_std", "centred_rank")


def run_objective(
    path: Path, objective: str, seed: int, data: str, overrides: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Train with one objective; returns the metrics on held-out images at each evaluated step."""
    validation = sorted(Path(data).glob("val*.parquet"))
    places = [f"data.path={data}", f"data.validation={validation[0] if validation else ''}", f"run.dir={folder}"]
    config = load_config(path, [*places, f"loss.objective={objective}", f"run.seed={seed}", *overrides])
    start = time.perf_counter()
    train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "effective_rank" in line]
    curves = {name: [line[name] for line in measured] for name in NUMBERS}
    seconds = round(time.perf_counter() - start, 1)
    return {"seed": seed, "steps": [line["step"] for line in measured], **curves, "seconds": seconds}


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write the figure: a panel per metric, a line for each seed of each objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
        for number, (objective, runs) in enumerate(results.items()):
            for run in runs:
                label = objective if run is runs[0] else None
                axis.plot(run["steps"], run[name], label=label, color=f"C{number}", linewidth=2, alpha=0.8)
        axis.set(xlabel="optimiser steps", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.collapse", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of Tiny-ImageNet parquet files, or another source")
    add_flag(parser, "studies/results")
    parser.add_argument("--config", type=Path, default=CONFIG, help=f"a TOML file ({CONFIG.name})")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="one run of each objective for each (0)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the configuration"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            results = {
                objective: [
                    run_objective(
                        options.config,
                        objective,
                        seed,
                        options.data,
                        options.overrides,
                        Path(temporary, objective, str(seed)),
                    )
                    for seed in options.seeds
                ]
                for objective in reversed(OBJECTIVES)
            }
    except DSDError as error:
        sys.exit(f"collapse: {error}")
    output = output_of(options)
    name = options.config.stem
    draw(results, output.pages / f"{name}.png")
    (output.results / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        [objective, str(run["seed"]), *(f"{run[name][-1]:.2f}" for name in NUMBERS), f"{run['seconds']:.0f}"]
        for objective, runs in results.items()
        for run in runs
    ]
    print("\n".join(markdown_table(["objective", "seed", *NUMBERS, "seconds"], rows)))


if __name__ == "__main__":
    main()
