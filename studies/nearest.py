"""Nearest training images: how close samples are to the images that a model was trained on.

    python -m studies.nearest dsd_serve/demo --data tiny-imagenet-200

Draws 200 samples with the model's recommended settings and measures how far each is from the nearest training image, by
features of EfficientNet-Lite0 (1 - cosine) and by pixels (root mean square, mirrored or not, as in training). As many
held-out images are the measure: samples of a model that has memorised its training images are nearer than these.

Writes nearest.json, the page nearest.md with 20 samples and the numbers of the three training images nearest to each by
features and by pixels, and a figure of these samples beside these images. The figure holds training images, so it stays
out of the project.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.output import add_flag, output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from dsd_serve.loading import load
from dsd_serve.params import SamplingParams
from export.markdown import markdown_table
from training.dataset import Images
from training.evaluation.classifier import FeatureCache, default_cache, lite0
from training.evaluation.evaluator import read_images, resized
from training.evaluation.subject import ModelSubject

SAMPLES = 200  # that are compared; the figure shows the first
SHOWN, NEIGHBOURS = 20, 3
LIMIT = 50_000  # images of a set
SCALE = 48  # pixels of an image in the figure
PAGE_SCALE, PAGE_COLUMNS = 64, 10  # of the samples on the page

Distances = NDArray[np.float32]


def feature_distances(some: NDArray[np.float32], others: NDArray[np.float32]) -> Distances:
    """1 - cosine of features [N, F] and [R, F]: [N, R]."""
    some, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (some, others))
    return 1 - some @ others.T


def pixel_distances(some: NDArray[np.uint8], others: NDArray[np.uint8]) -> Distances:
    """Root mean square of the differences of images [N, 3, S, S] and [R, 3, S, S], in grey levels: [N, R]."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (some, others))
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def nearest(distances: Distances, count: int) -> NDArray[np.int64]:
    """The indices [N, count] of the smallest distances [N, R] of each row, in order."""
    return np.argsort(distances, axis=1)[:, :count]


def figure(samples: NDArray[np.uint8], *neighbours: NDArray[np.uint8]) -> Image.Image:
    """A line for each sample [N, 3, S, S], two of them side by side: the sample and its neighbours [N, K, 3, S, S] of
    each kind, with gaps between."""
    gap = np.full_like(samples[:1], 255)
    lines = []
    for i, sample in enumerate(samples):
        kinds = (part for kind in neighbours for part in (gap, kind[i]))
        lines.append(np.concatenate([sample[None], *kinds, gap]))
    return codec.sheet(list(np.concatenate(lines)), SCALE, 2 * len(lines[0]))


@dataclass(frozen=True)
class Study:
    """numbers: the contents of nearest.json. samples: the shown ones, uint8 [N, 3, S, S]. figure: they and the images
    nearest to them."""

    numbers: dict[str, Any]
    samples: NDArray[np.uint8]
    figure: Image.Image


def study(path: Path, data: str, validation: str) -> Study:
    """The distances of samples and of held-out images to training images."""
    classifier, cache = lite0(), FeatureCache(default_cache())
    with load(path) as model:
        subject = ModelSubject(model)
        classes, size = tuple(subject.classes), subject.image_size
        training, held = (read_images(Images(place, size), classes, LIMIT) for place in (data, validation))
        training.features = cache.features(classifier, training.pixels, "features of training images")
        labels = [classes[i % len(classes)] for i in range(SAMPLES)]
        defaults: SamplingParams = subject.defaults
        samples = resized(subject.draw(labels, defaults), size)
    held.pixels = held.pixels[np.linspace(0, len(held.pixels) - 1, min(SAMPLES, len(held.pixels))).astype(int)]
    sets = {"samples": samples, "held_out": held.pixels}
    numbers: dict[str, Any] = {
        "name": subject.name,
        "fingerprint": subject.fingerprint,
        "training_images": len(training.pixels),
    }
    shown = []
    numbers["names"] = {str(label): one.name for label, one in subject.classes.items() if one is not None}
    numbers["shown"] = [{"class": label, "index": i} for i, label in enumerate(labels[:SHOWN])]
    for name, pixels in sets.items():
        features = classifier.features(pixels, f"features of {name}")
        of_kind = {
            "features": feature_distances(features, training.features),
            "pixels": np.minimum(*(pixel_distances(side, training.pixels) for side in (pixels, pixels[..., ::-1]))),
        }
        for kind, distances in of_kind.items():
            numbers[f"{name}_{kind}_median"] = round(float(np.median(distances.min(1))), 4)
            numbers[f"{name}_{kind}_least"] = round(float(distances.min()), 4)
            if name == "samples":
                found = nearest(distances[:SHOWN], NEIGHBOURS)
                shown.append(training.pixels[found])
                for one, row, images in zip(numbers["shown"], distances, found, strict=False):
                    one[kind] = [
                        {"image": int(i), "class": int(training.labels[i]), "distance": round(float(row[i]), 3)}
                        for i in images
                    ]
    return Study(numbers, samples[:SHOWN], figure(samples[:SHOWN], *shown))


def document(numbers: dict[str, Any]) -> str:
    """The page of the contents of nearest.json."""
    medians = [
        [
            f"{words}, by {kind}",
            *(shown_distance(numbers[f"{name}_{kind}_{what}"], kind, unit=True) for what in ("median", "least")),
        ]
        for kind in ("features", "pixels")
        for name, words in (("samples", "samples"), ("held_out", "held-out images"))
    ]
    names, shown = numbers["names"], numbers["shown"]
    table = [
        [
            str(number),
            names.get(str(one["class"]), ""),
            *(", ".join(neighbour(found, one, kind, names) for found in one[kind]) for kind in ("features", "pixels")),
        ]
        for number, one in enumerate(shown, 1)
    ]
    lines = [
        "# Nearest training images",
        "",
        f"Written by `python -m studies.nearest` for the model {numbers['name']} (fingerprint "
        f"{numbers['fingerprint'][:8]}). {SAMPLES} samples with the recommended settings, and as many held-out images, "
        f"are compared with the {numbers['training_images']:,} training images: by features of EfficientNet-Lite0 "
        "(1 - cosine), and by pixels (root mean square, mirrored or not). Samples of a model that has memorised "
        "its training images are nearer than held-out images.",
        "",
        *markdown_table(["", "nearest training image, median", "smallest"], medians),
        "",
        f"The first {len(shown)} samples, from left to right:",
        "",
        f"![{len(shown)} samples of {len({one['class'] for one in shown})} classes](nearest.webp)",
        "",
        "The three training images nearest to each: their numbers among the training images of the model's classes, in "
        "the order of the data from 0, with the distance, and with the class if it is another. The command also draws "
        "them beside the samples, in `runs/nearest.png`.",
        "",
        *markdown_table(["sample", "class", "by features", "by pixels"], table),
        "",
    ]
    return "\n".join(lines)


def neighbour(found: dict[str, Any], sample: dict[str, Any], kind: str, names: dict[str, str]) -> str:
    """A training image near to a sample: its number and distance, and its class if it is another."""
    label = found["class"]
    other = "" if label == sample["class"] else f", {names.get(str(label), label)}"
    return f"{found['image']} ({shown_distance(found['distance'], kind)}{other})"


def shown_distance(distance: float, kind: str, unit: bool = False) -> str:
    if kind == "features":
        return f"{distance:.3f}"
    return f"{distance:.1f}" + (" grey levels" if unit else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.nearest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--data", required=True, help="training images of the model, as dsd-train's data.path")
    parser.add_argument("--validation", help="held-out images (the file val*.parquet of --data)")
    parser.add_argument("--figure", type=Path, default=Path("runs/nearest.png"), help="(runs/nearest.png)")
    add_flag(parser, "studies/results/demo")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        found = sorted(Path(options.data).glob("val*.parquet"))
        if not (options.validation or found):
            sys.exit("nearest: --validation must name held-out images, because --data holds no file val*.parquet")
        result = study(options.model, options.data, options.validation or str(found[0]))
    except DSDError as error:
        sys.exit(f"nearest: {error}")
    output = output_of(options)
    with atomic(output.results / "nearest.json") as temporary:
        temporary.write_text(json.dumps(result.numbers, indent=1) + "\n")
    with atomic(output.pages / "nearest.md") as temporary:
        temporary.write_text(document(result.numbers), encoding="utf-8")
    with atomic(output.pages / "nearest.webp") as temporary:
        codec.sheet(list(result.samples), PAGE_SCALE, PAGE_COLUMNS).save(temporary, format="webp", quality=90)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    with atomic(options.figure) as temporary:
        result.figure.save(temporary, format="png", optimize=True)
    print(
        json.dumps({name: value for name, value in result.numbers.items() if name not in ("names", "shown")}, indent=1)
    )


if __name__ == "__main__":
    main()
