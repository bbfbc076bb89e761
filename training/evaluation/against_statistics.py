"""FID, sFID and Inception score of samples against published statistics, with everything that affects these numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import __version__ as pillow_version
from tqdm import tqdm

from dsd_serve import __version__
from dsd_serve.checkpoint import sha256
from dsd_serve.errors import CheckpointError
from dsd_serve.imaging import codec
from training.evaluation.distances import Moments, frechet
from training.evaluation.inception import InceptionNetwork
from training.evaluation.running import RunningMoments, RunningScore, split_of
from training.evaluation.sample_files import npz_samples
from training.evaluation.statistics import Statistics, described, read_statistics

BATCH = 64
USUAL = 50_000  # samples of a published FID
SCALING = "the network scales images to 299 x 299, bilinear as in TensorFlow 1"

Pixels = NDArray[np.uint8]


@dataclass
class Summary:
    """Moments and score of a set of images, and what was seen of it. sizes: (height, width) of the images."""

    pool: Moments
    spatial: Moments
    score: tuple[float, float]
    splits: int
    images: int
    sizes: set[tuple[int, int]]


def summarise(
    network: Callable[[list[Pixels]], tuple[NDArray[np.float32], ...]],
    batches: Iterable[list[Pixels]],
    count: int,
    size: int | None = None,
    title: str = "",
) -> Summary:
    """Run the network over images of one size, or over images resized to `size`. count: of the images.

    Raises CheckpointError for images of several sizes.
    """
    pool, spatial, score = RunningMoments(), RunningMoments(), RunningScore(count)
    sizes: set[tuple[int, int]] = set()
    with tqdm(total=count, desc=title, unit="image", disable=not title, leave=False) as bar:
        for batch in batches:
            sizes.update((image.shape[1], image.shape[2]) for image in batch)
            if size:
                batch = [image if image.shape[1:] == (size, size) else codec.fit_as_adm(image, size) for image in batch]
            elif len(sizes) > 1:
                (height, width), (other_height, other_width) = sorted(sizes)[:2]
                raise CheckpointError(
                    f"the samples have several sizes, as {width} x {height} and {other_width} x {other_height} pixels; "
                    "--size S resizes them to S x S"
                )
            features, maps, logits = network(batch)
            if not (np.isfinite(features).all() and np.isfinite(maps).all() and np.isfinite(logits).all()):
                raise CheckpointError("the Inception network gives values that are not finite: check its weights")
            pool.add(features)
            spatial.add(maps)
            score.add(logits, [split_of(image, score.splits) for image in batch])
            bar.update(len(batch))
    return Summary(pool.moments(), spatial.moments(), score.scores(), score.splits, pool.count, sizes)


def complete(statistics: Statistics, path: Path, network: InceptionNetwork) -> Statistics:
    """The statistics of a file; those of its images, computed with the network, if it holds no others."""
    if statistics.pool:
        return statistics
    images = npz_samples(path)
    seen = summarise(network, images.batches(BATCH), images.count, title="statistics")
    return Statistics(statistics.name, statistics.sha256, seen.pool, seen.spatial, statistics.images, statistics.size)


def measure(
    batches: Callable[[int], Iterator[list[Pixels]]],
    count: int,
    describe: Callable[[], Mapping[str, Any]],
    statistics_file: Path,
    weights: Path,
    device: str = "cpu",
    size: int | None = None,
) -> dict[str, Any]:
    """The sheet of samples against the statistics of a file: metrics, their conditions, and warnings.

    batches: images in lists of a given length. describe: the samples in plain values, called after they were read.
    weights: of the Inception network. size: resize the samples to this size in pixels.
    """
    given = read_statistics(statistics_file, InceptionNetwork.sizes)
    network = InceptionNetwork(weights, device)
    reference = complete(given, statistics_file, network)
    assert reference.pool is not None
    seen = summarise(network, batches(BATCH), count, size, "features of samples")
    sizes = [f"{width} x {height}" for height, width in sorted(seen.sizes)]
    resized = bool(size) and seen.sizes != {(size, size)}
    sheet: dict[str, Any] = {
        "fid": frechet(seen.pool, reference.pool),
        "sfid": frechet(seen.spatial, reference.spatial) if reference.spatial else None,
        "inception_score": seen.score[0],
        "inception_score_std": seen.score[1],
        "inception_score_splits": seen.splits,
        "samples": {
            **describe(),
            "images": seen.images,
            "sizes": sizes[:10],
            "resize": f"to {size} x {size} as ADM does, by Pillow {pillow_version}" if resized else "none",
        },
        "statistics": described(reference) | {"computed_here": given.pool is None},
        "network": {
            "name": "Inception of 2015-12-05, inception-v3-compat",
            "weights_sha256": sha256(weights),
            "scaling": SCALING,
        },
        "tool": {
            "dsd-eval": __version__,
            "torch-fidelity": network.version,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": device,
        },
    }
    return sheet | {"warnings": warnings(sheet, seen, reference, resized)}


def warnings(sheet: Mapping[str, Any], seen: Summary, reference: Statistics, resized: bool) -> list[str]:
    """Sentences about all that keeps the numbers from being compared with published ones."""
    found = []
    samples = sheet["samples"]
    if seen.images < USUAL:
        found.append(
            f"{seen.images:,} samples: the FID of fewer than {USUAL:,} is biased upwards, and comparable only "
            "at the same number of samples"
        )
    if seen.images <= len(seen.pool.mean):
        found.append(
            f"the covariance of {len(seen.pool.mean):,} features has full rank only with more samples than that"
        )
    if resized:
        found.append(f"the samples were resized {samples['resize']}; papers measure samples at the model's own size")
    side = {size[0] if size[0] == size[1] else 0 for size in seen.sizes}
    if reference.size and not resized and side != {reference.size}:
        found.append(
            f"the samples have {' and '.join(samples['sizes'])} pixels, and the images of the statistics "
            f"{reference.size} x {reference.size}"
        )
    if any(kind in ("jpeg", "webp") for kind in samples.get("formats", ())):
        found.append("some samples are JPEG or WebP files, whose compression changes FID; save samples as PNG")
    if (classes := samples.get("classes")) is not None:
        found += class_warnings(classes)
    return found


def class_warnings(classes: Mapping[str, int]) -> list[str]:
    if not classes["classes"]:
        return ["the classes of the samples are not known, so their balance is not either"]
    found = []
    if classes["unlabelled"]:
        found.append(f"{classes['unlabelled']:,} samples have no class")
    if classes["fewest"] != classes["most"]:
        found.append(
            f"the classes are not balanced: {classes['fewest']} to {classes['most']} samples each of "
            f"{classes['classes']}; FID depends on the balance, and papers differ in it"
        )
    return found


def text(sheet: Mapping[str, Any]) -> str:
    """The sheet for the terminal."""
    samples, statistics = sheet["samples"], sheet["statistics"]
    classes = samples["classes"]
    fewest, most = classes["fewest"], classes["most"]
    balance = f", {classes['classes']} classes of {fewest if fewest == most else f'{fewest} to {most}'} each"
    lines = [
        f"{samples['images']:,} samples of {samples['name']}, {' and '.join(samples['sizes'])} pixels"
        + (balance if classes["classes"] else ""),
        f"against {statistics['name']} ({statistics['sha256'][:8]})",
        "",
        f"FID              {sheet['fid']:.2f}",
        *([f"sFID             {sheet['sfid']:.2f}"] if sheet["sfid"] is not None else []),
        f"Inception score  {sheet['inception_score']:.2f} (std {sheet['inception_score_std']:.2g} of "
        f"{sheet['inception_score_splits']} splits)",
        "",
        *(f"Note: {sentence}." for sentence in sheet["warnings"]),
    ]
    return "\n".join(lines).rstrip()
