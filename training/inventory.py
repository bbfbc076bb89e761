"""The report on a run's images when it starts, and the list of those that cannot be read."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dsd_serve.errors import shown
from training.classes import IMAGENET, NO_CLASSES, some
from training.dataset import Broken, Images
from training.device import Device

log = logging.getLogger(__name__)

NAMED = 10  # images that cannot be read and are named in the log
RAREST = 5
BROKEN = "broken.tsv"


def lines(training: Images, held: Images) -> Iterator[str]:
    """Sentences about the images of a run: their number, classes, and what was left out."""
    yield f"{counted(len(training), 'image', 'images')} to train on, {len(held)} held out"
    yield classes_line(training)
    missing = sorted(set(training.labels.tolist()) - set(held.labels.tolist()))
    if missing and training.data.validation:
        names = [training.table.name(label) for label in missing]
        yield f"no held-out images of {counted(len(missing), 'class', 'classes')}: {some(names)}"
    yield from training.source.remarks
    if held.source is not training.source:
        yield from (f"{held.path}: {remark}" for remark in held.source.remarks)


def added_or_removed(training: Images, before: int) -> Iterator[str]:
    """A sentence if a run goes on with another number of training images than `before`; 0: it is not known.

    The order of the images and the share that is held out are functions of their number.
    """
    if before not in (0, len(training)):
        others = "" if training.data.validation else ", and other images are held out"
        yield (
            f"{counted(len(training), 'image', 'images')} to train on, {before} when the checkpoint was saved: "
            f"from here on they come in another order{others}"
        )


def counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def classes_line(images: Images) -> str:
    """The classes, how many images they have, and the rarest where they differ."""
    if images.table == NO_CLASSES:
        return "no classes: the model draws without one"
    labels, counts = np.unique(images.labels, return_counts=True)
    names = [images.table.name(label) for label in labels.tolist()]
    kind = " of ImageNet-1k" if images.table == IMAGENET else ""
    line = f"{counted(len(labels), 'class', 'classes')}{kind} ({some(names)})"
    low, middle, high = int(counts.min()), float(np.median(counts)), int(counts.max())
    if low == high:
        return f"{line}, {low} images each"
    rare = np.argsort(counts, kind="stable")[:RAREST]
    rarest = ", ".join(f"{shown(names[place])[1:-1]} {counts[place]}" for place in rare)
    line += f", {low} to {high} images each, median {middle:g}; fewest: {rarest}"
    return line if high < 4 * low or images.data.balance else f"{line}; data.balance=true draws all as often"


def report_broken(images: Sequence[Images], folder: Path, where: Device) -> None:
    """Log the images that cannot be read, and list them in a file of the run; without any, remove the list.

    All processes of a run must call it.
    """
    found = {one.name: one for each in images for one in each.broken.values()}
    if where.world > 1:
        everywhere: list[dict[str, Broken]] = [{}] * where.world
        dist.all_gather_object(everywhere, found)
        found = {name: one for each in everywhere for name, one in each.items()}
    if where.rank:
        return
    path = folder / BROKEN
    known = read_list(path)
    if any(each.pixels is None for each in images):  # those of earlier parts of the run are not found again
        found_lines = {**known, **{name: one.reason for name, one in found.items()}}
    else:
        found_lines = {name: one.reason for name, one in found.items()}
    if found_lines == known:
        return
    if not found_lines:
        path.unlink()
        return
    texts = [f"{name}\t{reason}\n" for name, reason in found_lines.items()]
    path.write_text("".join(texts), encoding="utf-8", errors="backslashreplace")
    new = [name for name in found_lines if name not in known]
    for name in new[:NAMED]:
        log.warning("skipped: %s: %s", name, found_lines[name])
    number = counted(len(found_lines), "image", "images")
    log.warning("%s skipped, because they cannot be read; %s lists them", number, path)


def read_list(path: Path) -> dict[str, str]:
    """The names and reasons in a list of images that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return dict(line.split("\t", 1) for line in lines if "\t" in line)
