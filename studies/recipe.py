"""Recipe trials: variants of the losses at equal cost, compared by their samples.

    python -m studies.recipe --data tiny-imagenet-200

Each variant of the losses or of the network trains on twenty classes of Tiny-ImageNet, those of one kind for the same
number of matrix products, 2,000 steps or more. The model then draws 1,000 images at each of two guidance scales, which
the metrics of dsd-eval compare with the training images. Writes recipe.json after every trial, and recipe.md. A study
that was stopped resumes, even in the middle of a trial.

--seeds 0 1 2 runs the variants with several seeds: a difference below that between seeds may be chance.
"""

import itertools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import Output, output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from dsd_serve.loading import load
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams
from export.main import main as dsd_export
from export.markdown import markdown_table
from studies.variants import arguments_parser, chosen, run_missing
from training.dataset import Images, load_images
from training.estimate import flops_per_image
from training.evaluation.classifier import FeatureCache, default_cache, lite0
from training.evaluation.evaluator import Evaluator, read_images
from training.evaluation.subject import ModelSubject
from training.monitor import denoised_psnr, latent_metrics
from training.run_config import TrainConfig, load_config
from training.train import train

CONFIG = Path(__file__).with_name("configs") / "recipe.toml"
SAMPLES = 1000
LIMIT = 50_000  # reference images
GUIDANCE = (2.0, 4.0)
SAMPLER, STEPS = "dpmpp_2m", 9  # the sampler study's recommendation
T = 0.5  # at which latents are denoised, of training images and of others

VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "balanced batches": ("data.balance=true",),
    "Muon": ("optim.name=muon",),
    "Muon, 32 channels": ("optim.name=muon", "model.latent_dim=32"),
}
NETWORKS: dict[str, tuple[str, ...]] = {
    "192 wide": ("optim.name=muon",),
    "256 wide": ("optim.name=muon", "model.hidden_size=256", "model.num_heads=8"),
}
GROUPS = (VARIANTS, NETWORKS)
SWITCHES = {name: switches for group in GROUPS for name, switches in group.items()}
COLUMNS = {
    "steps": ("steps", "d"),
    **{
        f"{key}_{scale:g}": (f"{title}, guidance {scale:g}", form)
        for scale in GUIDANCE
        for key, title, form in (
            ("kid_lite0", "KID", ".4f"),
            ("frechet_lite0", "Frechet", ".1f"),
            ("top1_lite0", "top-1", ".3f"),
            ("recall_lite0", "recall", ".3f"),
        )
    },
    "psnr": ("reconstruction, dB", ".2f"),
    "denoised": (f"denoised from {T}, dB", ".2f"),
    "denoised_training": ("the same, training images", ".2f"),
}


def configure(variant: str, seed: int, data: str, folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a trial. Its steps cost as much as those of the most expensive variant of its group."""
    validation = sorted(Path(data).glob("val*.parquet"))
    places = [f"data.path={data}", f"data.validation={validation[0] if validation else ''}", f"run.dir={folder}"]

    def with_switches(name: str) -> TrainConfig:
        return load_config(CONFIG, [*places, f"run.seed={seed}", *SWITCHES[name], *overrides])

    group = next(group for group in GROUPS if variant in group)
    costs = {name: cost(with_switches(name)) for name in group}
    config = with_switches(variant)
    steps = round(config.optim.steps * max(costs.values()) / costs[variant])
    return config.model_copy(update={"optim": config.optim.model_copy(update={"steps": steps})})


def cost(config: TrainConfig) -> float:
    """Matrix products of a step for one image: unlike seconds, the same on a busy machine."""
    return flops_per_image(config.network_config(), config.loss)


def evaluator(config: TrainConfig) -> Evaluator:
    """The measures, against all training images; the held-out images are for reconstruction."""
    network, classifier, cache = config.network_config(), lite0(), FeatureCache(default_cache())
    sets = []
    for path in (config.data.validation, config.data.path):
        images = read_images(Images(path, network.image_size), network.trained_classes, LIMIT)
        images.features = cache.features(classifier, images.pixels, f"features of {images.name}")
        sets.append(images)
    held, reference = sets
    classes = network.trained_classes
    imagenet = dict(zip(classes, classes, strict=True))
    return Evaluator(network.image_size, classes, held, reference, classifier, imagenet=imagenet)


def psnrs(config: TrainConfig, ema: DSD) -> dict[str, float]:
    """PSNR in dB of reconstructed held-out images, and of denoised ones and as many training images. The difference of
    the last two shows memorisation."""
    training, held = load_images(config)
    some = training.subset(
        torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[: len(held)].numpy()
    )
    numbers = {}
    for name, images in (("denoised", held), ("denoised_training", some)):
        assert images.pixels is not None
        pixels, labels = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
        numbers[name] = denoised_psnr(ema, pixels, labels, T)
    assert held.pixels is not None
    latents, _ = latent_metrics(ema, torch.from_numpy(held.pixels))
    return {**numbers, "psnr": latents["psnr"]}


def run_trial(config: TrainConfig) -> dict[str, Any]:
    """The numbers of a trial, after its training or the rest of it."""
    state = train(config)
    if state.step < config.optim.steps:  # Ctrl-C or SIGTERM
        sys.exit("recipe: stopped; the same command resumes")
    folder = Path(config.run.dir)
    dsd_export([str(folder / "checkpoint.pt"), "-o", str(folder / "model")])
    numbers: dict[str, Any] = {"steps": config.optim.steps}
    measures = evaluator(config)
    with load(folder / "model") as model:
        for scale in GUIDANCE:
            params = SamplingParams(seed=1, num_steps=STEPS, sampler=SAMPLER, guidance_scale=scale)
            of_samples, _ = measures.sample_metrics(ModelSubject(model), SAMPLES, params)
            numbers |= {f"{key}_{scale:g}": value for key, value in of_samples.items()}
    return select(numbers | psnrs(config, state.ema))


def select(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the table, rounded."""
    return {key: round(numbers[key], 5) for key in COLUMNS}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The trials as Markdown tables, one for each group: variants of a group cost the same.

    Trials of switches that were removed since, because they did not help, stay among those of the losses.
    """
    tables = []
    for group in GROUPS:
        rows = [
            [name, *(format(trial[key], form) for key, (_, form) in COLUMNS.items())]
            for name, trial in results.items()
            if (name.rpartition(", seed ")[0] in NETWORKS) == (group is NETWORKS)
        ]
        if rows:
            tables.append(markdown_table(["trial", *(title for title, _ in COLUMNS.values())], rows))
    return "\n\n".join("\n".join(lines) for lines in tables) + "\n"


HEAD = f"""# Recipe trials

`python -m studies.recipe --data tiny-imagenet-200` makes this page. Every trial trains a network on twenty classes at
32 x 32 (`studies/configs/recipe.toml`). All trials of a table take the same number of matrix products. {SAMPLES:,}
samples ({SAMPLER}, {STEPS} steps) are compared with the 10,000 training images on features of EfficientNet-Lite0.
The products of Muon are not counted. "Denoised from {T}": images are encoded, noised to t = {T}, denoised in one step
and decoded.

"Estimate decoded" decoded the clean estimate of every second draw and added l1 and pyramid losses of its pixels,
weighted by t. "Self-alignment for alignment" aligned the middle layer at t to a later layer of the target encoder at up
to t + 0.2 (arXiv 2505.02831), instead of aligning it to the encoded image. Both drew worse at equal cost and were
removed.

"""


def write(results: Mapping[str, Any], output: Output) -> None:
    with atomic(output.results / "recipe.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with atomic(output.pages / "recipe.md") as temporary:
        temporary.write_text(HEAD + table(results))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser("recipe", __doc__, CONFIG)
    parser.add_argument("--runs", type=Path, default=Path("runs/recipe"), help="folder of the runs (runs/recipe)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants, output = chosen("recipe", options, SWITCHES), output_of(options)
    try:
        configs = {}
        for seed, variant in itertools.product(options.seeds, variants):
            name = f"{variant}, seed {seed}"
            folder = options.runs / name.replace(", ", "-").replace(" ", "-")
            configs[name] = configure(variant, seed, options.data, folder, options.overrides)
        results = run_missing(
            output.results / "recipe.json",
            {name: conditions(name, config, options.overrides) for name, config in configs.items()},
            run=lambda name: run_trial(configs[name]),
            order=lambda results: dict(sorted(results.items())),
            write=lambda results: write(results, output),
            minutes=options.minutes,
        )
    except DSDError as error:
        sys.exit(f"recipe: {error}")
    print(table(results))


def conditions(name: str, config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that a result of this trial belongs to."""
    switches = SWITCHES[name.rpartition(", seed ")[0]]
    return {"settings": [*switches, *overrides, f"optim.steps={config.optim.steps}"]}


if __name__ == "__main__":
    main()
