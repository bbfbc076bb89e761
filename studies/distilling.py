"""Distillation trials: variants of the losses at equal cost, compared by the images that the students draw.

    python -m studies.distilling --data tiny-imagenet-200 [--teacher MODEL] [--variants ...] [section.key=value ...]

Each variant of training/configs/distill-demo.toml distils the teacher for the same number of matrix products. Its
student draws 1,000 images in 1, 2 and 4 jumps, which the metrics of dsd-eval compare with the training images, as those
of the teacher for the same seeds. Writes distilling.json after every trial and prints a table. A study that was stopped
resumes, even in the middle of a trial.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from export.main import main as dsd_export
from export.markdown import markdown_table
from studies.variants import arguments_parser, chosen, run_missing
from training.distillation.cost import item_of
from training.distillation.distill import distill
from training.distillation.distill_config import DistillConfig, load_distill_config
from training.distillation.teacher import read_teacher
from training.evaluation.main import arguments_parser as eval_parser
from training.evaluation.main import make_evaluator
from training.evaluation.subject import open_subject
from training.transfer import start_place

CONFIG = Path(__file__).parents[1] / "training/configs/distill-demo.toml"
JUMPS = (1, 2, 4)
SEED = 1
TEACHER = "teacher"  # the trial that only draws

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "no images": ("loss.image_weight=0", "loss.feature_weight=0"),
    "images twice": ("loss.image_weight=2", "loss.feature_weight=1"),
    "no roll-outs": ("jumps.rolled_out=0",),
    "AdamW": ("optim.name=adamw",),
}
METRICS = {"frechet_lite0": "Frechet", "kid_lite0": "KID", "recall_lite0": "recall", "top1_lite0": "top-1"}


def configure(variant: str, teacher: str, folder: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """The configuration of a trial. Its steps cost as much as those of the most expensive variant."""

    def with_switches(name: str) -> DistillConfig:
        place = f"run.start_from={json.dumps(teacher)}"
        return load_distill_config(CONFIG, [*VARIANTS[name], *overrides, place], str(folder))

    network = read_teacher(teacher, with_switches("base").teacher, torch.device("cpu"))
    costs = {name: item_of(with_switches(name), network).flops for name in VARIANTS}
    config = with_switches(variant)
    steps = round(config.optim.steps * max(costs.values()) / costs[variant])
    return config.model_copy(update={"optim": config.optim.model_copy(update={"steps": steps})})


def measure(model: str, data: str, samples: int, jumps: Sequence[int]) -> dict[str, float]:
    """Metrics of `samples` images by name and number of jumps (0: as the model recommends), and reconstruction PSNR."""
    validation = sorted(Path(data).glob("val*.parquet"))
    real = str(validation[0]) if validation else data
    subject = open_subject(model)
    measures = make_evaluator(eval_parser().parse_args([model, "--real", real, "--reference", data]), [subject])
    numbers = {"psnr": measures.reconstruction_and_latents(subject)["reconstruction"]["psnr"]}
    for count in jumps:
        params = replace(subject.defaults, seed=SEED, num_steps=count or subject.defaults.num_steps)
        found, _ = measures.sample_metrics(subject, samples, params)
        numbers |= {f"{name}_{count}": found[name] for name in METRICS if name in found}
    return {name: round(value, 5) for name, value in numbers.items()}


def run_trial(config: DistillConfig, data: str, samples: int) -> dict[str, Any]:
    """The numbers of a trial, after its distillation or the rest of it."""
    state, checkpoint, stopped = distill(config)
    if stopped:
        sys.exit("distilling: stopped; the same command resumes")
    model = checkpoint.parent / "model"
    dsd_export([str(checkpoint), "-o", str(model)])
    return {"steps": state.step, **measure(str(model), data, samples, JUMPS)}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The trials as a Markdown table, a line for each number of jumps."""
    rows = []
    for name, trial in results.items():
        for jumps in (0,) if name == TEACHER else JUMPS:
            numbers = [trial.get(f"{metric}_{jumps}") for metric in METRICS]
            shown = ["-" if number is None else f"{number:.4g}" for number in numbers]
            rows.append([name, str(jumps or "-"), *shown, f"{trial['psnr']:.2f}"])
    return "\n".join(markdown_table(["trial", "jumps", *METRICS.values(), "reconstruction, dB"], rows)) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser("distilling", __doc__, CONFIG)
    parser.add_argument(
        "--teacher", default="runs/demo/model", metavar="MODEL", help="to distil (default runs/demo/model)"
    )
    parser.add_argument("--samples", type=int, default=1000, help="images in each number of jumps (1000)")
    parser.add_argument("--runs", type=Path, default=Path("runs/distilling"), help="folder of the runs")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants, output = chosen("distilling", options, VARIANTS), output_of(options)

    def run(name: str) -> dict[str, Any]:
        if name == TEACHER:
            place = str(start_place(options.teacher))
            return measure(place, options.data, options.samples, (0,))
        return run_trial(configs[name], options.data, options.samples)

    def write(results: Mapping[str, Any]) -> None:
        with atomic(output.results / "distilling.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")

    try:
        configs = {
            name: configure(name, options.teacher, options.runs / name.replace(" ", "-"), options.overrides)
            for name in variants
        }
        conditions = {"teacher": options.teacher, "samples": options.samples, "settings": list(options.overrides)}
        results = run_missing(
            output.results / "distilling.json",
            dict.fromkeys([TEACHER, *variants], conditions),
            run=run,
            order=lambda results: results,
            write=write,
            minutes=options.minutes,
        )
    except DSDError as error:
        sys.exit(f"distilling: {error}")
    print(table(results))


if __name__ == "__main__":
    main()
