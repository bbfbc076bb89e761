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


def write_card(
    name: str,
    config: ModelConfig,
    checkpoint: dict[str, Any],
    store: str,
    report: Report,
    defaults: SamplingParams,
    notes: str,
) -> str:
    """Markdown: what the network is, how it was trained, what it draws, what was measured at export."""
    num_parameters = sum(tensor.numel() for tensor in checkpoint["ema"].values())
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
        *training_lines(checkpoint),
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
        "## Measured at export",
        "",
        f"Against the torch network on {report.num_rows} rows in mixtures: {report}.",
        "",
    ]
    return "\n".join(lines)


def training_lines(checkpoint: dict[str, Any]) -> list[str]:
    training, step = checkpoint["config"], checkpoint["step"]
    if training is None:
        return ["| training | none: the weights are random, for benchmarks only |"]
    batch, num_draws = training["optim"]["batch_size"], training["loss"]["num_draws"]
    return [
        f"| objective | {training['loss']['objective']} |",
        f"| training | {step:,} steps of {batch} pictures ({step * batch:,} in all), {num_draws} noise draws each |",
    ]


def classes_sentence(config: ModelConfig) -> str:
    if not config.classes:
        return f"All {config.num_classes} classes of ImageNet-1k."
    names = ", ".join(f"{all_classes()[index].name} ({index})" for index in config.trained_classes)
    return f"{len(config.classes)} classes of ImageNet-1k, and nothing else: {names}."
