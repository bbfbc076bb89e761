"""The model card: Markdown."""

import re
from collections.abc import Sequence
from typing import Any

from dsd_serve.config import ModelConfig
from dsd_serve.labels import table_of
from dsd_serve.params import SamplingParams, guidance_words
from dsd_serve.precision import PRECISIONS, listed
from dsd_serve.programs import Generate
from export.markdown import markdown_table
from export.verify import Report

DATA_NOTE = (
    "Images of ImageNet and everything derived from it, Tiny-ImageNet included, are for research and education, not "
    "for commercial use; the same applies to models trained on them."
)
OWN_DATA_NOTE = "Use the model only as the licences of its training images permit; `--notes FILE` adds them here."
MOST_NAMES = 1000  # of classes in a card
MEASURED = "## Measured at export"


def write_card(
    name: str,
    config: ModelConfig,
    num_parameters: int,
    training: Sequence[tuple[str, str]],
    store: str,
    defaults: SamplingParams,
    notes: str,
) -> str:
    """Markdown: the network, its training, its classes, the licence of its data.

    num_parameters: of the network. training: rows of `training_rows`. store: the precision of the stored weights.
    notes: Markdown that is put in.
    """
    length, channels = config.latent_shape
    rows = [
        ("images", f"{config.image_size} x {config.image_size} RGB"),
        ("latents", f"{length} tokens x {channels} channels, patches of {config.patch_size} pixels"),
        ("network", f"{num_parameters / 1e6:.2f}M parameters: width {config.hidden_size}, {config.depth} blocks"),
        ("weights", f"EMA, stored as {store}, computed in float32"),
        *training,
        ("sampling", recommended(defaults)),
        *([("flow map", flow_map_sentence(defaults))] if config.flow_map else []),
    ]
    lines = [
        f"# {name}",
        "",
        "One network that encodes, denoises and decodes images (DSD, arXiv 2511.14716).",
        "",
        *markdown_table(("", ""), rows),
        "",
        "## What it draws",
        "",
        classes_sentence(config),
        "",
        *([notes.strip(), ""] if notes.strip() else []),
        "## Data",
        "",
        DATA_NOTE if table_of(config).has_wnids else OWN_DATA_NOTE,
        "",
    ]
    return "\n".join(lines)


def recommended(defaults: SamplingParams) -> str:
    guidance = guidance_words(defaults.guidance_scale, defaults.guidance_start, defaults.guidance_stop)
    return f"{defaults.sampler}, {defaults.num_steps} steps, {guidance}"


def with_sampling(card: str, defaults: SamplingParams) -> str:
    """The card with other recommended settings in its table; a card without that row stays as it is."""
    return re.sub(r"^\| sampling \| .* \|$", f"| sampling | {recommended(defaults)} |", card, count=1, flags=re.M)


def with_measurements(card: str, reports: Sequence[Report], sizes: dict[str, int]) -> str:
    """The card with the errors measured at export at its end. sizes: bytes of the weights by precision."""
    header = ("precision", "weights", "latents, largest error", "latents, rms", "pixels, grey levels", "dependent rows")
    rows = [
        (
            report.precision,
            f"{sizes[report.precision] / 1e6:.1f} MB",
            f"{report.latent_error:.1e} (limit {report.limits.latents:.0e})",
            f"{report.latent_rms:.1e} (limit {report.limits.latents_rms:.1e})",
            f"{report.pixel_error} (limit {report.limits.pixels})",
            f"{report.dependent_rows} of {report.num_rows}",
        )
        for report in reports
    ]
    halves = listed((name for name, row in PRECISIONS.items() if row.arithmetic == "half"), "and")
    lines = [
        card.split(MEASURED)[0].rstrip(),
        "",
        MEASURED,
        "",
        f"On {reports[0].num_rows} rows in mixed batches; fp32 is compared with the torch network, the others with "
        f"fp32. {halves} are checked on a CPU, each operator in float32 and its result rounded.",
        "",
        *markdown_table(header, rows),
        "",
    ]
    return "\n".join(lines)


def hub_card(card: str, place: str, license_id: str) -> str:
    """The card with the metadata of the Hugging Face hub, and how to use the model from there. place: hf:org/name."""
    fields = {
        "license": license_id,
        **({"license_name": "see-model-card", "license_link": "README.md"} if license_id == "other" else {}),
        "library_name": "dsd-serve",
        "pipeline_tag": "unconditional-image-generation",
    }
    tags = ("dsd", "diffusion", "class-conditional", "image-generation", "onnx", "arxiv:2511.14716")
    metadata = [
        "---",
        *(f"{key}: {value}" for key, value in fields.items()),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    commands = [
        "```sh",
        "pip install '.[cpu,hub]'    # in a clone of DSD",
        f"dsd-serve --model {place}",
        "curl 'localhost:8000/generate?seed=1' -o image.png",
        "```",
    ]
    return "\n".join([*metadata, "", card.strip(), "", "## Use", "", *commands, ""])


def training_rows(checkpoint: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the card's first table about the training of a checkpoint's values."""
    training, step = checkpoint["config"], checkpoint["step"]
    if training is None:
        return [("training", "none: the weights are random, for benchmarks only")]
    if distilled := checkpoint.get("distilled"):
        batch, teacher = training["optim"]["batch_size"], f"{distilled['name']} ({distilled['fingerprint'][:8]})"
        guidance = guidance_words(*(distilled[name] for name in ("guidance", "guidance_start", "guidance_stop")))
        return [
            ("distilled from", f"{teacher}, {guidance}"),
            ("training", f"{step:,} steps of {batch} trajectories ({step * batch:,} in all)"),
        ]
    batch, num_draws = training["optim"]["batch_size"], training["loss"]["num_draws"]
    started = ", starting from the weights of another model" if training["run"].get("start_from") else ""
    images = f"{step:,} steps of {batch} images ({step * batch:,} in all)"
    return [
        ("objective", str(training["loss"]["objective"])),
        ("training", f"{images}, {num_draws} noise draws each{started}"),
    ]


def flow_map_sentence(defaults: SamplingParams) -> str:
    """A sentence about flow maps, and how many rows an image needs with the recommended settings."""
    rows = Generate(0, defaults).cost.rows
    return (
        "the time to jump to is an input of the network; an image with these settings takes "
        f"{rows} rows, {rows - 1} to denoise and 1 to decode"
    )


def classes_sentence(config: ModelConfig) -> str:
    """The classes that the model draws, by name and index; a long list is cut."""
    table = table_of(config)
    if not config.num_classes:
        return "Images of one kind: the model has no classes."
    if table.is_imagenet and not config.classes:
        return f"All {config.num_classes} classes of ImageNet-1k."
    names = ", ".join(f"{escaped(c.name)} ({c.index})" for c in table.trained[:MOST_NAMES])
    more = "" if len(table.trained) <= MOST_NAMES else f" and {len(table.trained) - MOST_NAMES} more"
    warning = f" By name or index; {escaped(table.warning)}." if table.warning else ""
    kind = " of ImageNet-1k" if table.is_imagenet else ""
    noun = "class" if len(table.trained) == 1 else "classes"
    return f"{len(table.trained)} {noun}{kind}, and nothing else: {names}{more}.{warning}"


def escaped(text: str) -> str:
    """Text in which Markdown finds nothing to interpret."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", text)
