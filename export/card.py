"""The model card."""

from typing import Any

from dsd_serve.config import ModelConfig
from dsd_serve.labels import all_classes
from dsd_serve.params import SamplingParams
from export.verify import Report

DATA_NOTE = (
    "Pictures of ImageNet and what is derived from it, Tiny-ImageNet included, are for research and education, not for "
    "commercial use; the same holds for a model that was trained on them."
)


MEASURED = "## Measured at export"


def write_card(
    name: str,
    config: ModelConfig,
    num_parameters: int,
    training: list[str],
    store: str,
    defaults: SamplingParams,
    notes: str,
) -> str:
    """Markdown: what the network is, how it was trained, what it draws. training: lines of `training_lines`."""
    length, channels = config.latent_shape
    lines = [
        f"# {name}",
        "",
        "One network that encodes, denoises and decodes images (DSD, arXiv 2511.14716).",
        "",
        "| | |",
        "|---|---|",
        f"| pictures | {config.image_size} x {config.image_size} RGB |",
        f"| latents | {length} tokens x {channels} channels, patches of {config.patch_size} pixels |",
        f"| network | {num_parameters / 1e6:.2f}M parameters: width {config.hidden_size}, {config.depth} blocks |",
        f"| weights | EMA, stored as {store}, computed in float32 |",
        *training,
        f"| sampling | {defaults.sampler}, {defaults.num_steps} steps, guidance {defaults.guidance_scale:g} |",
        "",
        "## What it draws",
        "",
        classes_sentence(config),
        "",
        *([notes.strip(), ""] if notes.strip() else []),
        "## Data",
        "",
        DATA_NOTE,
        "",
    ]
    return "\n".join(lines)


def with_measurements(card: str, reports: list[Report], sizes: dict[str, int]) -> str:
    """The card with what was measured at export at its end. sizes: bytes of the weights by precision."""
    lines = [
        card.split(MEASURED)[0].rstrip(),
        "",
        MEASURED,
        "",
        f"On {reports[0].num_rows} rows in mixtures; fp32 against the torch network, the others against fp32. "
        "fp16 and bf16 are checked on a CPU, each operator in float32 and its result rounded.",
        "",
        "| precision | weights | latents, largest error | latents, rms | pixels, grey levels | dependent rows |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        limits = report.limits
        lines.append(
            f"| {report.precision} | {sizes[report.precision] / 1e6:.1f} MB "
            f"| {report.latent_error:.1e} (limit {limits.latents:.0e}) | {report.latent_rms:.1e} "
            f"(limit {limits.latents_rms:.1e}) | {report.pixel_error} (limit {limits.pixels}) "
            f"| {report.dependent_rows} of {report.num_rows} |"
        )
    return "\n".join([*lines, ""])


def training_lines(checkpoint: dict[str, Any] | None) -> list[str]:
    """None: the weights come from a model directory without a card."""
    if checkpoint is None:
        return []
    training, step = checkpoint["config"], checkpoint["step"]
    if training is None:
        return ["| training | none: the weights are random, for benchmarks only |"]
    batch, num_draws = training["optim"]["batch_size"], training["loss"]["num_draws"]
    started = ", from the weights of a model that was there" if training["run"].get("start_from") else ""
    return [
        f"| objective | {training['loss']['objective']} |",
        f"| training | {step:,} steps of {batch} pictures ({step * batch:,} in all), {num_draws} noise draws each"
        f"{started} |",
    ]


def classes_sentence(config: ModelConfig) -> str:
    if not config.classes:
        return f"All {config.num_classes} classes of ImageNet-1k."
    names = ", ".join(f"{all_classes()[index].name} ({index})" for index in config.trained_classes)
    return f"{len(config.classes)} classes of ImageNet-1k, and nothing else: {names}."
