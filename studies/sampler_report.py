"""The figure and the page of the sampler study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsd_serve.files import atomic
from export.markdown import markdown_table

STYLES = {"euler": "o-", "heun": "s-", "dpmpp_2m": "^-"}
TITLES = {
    "samplers": "Samplers at equal cost",
    "guidance": "Guidance scale",
    "interval": "Guidance interval",
    "shift": "Shift of the timesteps",
}


def results_of(values: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The results of a part so far."""
    return [values["results"][key] for key in values["parts"][part] if key in values["results"]]


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
        if axis.lines:
            axis.legend(fontsize=7)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def draw_samplers(axis: Any, values: Mapping[str, Any], name: str) -> None:
    results = results_of(values, "samplers")
    for number, guidance in enumerate(sorted({result["guidance_scale"] for result in results})):
        for sampler, style in STYLES.items():
            line = [r for r in results if r["sampler"] == sampler and r["guidance_scale"] == guidance]
            label = f"{sampler}, guidance {guidance:g}"
            axis.plot([r["evaluations"] for r in line], [r[name] for r in line], style, color=f"C{number}", label=label)


def draw_guidance(axis: Any, values: Mapping[str, Any]) -> None:
    line = results_of(values, "guidance")
    scales = [r["guidance_scale"] for r in line]
    axis.plot(scales, [r["frechet_lite0"] for r in line], "s-", color="C0")
    axis.set(title="guidance scale", xlabel="guidance scale", ylabel="frechet_lite0 (blue)")
    other = axis.twinx()
    other.plot(scales, [r["top1_lite0"] for r in line], "s--", color="C3")
    other.set_ylabel("class accuracy (red)")


def draw_intervals(axis: Any, values: Mapping[str, Any]) -> None:
    for result in results_of(values, "interval") + results_of(values, "guidance"):
        axis.plot(result["frechet_lite0"], result["top1_lite0"], "s", color="C0")
        name = f"{result['guidance_scale']:g}"
        if (result["guidance_start"], result["guidance_stop"]) != (0, 1):
            name += f" in {result['guidance_start']:g}-{result['guidance_stop']:g}"
        axis.annotate(name, (result["frechet_lite0"], result["top1_lite0"]), fontsize=7)
    axis.set(title="guidance scale and interval", xlabel="frechet_lite0", ylabel="class accuracy")


def document(values: Mapping[str, Any]) -> str:
    """The page in Markdown: conditions, recommendation, tables."""
    about = values["conditions"]
    real, defaults = about["real"], about["defaults"]
    lines = [
        "# The samplers of the demo model" if about["model"] == "dsd-demo" else f"# The samplers of {about['model']}",
        "",
        "```sh",
        "make samplers DATA=DIR    # resumes a stopped study",
        "```",
        "",
        f"{about['model']} ({about['fingerprint'][:8]}) on the {about['engine']['engine']} engine. Every line is "
        f"{about['samples']} images of {about['classes']} classes in turn, from the same noise "
        f"(seed {about['seed']}).",
        "",
        "- **rows**: evaluations of the network per image, two with guidance.",
        f"- **latent PSNR**: final latents of {about['compared']} images against heun with {about['reference_steps']} "
        "steps from the same noise",
        "  with the same guidance: the error of the sampler, whatever the quality of the model.",
        f"- **frechet_lite0**: Frechet distance from {real['reference_pictures']:,} real images on Lite0 features, not "
        "FID.",
        f"  {real['pictures']} other real images have {real['frechet_lite0']:.1f}.",
        "- **top1**: accuracy of that classifier among the classes of the model; on real images "
        f"{real['top1_lite0']:.1%}.",
        "",
        "![quality against cost](samplers.png)",
        "",
    ]
    if missing := num_missing(values):
        lines += [f"**Unfinished**: {missing} settings are not measured yet."]
    else:
        lines += recommendation(values["recommended"], results_of(values, "default")[0], defaults)
    for part, title in TITLES.items():
        lines += ["", f"## {title}", "", *table(results_of(values, part))]
    return "\n".join([*lines, ""])


def recommendation(best: Mapping[str, Any], default: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    return [
        "## Recommended",
        "",
        f"**{describe(best)}**: {best['rows']} rows, frechet_lite0 {best['frechet_lite0']:.1f}, top1 "
        f"{best['top1_lite0']:.1%}. The cheapest of the settings whose frechet_lite0 exceeds that",
        "of real images by at most 5 % more than the best one does, and whose top1 is within two standard errors of",
        f"the best of those. The model's defaults ({defaults['sampler']}, {defaults['num_steps']} steps,",
        f"guidance {defaults['guidance_scale']:g}) have "
        f"{default['frechet_lite0']:.1f} and {default['top1_lite0']:.1%} for {default['rows']} rows.",
    ]


def describe(result: Mapping[str, Any]) -> str:
    text = f"{result['sampler']}, {result['num_steps']} steps, guidance {result['guidance_scale']:g}"
    if (result["guidance_start"], result["guidance_stop"]) != (0, 1):
        text += f" from {result['guidance_start']:g} to {result['guidance_stop']:g}"
    return text


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for r in results:
        psnr = f"{r['latent_psnr']:.1f} dB" if "latent_psnr" in r else "-"
        interval = "-" if r["guidance_scale"] == 1 else f"{r['guidance_start']:g} to {r['guidance_stop']:g}"
        counts = [str(r[key]) for key in ("sampler", "num_steps", "evaluations", "rows")]
        numbers = [f"{r['frechet_lite0']:.1f}", f"{r['kid_lite0']:.4f}", f"{r['top1_lite0']:.1%}"]
        rows.append([*counts, f"{r['shift']:g}", f"{r['guidance_scale']:g}", interval, psnr, *numbers])
    header = ("sampler", "steps", "evaluations", "rows", "shift", "guidance", "interval", "latent PSNR")
    return markdown_table([*header, "frechet_lite0", "kid_lite0", "top1"], rows)
