"""Edits, an inpainting and a walk by a distilled model beside those of its teacher: one figure.

    python -m studies.edits_beside FAST TEACHER PHOTO

Each model uses its recommended settings, and both the same seeds. PHOTO: one that may be published. Writes
runs/edits-beside.png, or FILE of -o.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from dsd_serve.loading import load
from dsd_serve.model import Model
from training.evaluation.subject import ModelSubject

SIZE = 96  # pixels of an image in the figure
STRENGTHS = (0.2, 0.5, 0.8)
WALK = 7  # images
SEED = 7


def right_half(size: int) -> Image.Image:
    """The mask of the inpainting: white where it is redrawn."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 2, 0, size, size))
    return mask


def edits(model: Model, photo: Path, class_: str) -> list[tuple[str, Image.Image]]:
    """The reconstruction, an edit of each strength, and the inpainting, with their titles."""
    images = [("reconstruction", model.reconstruct(photo, size=SIZE))]
    for strength in STRENGTHS:
        images.append((f"strength {strength:g}", model.edit(photo, class_, strength=strength, seed=SEED, size=SIZE)))
    mask = right_half(SIZE)
    images.append(("right half", model.edit(photo, class_, strength=1.0, mask=mask, seed=SEED, size=SIZE)))
    return images


def described(model: Model) -> str:
    subject = ModelSubject(model)
    settings = subject.defaults
    guidance = f"\nguidance {settings.guidance_scale:g}" if settings.guidance_scale != 1 else ""
    return f"{settings.sampler}\n{settings.num_steps} steps{guidance}"


def figure(fast: Path, teacher: Path, photo: Path, class_: str, ends: tuple[str, str]) -> Any:
    """Two lines of edits, then two of walks; of each pair the teacher's is the first. A matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    for place in (teacher, fast):
        with load(place) as model:
            original = ("photo", Image.open(photo).convert("RGB").resize((SIZE, SIZE)))
            lines.append((described(model), [original, *edits(model, photo, class_)]))
            titles = [ends[0], *[""] * (WALK - 2), ends[1]]
            walk = model.walk(*ends, n=WALK, seed=SEED, size=SIZE)
            lines.append((described(model), list(zip(titles, walk, strict=True))))
    lines = [lines[0], lines[2], lines[1], lines[3]]
    columns = max(len(images) for _, images in lines)
    result, axes = plt.subplots(len(lines), columns, figsize=(1.3 * columns, 1.5 * len(lines)), constrained_layout=True)
    for line, (name, images) in zip(axes, lines, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, (title, image) in zip(line, images, strict=False):
            axis.imshow(image)
            axis.set_title(title, fontsize=8)
        line[0].text(-0.05, 0.5, name, rotation=90, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.edits_beside", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("fast", type=Path, help="the distilled model's directory")
    parser.add_argument("teacher", type=Path, help="its teacher's")
    parser.add_argument("photo", type=Path, help="the photo to edit")
    parser.add_argument("--class", dest="class_", default="espresso", help="of the edits (default espresso)")
    parser.add_argument("--walk", nargs=2, default=("goldfish", "orange"), metavar="CLASS", help="its ends")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("runs/edits-beside.png"), help="(runs/edits-beside.png)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = figure(options.fast, options.teacher, options.photo, options.class_, tuple(options.walk))
    except (DSDError, OSError) as error:
        sys.exit(f"edits_beside: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic(options.output) as temporary:
        result.savefig(temporary, dpi=110, format="png")
    print(options.output)


if __name__ == "__main__":
    main()
