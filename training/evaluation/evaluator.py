"""The metrics of a model against sets of real images: samples, reconstructions and latents."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError, InputError
from dsd_serve.imaging import codec
from dsd_serve.labels import all_classes
from dsd_serve.params import SamplingParams
from training.dataset import Images
from training.evaluation.classifier import Features, Lite0
from training.evaluation.distances import (
    KernelSet,
    blur,
    class_score,
    frechet_to,
    kid,
    latent_psnr,
    moments,
    precision_recall,
    spread,
    ssim,
)
from training.evaluation.inception import Inception
from training.evaluation.probe import latent_statistics, probe_accuracy, split_every
from training.evaluation.subject import Subject, described_sampling

log = logging.getLogger(__name__)

LIMIT = 50_000  # images of a set, the usual count for FID
PROBE = 5_000  # training images of the linear probe, at most


@dataclass
class ImageSet:
    """Real images uint8 [N, 3, S, S], their labels int64 [N] and features [N, 1280]. name: of the file or folder."""

    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    features: Features


@dataclass
class Evaluator:
    """Measures models: held-out images, a reference, the classes in common, and the feature networks.

    imagenet: the label in ImageNet-1k of each of the classes; None if one has none, so that the classifier cannot tell
    whether an image is of its class: there are no top-1 metrics then.
    """

    size: int
    classes: tuple[int, ...]
    held_out: ImageSet
    reference: ImageSet
    classifier: Lite0
    inception: Inception | None = None
    imagenet: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        self.moments = moments(self.reference.features)
        self.kernel = KernelSet(self.reference.features)

    @property
    def has_reference(self) -> bool:
        return self.reference is not self.held_out

    def compare(self, pixels: NDArray[np.uint8], features: Features, labels: NDArray[np.int64]) -> dict[str, Any]:
        """All metrics of images against the reference, with the counts of both."""
        real = self.reference
        precision, recall = precision_recall(features, real.features)
        numbers: dict[str, Any] = {
            "images": len(features),
            "reference_images": len(real.features),
            "frechet_lite0": frechet_to(features, self.moments),
            "kid_lite0": kid(KernelSet(features), self.kernel),
            "precision_lite0": precision,
            "recall_lite0": recall,
            "spread_lite0": spread(features, labels),
            "class_score_lite0": class_score(self.classifier.log_probabilities(features)),
            **self.accuracy(features, labels),
        }
        if self.inception:
            numbers["inception"] = self.inception.compare(pixels, real.pixels)
        return numbers

    def correct(self, features: Features, labels: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Whether the classifier assigns each image to its label, among the classes; None if it does not know them."""
        if self.imagenet is None:
            return None
        known = np.array([self.imagenet[int(label)] for label in labels], np.int64)
        return self.classifier.correct(features, known, [self.imagenet[c] for c in self.classes])

    def accuracy(self, features: Features, labels: NDArray[np.int64]) -> dict[str, float]:
        """The share of images that the classifier assigns to their label, if it knows the classes."""
        correct = self.correct(features, labels)
        return {} if correct is None else {"top1_lite0": float(correct.mean())}

    def real(self, count: int) -> dict[str, Any]:
        """Metrics of at most `count` held-out images, because metrics compare only at equal counts.

        All metrics of samples if there is a separate reference, else those that need none.
        """
        index = evenly(len(self.held_out.labels), count)
        pixels, features = self.held_out.pixels[index], self.held_out.features[index]
        labels = self.held_out.labels[index]
        if self.has_reference:
            return self.compare(pixels, features, labels)
        return {
            "images": len(features),
            "class_score_lite0": class_score(self.classifier.log_probabilities(features)),
            **self.accuracy(features, labels),
        }

    def sample_labels(self, samples: int) -> NDArray[np.int64]:
        """The label of each sample: the classes in turn."""
        return np.array([self.classes[i % len(self.classes)] for i in range(samples)], np.int64)

    def draw(self, subject: Subject, samples: int, params: SamplingParams) -> NDArray[np.uint8]:
        """Images uint8 [samples, 3, S, S] in the model's own size, classes in turn."""
        return subject.draw(self.sample_labels(samples).tolist(), params)

    def evaluate(self, subject: Subject, drawn: NDArray[np.uint8], params: SamplingParams) -> dict[str, Any]:
        """All metrics of one model, with its name and sampling settings. drawn: its samples, see `draw`."""
        of_samples, by_class = self.metrics_of(drawn)
        return {
            "name": subject.name,
            "fingerprint": subject.fingerprint,
            "image_size": subject.image_size,
            "engine": subject.engine,
            "sampling": described_sampling(params),
            "samples": of_samples,
            **self.reconstruction_and_latents(subject),
            **({} if by_class is None else {"top1_by_class": by_class}),
        }

    def sample_metrics(
        self, subject: Subject, samples: int, params: SamplingParams
    ) -> tuple[dict[str, Any], dict[str, float] | None]:
        """`metrics_of` images that a model draws for it."""
        return self.metrics_of(self.draw(subject, samples, params))

    def metrics_of(self, drawn: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, float] | None]:
        """The metrics of samples, see `draw`, and the class accuracy of each class."""
        samples = len(drawn)
        labels, drawn = self.sample_labels(samples), resized(drawn, self.size)
        features = self.classifier.features(drawn, "features of samples")
        numbers, correct = self.compare(drawn, features, labels), self.correct(features, labels)
        if correct is None:
            return numbers, None
        return numbers, {str(c): round(float(correct[labels == c].mean()), 4) for c in self.classes[:samples]}

    def reconstruction_and_latents(self, subject: Subject) -> dict[str, Any]:
        """Metrics of the latents of the held-out images, and of their reconstructions."""
        held = self.held_out
        latents = subject.encode(resized(held.pixels, subject.image_size))
        rebuilt = resized(subject.decode(latents), self.size)
        features = self.classifier.features(rebuilt, "features of reconstructions")
        reconstruction = {
            "images": len(rebuilt),
            "psnr": codec.psnr(held.pixels, rebuilt),
            "ssim": ssim(held.pixels, rebuilt),
            "frechet_lite0": frechet_to(features, moments(held.features)),
            **self.accuracy(features, held.labels),
        }
        return {
            "reconstruction": reconstruction,
            "latents": latent_statistics(latents) | self.probe(subject, latents),
        }

    def probe(self, subject: Subject, latents: NDArray[np.float32]) -> dict[str, Any]:
        """Accuracy of a linear probe, trained on the reference and tested on the held-out images.

        Without a separate reference it is trained and tested on parts of the held-out images. Empty, with a line in the
        log, if there are too few.
        """
        held, reference = self.held_out, self.reference
        if len(self.classes) < 2:
            return {}
        if self.has_reference:
            index = evenly(len(reference.labels), PROBE)
            encoded = subject.encode(resized(reference.pixels[index], subject.image_size))
            train, test = (encoded, reference.labels[index]), (latents, held.labels)
        else:
            train, test = ((latents[part], held.labels[part]) for part in split_every(len(latents)))
        try:
            accuracy = probe_accuracy(*train, *test)
        except InputError as error:
            log.warning("the accuracy of a linear probe is left out: %s", error)
            return {}
        return {"probe_top1": accuracy, "probe_train": len(train[0]), "probe_test": len(test[0])}


def at_equal_seeds(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], other: Subject) -> dict[str, float]:
    """How close the samples uint8 [N, 3, S, S] of a model are to those of another one, drawn for the same seeds.

    latent_psnr: both encoded by the other model, mean over the samples in dB; latent_psnr_tenth: of the tenth of them
    that is farthest, the closest; psnr: of pixels. Empty if the models draw in different sizes.
    """
    if ours.shape != theirs.shape:
        return {}
    distances = latent_psnr(other.encode(ours), other.encode(theirs))
    return {
        "latent_psnr": float(distances.mean()),
        "latent_psnr_tenth": float(np.quantile(distances, 0.1)),
        "psnr": codec.psnr(ours, theirs),
    }


def resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Square images uint8 [N, 3, S, S] at another size."""
    if pixels.shape[-1] == size:
        return pixels
    return np.stack([codec.resize(image, size) for image in pixels])


def evenly(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` indices below `count`, evenly spaced, because folders are sorted by class."""
    kept = min(count, limit)
    return np.arange(kept) * count // kept


def read_images(images: Images, classes: Sequence[int] | None, limit: int, sigma: float = 0.0) -> ImageSet:
    """At most `limit` images of these classes, decoded, and blurred if sigma is above 0; without features yet.

    classes: None for all images, whatever their labels.
    """
    kept = np.arange(len(images.labels)) if classes is None else np.flatnonzero(np.isin(images.labels, classes))
    subset = images.subset(kept[evenly(len(kept), limit)])
    subset.hold()
    for broken in subset.broken.values():
        log.warning("skipped %s", broken)
    subset = subset.readable()
    assert subset.pixels is not None
    pixels = blur(subset.pixels, sigma) if sigma else subset.pixels
    return ImageSet(Path(images.path).name, pixels, subset.labels, np.empty((0, 0), np.float32))


def common_classes(subjects: Sequence[Subject], real: Sequence[Images]) -> tuple[int, ...]:
    """The classes of all models and all image sets. A model without classes is compared with images of any class.

    Raises CheckpointError if there is none, or if one is called differently by two models.
    """
    if any(None in subject.classes.values() for subject in subjects):
        labels = {label for subject in subjects for label in subject.classes}
        if len(labels) > 1:
            raise CheckpointError("a model without classes compares only with another one, and the other has classes")
        return tuple(labels)
    groups = [set(subject.classes) for subject in subjects] + [set(images.labels.tolist()) for images in real]
    classes = sorted(set.intersection(*groups))
    if not classes:
        raise CheckpointError("there is no class that the models were trained on and that all image sets have")
    for label in classes:
        names = {str(c and c.name): subject.name for subject in subjects for c in [subject.classes[label]]}
        if len(names) > 1:
            (one, first), (other, second) = list(names.items())[:2]
            raise CheckpointError(
                f"the models must have the same classes, but {label} is {one} in {first} and {other} in {second}"
            )
    return tuple(classes)


def imagenet_labels(classes: Sequence[int], subjects: Sequence[Subject]) -> dict[int, int] | None:
    """The label in ImageNet-1k of each class, by its wnid; None if any has none. Without a model labels are those."""
    if not subjects:
        return {label: label for label in classes} if max(classes) < len(all_classes()) else None
    by_wnid = {c.wnid: c.index for c in all_classes()}
    found = {label: by_wnid.get(c.wnid) for label in classes if (c := subjects[0].classes[label])}
    known = {label: index for label, index in found.items() if index is not None}
    return known if len(known) == len(classes) else None
