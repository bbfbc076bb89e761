"""Drawing the images of a model's classes into one file, classes.webp, for pages that show all classes at once."""

import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dsd_serve.loading import load
from dsd_serve.rows import Latents

log = logging.getLogger(__name__)

SIZE = 64  # pixels a side of each image
SHOWN = 40  # images to have at least, as far as MOST_PER_CLASS allows
MOST_PER_CLASS = 4
MOST_CANDIDATES = 8  # that are drawn of each class, the most typical of which are kept
DRAWN = 800  # candidates, if there are fewer classes
ROWS = 16  # a tick
AT_ONCE = 64  # images that are drawn at the same time
MOST_SECONDS = 120.0  # of processor time, for which an export draws unasked
MOST_CLASSES = 4000
QUALITY = 90  # of WebP


def draw_classes(
    folder: Path, file: Path, asked: bool, check: Callable[[], None] = lambda: None
) -> tuple[int, int] | None:
    """Draw images of each class of the model directory `folder` with its recommended settings. Returns columns and
    per_class of the grid in `file`; None if nothing was drawn, because it would take too long and was not requested,
    or the model has no classes.

    Seed and index decide an image, and on a CPU the same weights give the same file.
    """
    with load(folder, row_budget=ROWS) as model, ThreadPoolExecutor(AT_ONCE) as pool:
        labels = [one.index for one in model.classes]
        if not labels or len(labels) > MOST_CLASSES:
            return None
        candidates = min(MOST_CANDIDATES, max(1, DRAWN // len(labels)))
        kept = min(MOST_PER_CLASS, candidates, max(1, -(-SHOWN // len(labels))))
        began, tiles = time.process_time(), list[Image.Image]()
        for some in batched(labels, max(1, AT_ONCE // candidates)):
            images = model.generate(some, n=candidates, seed=0)
            for chosen in typical(images, list(pool.map(model.encode, images)), candidates, kept):
                tiles += chosen
            seconds = (time.process_time() - began) / len(tiles) * kept * len(labels)
            if seconds > MOST_SECONDS and not asked:
                log.info(
                    "images of the %d classes would take %.0f s of processor time and are left out; --class-images on "
                    "draws them",
                    len(labels),
                    seconds,
                )
                return None
            check()
    columns = math.ceil(math.sqrt(len(tiles)))
    file.write_bytes(grid(tiles, columns))
    return columns, kept


def batched(labels: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(labels), size):
        yield list(labels[start : start + size])


def typical(
    images: Sequence[Image.Image], latents: Sequence[Latents], candidates: int, kept: int
) -> Iterator[list[Image.Image]]:
    """Of the `candidates` images of each class the `kept` most typical ones: those whose latents [L, C] are nearest to
    the mean of all of them, the nearest first."""
    for start in range(0, len(images), candidates):
        z = np.stack(latents[start : start + candidates])  # [candidates, L, C]
        distances = np.square(z - z.mean(0)).sum((1, 2))
        yield [images[start + i] for i in np.argsort(distances, kind="stable")[:kept]]


def grid(images: Sequence[Image.Image], columns: int) -> bytes:
    """A WebP of images in rows of `columns`, each SIZE pixels a side."""
    sheet = Image.new("RGB", (SIZE * columns, SIZE * -(-len(images) // columns)))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), (SIZE * column, SIZE * row))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()
