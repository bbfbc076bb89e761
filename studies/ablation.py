"""The ablation: one switch of the training recipe changed at a time.

python -m studies.ablation --data tiny-imagenet-200

Every variant changes one switch of the same base: a small network, 100 steps, the same images and seed. The base runs
with three seeds, to show the variance. Writes ablation.md and ablation.json. About a minute per run with one thread
(OMP_NUM_THREADS=1). Runs that are already in OUTPUT/ablation.json are not repeated, and --minutes ends the command
early, so that the study can be done in pieces.

The metrics compare across variants, which losses do not: on held-out images PSNR of reconstructions, and of images that
were encoded, noised to t, denoised and decoded.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.output import Output, output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from export.markdown import markdown_table
from studies.variants import arguments_parser, chosen, run_missing
from training.dataset import open_images
from training.estimate import flops_per_image
from training.evaluation.classifier import SIZE, load_network
from training.monitor import denoised_psnr, latent_metrics
from training.run_config import TrainConfig, load_config
from training.state import State
from training.teachers import MEAN, STD
from training.train import train

CONFIG = Path(__file__).with_name("configs") / "ablation.toml"
TIMES = (0.3, 0.5, 0.7)
VISION = "vision.onnx"  # placeholder for the file that is exported for a run

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "base, seed 1": ("run.seed=1",),
    "base, seed 2": ("run.seed=2",),
    "1 noise draw": ("loss.num_draws=1",),
    "4 noise draws": ("loss.num_draws=4",),
    "decoder input never noised": ("loss.reconstruction_noise=0.0",),
    "t shifted, s = 0.5": ("loss.t_shift=0.5",),
    "denoise weight uniform": ("loss.denoise_weighting=uniform",),
    "reconstruction l2": ("loss.reconstruction_norm=l2", "loss.reconstruction_weight=8.0"),
    "pyramid loss": ("loss.pyramid_weight=4.0",),
    "pyramid loss instead of l1": ("loss.pyramid_weight=8.0", "loss.reconstruction_weight=0.0"),
    "Muon": ("optim.name=muon",),
    "no layer alignment": ("loss.alignment_weight=0.0",),
    "no representation loss": ("loss.representation_weight=0.0",),
    "no classification loss": ("loss.classification_weight=0.0",),
    "aligned to a vision model": ("loss.vision_weight=0.5", f"loss.vision_model={VISION}"),
    "patches masked": ("loss.mask_probability=0.5",),
    "no gradient through z_t": ("loss.gradient_through_z_t=false",),
}
COLUMNS = {
    "effective_rank": "effective rank",
    "psnr": "reconstruction",
    **{f"psnr_{t}": f"denoised from t = {t}" for t in TIMES},
    "cost": "cost",
}


class Features(nn.Module):
    """The classifier's last feature map, of images [B, 3, S, S] normalised as in training/teachers.py."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.classifier.extract_features(((pixels * std + mean) * 255 - 127) / 128)  # [B, F, h, w]


def export_vision(file: Path) -> None:
    """Export EfficientNet-Lite0 without its head as a vision model for alignment."""
    pixels = torch.zeros(2, 3, SIZE, SIZE)
    rows = {0: torch.export.Dim("B")}
    torch.onnx.export(
        Features(load_network()).eval(), (pixels,), file, dynamo=True, dynamic_shapes=(rows,), verbose=False
    )


def cost(config: TrainConfig, base: TrainConfig) -> float:
    """Operations of a step over those of the base: unlike seconds, independent of the machine's load."""
    flops, base_flops = (flops_per_image(item.network_config(), item.loss) for item in (config, base))
    return flops / base_flops


def measure(state: State, config: TrainConfig) -> dict[str, float]:
    """Metrics of a trained network on the held-out images."""
    _, held = open_images(config)
    held.hold()
    assert held.pixels is not None
    pixels, labels = torch.from_numpy(held.pixels), torch.from_numpy(held.labels)
    numbers, _ = latent_metrics(state.ema, pixels)
    for t in TIMES:
        numbers[f"psnr_{t}"] = denoised_psnr(state.ema, pixels, labels, t)
    return numbers


def run_variant(name: str, data: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train the base with the switches of a variant; returns switches, overrides and metrics."""
    validation = sorted(Path(data).glob("val*.parquet"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        switches = [item.replace(VISION, str(folder / VISION)) for item in VARIANTS[name]]
        if switches != list(VARIANTS[name]):
            export_vision(folder / VISION)
        places = [f"data.path={data}", f"data.validation={validation[0] if validation else ''}", f"run.dir={folder}"]
        config = load_config(CONFIG, [*places, *overrides, *switches])
        state = train(config)
        if state.step < config.optim.steps:  # Ctrl-C or SIGTERM
            sys.exit("ablation: stopped; finished runs are kept")
        numbers = measure(state, config)
        numbers["cost"] = cost(config, load_config(CONFIG, [*places, *overrides]))
    return {key: round(numbers[key], 4) for key in COLUMNS}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table; + marks a value above all seeds of the base, - one below."""
    seeds = [run for name, run in results.items() if name.startswith("base")]
    rows = []
    for name, run in results.items():
        cells = []
        for key in COLUMNS:
            value, base = run[key], [seed[key] for seed in seeds]
            text = f"{value:.2f}"
            outside = not name.startswith("base") and key != "cost"
            mark = " +" if outside and value > max(base) else " -" if outside and value < min(base) else ""
            cells.append(text + mark)
        rows.append([name, *cells])
    return "\n".join(markdown_table(["variant", *COLUMNS.values()], rows)) + "\n"


def write(results: dict[str, dict[str, Any]], output: Output) -> None:
    with atomic(output.results / "ablation.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with atomic(output.pages / "ablation.md") as temporary:
        temporary.write_text(HEAD + table(results) + missing(results))


HEAD = """# Ablation of the training recipe

Written by `python -m studies.ablation --data tiny-imagenet-200`. Each row changes one switch of the base
configuration, `studies/configs/ablation.toml`: 0.9M parameters, ten classes at 32 x 32, 100 steps of 64 images. PSNR
is in dB, on 500 held-out images; "denoised from t" encodes them, adds noise to the latents up to t (0 is noise),
denoises once with the true class and decodes. `+` and `-` mark values above or below all three seeds of the base;
smaller differences may be chance. Cost is the number of operations in the matrix products of a step, relative to the
base, without those of Muon and of the vision model. `python -m benchmarks.training_speed` measures time.

"""


def missing(results: dict[str, dict[str, Any]]) -> str:
    """A sentence about the variants that have no result yet."""
    names = [name for name in VARIANTS if name not in results]
    return f"\nNot run yet: {'; '.join(names)}.\n" if names else ""


def main(arguments: Sequence[str] | None = None) -> None:
    options = arguments_parser("ablation", __doc__, CONFIG).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    runs = {
        name: {"switches": list(VARIANTS[name]), "overrides": list(options.overrides)}
        for name in chosen("ablation", options, VARIANTS)
    }
    output = output_of(options)
    try:
        results = run_missing(
            output.results / "ablation.json",
            runs,
            run=lambda name: run_variant(name, options.data, options.overrides),
            order=lambda results: {name: results[name] for name in VARIANTS if name in results},
            write=lambda results: write(results, output),
            minutes=options.minutes,
        )
    except DSDError as error:
        sys.exit(f"ablation: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
