"""The figure and the page of the sampler study."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from dsd_serve.files import atomic
from export.markdown import markdown_table
from studies.sampler_rule import ERRORS, SLACK, candidates, difference

MARKERS = "os^DvP"  # of the samplers, in their order
TITLES = {
    "few": "Few steps",
    "samplers": "Samplers at equal cost",
    "guidance": "Guidance scale",
    "interval": "Guidance interval",
    "shift": "Shift of the timesteps",
}


def results_of(values: Mapping[str, Any], *parts: str) -> list[Mapping[str, Any]]:
    """The results of these parts so far, each once."""
    keys = dict.fromkeys(key for part in parts for key in values["parts"][part])
    return [values["results"][key] for key in keys if key in values["results"]]


def num_missing(values: Mapping[str, Any]) -> int:
    """The number of settings without a result."""
    return len({key for part in values["parts"].values() for key in part} - set(values["results"]))


def draw(values: Mapping[str, Any], path: Path) -> None:
    """Write the figure: sampler error and quality against cost, quality against guidance scale, guidance intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    draw_samplers(axes[0][0], values, "latent_psnr")
    axes[0][0].set(title="error: latents against 500 steps", xlabel="network evaluations", ylabel="PSNR, dB")
    draw_samplers(axes[0][1], values, "frechet_lite0")
    floor = values["conditions"]["real"]["frechet_lite0"]
    axes[0][1].axhline(floor, color="gray", linestyle=":", label="real images")
    axes[0][1].set(title="quality of the images", xlabel="network evaluations", ylabel="frechet_lite0")
    draw_guidance(axes[1][0], values)
    draw_intervals(axes[1][1], values)
    for axis in (axes[0][0], axes[0][1]):
        axis.set_xscale("log")
        axis.set_xticks(sorted({r["evaluations"] for r in results_of(values, "samplers")} | {1, 2, 3}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        if axis.lines:
            axis.legend(fontsize=7)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def draw_samplers(axis: Any, values: Mapping[str, Any], name: str) -> None:
    results = sorted(results_of(values, "few", "samplers"), key=lambda r: r["evaluations"])
    for number, guidance in enumerate(sorted({result["guidance_scale"] for result in results})):
        for sampler, marker in zip(values["conditions"]["samplers"], cycle(MARKERS), strict=False):
            line = [r for r in results if r["sampler"] == sampler and r["guidance_scale"] == guidance]
            axis.errorbar(
                [r["evaluations"] for r in line],
                [r[name] for r in line],
                [r.get(f"{name}_error", 0) for r in line],
                fmt=f"{marker}-",
                color=f"C{number}",
                markersize=4,
                label=f"{sampler}, guidance {guidance:g}",
            )


def draw_guidance(axis: Any, values: Mapping[str, Any]) -> None:
    line = results_of(values, "guidance")
    scales = [r["guidance_scale"] for r in line]
    axis.plot(scales, [r["frechet_lite0"] for r in line], "s-", color="C0")
    axis.set(title="guidance scale", xlabel="guidance scale", ylabel="frechet_lite0 (blue)")
    other = axis.twinx()
    other.plot(scales, [r["top1_lite0"] for r in line], "s--", color="C3")
    other.set_ylabel("class accuracy (red)")


def draw_intervals(axis: Any, values: Mapping[str, Any]) -> None:
    for result in results_of(values, "interval", "guidance"):
        axis.plot(result["frechet_lite0"], result["top1_lite0"], "s", color="C0")
        name = f"{result['guidance_scale']:g}"
        if (result["guidance_start"], result["guidance_stop"]) != (0, 1):
            name += f" in {result['guidance_start']:g}-{result['guidance_stop']:g}"
        axis.annotate(name, (result["frechet_lite0"], result["top1_lite0"]), fontsize=7)
    axis.set(title="guidance scale and interval", xlabel="frechet_lite0", ylabel="class accuracy")


def document(values: Mapping[str, Any]) -> str:
    """The page in Markdown: conditions, recommendation, tables."""
    about, model = values["conditions"], values["model"]
    real, seeds = about["real"], about["seeds"]
    lines = [
        "# The samplers of the demo model" if model["name"] == "dsd-demo" else f"# The samplers of {model['name']}",
        "",
        "```sh",
        "make samplers DATA=DIR    # resumes a stopped study",
        "```",
        "",
        f"{model['name']} ({model['fingerprint'][:8]}) on the {about['engine']['engine']} engine. Every line is "
        f"{about['samples']:,} images of {about['classes']} classes in turn:",
        f"{about['samples'] // len(seeds)} from each of {len(seeds)} seeds, with the same noise in all lines. "
        "Metrics are means over the seeds, ± is their standard error.",
        "",
        "- **rows**: evaluations of the network per image, two with guidance.",
        f"- **latent PSNR**: final latents of {about['compared']} images against heun with {about['reference_steps']} "
        "steps from the same noise",
        "  with the same guidance: the error of the sampler, whatever the quality of the model.",
        f"- **frechet_lite0**: Frechet distance of {about['samples'] // len(seeds)} images from "
        f"{real['reference_images']:,} real images on Lite0 features, not FID.",
        f"  {real['sets']} sets of {real['images']} other real images have {plus_minus(real, 'frechet_lite0', '.1f')}.",
        "- **top1**: accuracy of that classifier among the classes of the model; on real images "
        f"{real['top1_lite0']:.1%}.",
        "",
        "![quality against cost](samplers.png)",
        "",
    ]
    if missing := num_missing(values):
        lines += [f"**Unfinished**: {missing} settings are not measured yet."]
    else:
        lines += recommendation(values)
    for part, title in TITLES.items():
        if values["parts"].get(part):
            lines += ["", f"## {title}", "", *table(results_of(values, part))]
    return "\n".join([*lines, ""])


def recommendation(values: Mapping[str, Any]) -> list[str]:
    chosen, default = values["recommended"], results_of(values, "default")[0]
    nearest = candidates(results_of(values, *values["parts"]))[0]
    lines = [
        "## Recommended",
        "",
        f"{described(chosen)}.",
        "",
        "The cheapest of the settings that a model directory can recommend (evenly spaced timesteps)",
        f"whose frechet_lite0 exceeds that of real images by at most {SLACK - 1:.0%} more than the smallest one does,",
        "and whose top1 is not below the highest of those. Two settings differ if the mean difference of their seeds",
        f"is more than {ERRORS} standard errors of that difference, which are smaller than the ± of either setting:",
        "both draw from the same noise.",
    ]
    for title, other in (("The smallest frechet_lite0", nearest), ("The model recommends", default)):
        if other["of_seeds"] != chosen["of_seeds"]:
            mean, error = difference(chosen["of_seeds"]["frechet_lite0"], other["of_seeds"]["frechet_lite0"])
            lines += ["", f"{title}: {described(other)}.", f"The setting above has {mean:+.1f} ± {error:.1f}."]
    return lines


def described(result: Mapping[str, Any]) -> str:
    """A setting with its cost and its metrics."""
    return (
        f"**{result['sampler']}, {result['num_steps']} steps, guidance {result['guidance_scale']:g}**, "
        f"{result['rows']} rows, frechet_lite0 {plus_minus(result, 'frechet_lite0', '.1f')}, "
        f"top1 {plus_minus(result, 'top1_lite0', '.1%')}"
    )


def plus_minus(result: Mapping[str, Any], name: str, form: str) -> str:
    """A metric with its standard error: 554.6 ± 1.2, or 80.0 ± 0.9%."""
    return f"{result[name]:{form}}".rstrip("%") + f" ± {result[f'{name}_error']:{form}}"


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for r in results:
        psnr = f"{r['latent_psnr']:.1f} dB" if "latent_psnr" in r else "-"
        interval = "-" if r["guidance_scale"] == 1 else f"{r['guidance_start']:g} to {r['guidance_stop']:g}"
        counts = [str(r[key]) for key in ("sampler", "num_steps", "evaluations", "rows")]
        metrics = [("frechet_lite0", ".1f"), ("kid_lite0", ".4f"), ("top1_lite0", ".1%")]
        numbers = [plus_minus(r, name, form) for name, form in metrics]
        rows.append([*counts, f"{r['shift']:g}", f"{r['guidance_scale']:g}", interval, psnr, *numbers])
    header = ("sampler", "steps", "evaluations", "rows", "shift", "guidance", "interval", "latent PSNR")
    return markdown_table([*header, "frechet_lite0", "kid_lite0", "top1"], rows)
