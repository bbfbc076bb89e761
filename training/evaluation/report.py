"""The metrics of dsd-eval as a table: a column for each model, and one for real images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsd_serve.params import guidance_words


@dataclass(frozen=True)
class Measure:
    """A line of the table: place of the value in the JSON, title, number format, and whether higher is better."""

    section: str
    key: str
    title: str
    form: str = ".3f"
    is_better_high: bool | None = True  # None: reported only


MEASURES = (
    Measure("samples", "frechet_lite0", "samples: frechet_lite0", ".1f", False),
    Measure("samples", "kid_lite0", "samples: kid_lite0", ".4f", False),
    Measure("samples", "precision_lite0", "samples: precision_lite0"),
    Measure("samples", "recall_lite0", "samples: recall_lite0"),
    Measure("samples", "spread_lite0", "samples: spread_lite0", ".2f", None),
    Measure("samples", "class_score_lite0", "samples: class_score_lite0", ".1f"),
    Measure("samples", "top1_lite0", "samples: top1_lite0", ".1%"),
    Measure("inception", "fid", "samples: FID", ".2f", False),
    Measure("inception", "inception_score", "samples: Inception score", ".2f"),
    Measure("inception", "kid", "samples: KID", ".5f", False),
    Measure("inception", "precision", "samples: precision"),
    Measure("inception", "recall", "samples: recall"),
    Measure("reconstruction", "psnr", "reconstruction: PSNR, dB", ".2f"),
    Measure("reconstruction", "ssim", "reconstruction: SSIM"),
    Measure("reconstruction", "frechet_lite0", "reconstruction: frechet_lite0", ".1f", False),
    Measure("reconstruction", "top1_lite0", "reconstruction: top1_lite0", ".1%"),
    Measure("latents", "probe_top1", "latents: linear probe top1", ".1%"),
    Measure("latents", "effective_rank", "latents: effective rank", ".2f", None),
    Measure("latents", "centred_rank", "latents: centred rank", ".2f", None),
    Measure("latents", "channels", "latents: channels", "d", None),
    Measure("latents", "image_std", "latents: spread over images", ".3f", None),
)


def value_of(sections: Mapping[str, Any], measure: Measure) -> float | None:
    """The value of a metric in the sections of one model; None if it was not measured."""
    section = sections.get(measure.section)
    if measure.section == "inception":
        section = sections.get("samples", {}).get("inception")
    return None if section is None else section.get(measure.key)


def table(numbers: Mapping[str, Any]) -> str:
    """The table below its conditions; for two models also a sentence that compares them."""
    models = numbers["models"]
    columns = [(column_name(model), model) for model in models]
    columns.append(("real", {"samples": numbers["real"]}))
    lines = [["", "better", *(name for name, _ in columns)]]
    for measure in MEASURES:
        values = [value_of(sections, measure) for _, sections in columns]
        if any(value is not None for value in values):
            lines.append([measure.title, direction(measure), *(format_value(value, measure) for value in values)])
    verdict = [comparison(*models), *closeness(numbers)] if len(models) == 2 else []
    return "\n".join([conditions(numbers), "", *aligned(lines), *verdict])


def column_name(model: Mapping[str, Any]) -> str:
    return f"{model['name']} ({model['fingerprint'][:8]})"


def direction(measure: Measure) -> str:
    return {True: "high", False: "low", None: ""}[measure.is_better_high]


def format_value(value: float | None, measure: Measure) -> str:
    return "-" if value is None else format(value, measure.form)


def conditions(numbers: Mapping[str, Any]) -> str:
    """Image size, counts of images and sampling settings."""
    held, reference, size = numbers["held_out"], numbers["reference"], numbers["size"]
    count = len(numbers["classes"])
    classes = "1 class" if count == 1 else f"{count or 'no'} classes"
    lines = [f"{size} x {size} pixels, {classes}; reference: {reference['images']} images of {reference['name']}"]
    blurred = f", blurred by {held['blur']:g} pixels" if held["blur"] else ""
    if "frechet_lite0" in numbers["real"]:
        lines.append(
            f"real: {numbers['real']['images']} images of {held['name']}{blurred} against the reference, the floor"
        )
    else:
        lines.append(f"real: {numbers['real']['images']} of these; with --reference their distance is the floor")
    if "left_out" in numbers:
        lines.append(numbers["left_out"])
    for model in numbers["models"]:
        used = model["sampling"]
        guidance = guidance_words(*(used[name] for name in ("guidance_scale", "guidance_start", "guidance_stop")))
        lines.append(
            f"{column_name(model)}: {model['samples']['images']} samples, seed {used['seed']}, {used['sampler']}, "
            f"{used['num_steps']} steps, {guidance}; {model['reconstruction']['images']} reconstructions"
        )
    return "\n".join(lines)


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """A sentence: on how many of the metrics with a direction the first model is better."""
    counted, behind = 0, []
    for measure in MEASURES:
        ours, theirs = value_of(first, measure), value_of(second, measure)
        if measure.is_better_high is None or ours is None or theirs is None:
            continue
        counted += 1
        if ours == theirs or (ours > theirs) != measure.is_better_high:
            behind.append(measure.title)
    names = f"{column_name(first)} is better than {column_name(second)}"
    return f"\n{names} on {counted - len(behind)} of {counted}" + (f"; not on {', '.join(behind)}" if behind else "")


def closeness(numbers: Mapping[str, Any]) -> list[str]:
    """A sentence: how close the samples of two models are for the same seeds, if they draw in the same size."""
    seeds, (first, second) = numbers.get("equal_seeds"), numbers["models"]
    if not seeds:
        return []
    return [
        f"for the same seeds the samples of {column_name(first)} are {seeds['latent_psnr']:.2f} dB from those of "
        f"{column_name(second)} (latent PSNR, encoded by the latter; a tenth below {seeds['latent_psnr_tenth']:.2f}), "
        f"in pixels {seeds['psnr']:.2f} dB"
    ]


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, the first two left-aligned."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
