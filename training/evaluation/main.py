"""dsd-eval MODEL --real IMAGES [--reference IMAGES] [--beside MODEL]
dsd-eval --real IMAGES --reference IMAGES --size S

What a model is worth. MODEL is a model directory, which --engine runs, or the URL of a running server. --real are
images that it was not trained on, --reference (default: the same) those that samples are held against: a parquet
file, a folder of them or of images in folders by class, as for training.

  samples         against the reference: Frechet and kernel distance, precision, recall; class score, class accuracy
  reconstruction  of --real: PSNR, SSIM, Frechet distance from the originals, class accuracy
  latents         of --real: effective rank, spread of channels, what a linear probe finds in them

The features are those of EfficientNet-Lite0, so the names end in _lite0: this is not FID. With --inception WEIGHTS,
FID and its kin are measured too, by torch-fidelity. Beside the model stands what the images of --real get against
the reference, the floor: no model can be expected below it at the same count. Without MODEL only that is measured.

--beside measures a second model on the same images, at the larger size of the two and in the classes of both.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_serve import __version__
from dsd_serve.engines import ENGINE_NAMES
from dsd_serve.errors import CheckpointError, DSDError, InputError
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.precision import PRECISIONS
from training.evaluation.classifier import FeatureCache, Features, Lite0, default_cache, lite0
from training.evaluation.distances import KernelSet, blur, class_score, frechet_to, kid, moments, precision_recall, ssim
from training.evaluation.inception import Inception
from training.evaluation.probe import latent_statistics, probe_accuracy, split_every
from training.evaluation.report import sheet
from training.evaluation.subject import Subject, open_subject
from training.sources import Images

LIMIT = 50_000  # images of a set that are looked at, as many as FID is usually given
PROBE = 5_000  # images that the linear probe learns from at most


@dataclass
class RealSet:
    """Real images uint8 [N, 3, S, S], their labels int64 [N] and features [N, 1280]. name: of the file or folder."""

    name: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    features: Features


@dataclass
class Yardstick:
    """What models are measured with: images that are new to them, a reference, the classes and the networks."""

    size: int
    classes: tuple[int, ...]
    held_out: RealSet
    reference: RealSet
    classifier: Lite0
    inception: Inception | None = None

    def __post_init__(self) -> None:
        self.moments = moments(self.reference.features)
        self.kernel = KernelSet(self.reference.features)

    @property
    def has_reference(self) -> bool:
        return self.reference is not self.held_out

    def compare(self, pixels: NDArray[np.uint8], features: Features, labels: NDArray[np.int64]) -> dict[str, Any]:
        """All numbers of images against the reference, with the counts of both sides."""
        real = self.reference
        precision, recall = precision_recall(features, real.features)
        numbers: dict[str, Any] = {
            "pictures": len(features),
            "reference_pictures": len(real.features),
            "frechet_lite0": frechet_to(features, self.moments),
            "kid_lite0": kid(KernelSet(features), self.kernel),
            "precision_lite0": precision,
            "recall_lite0": recall,
            "class_score_lite0": class_score(self.classifier.log_probabilities(features)),
            "top1_lite0": self.accuracy(features, labels),
        }
        if self.inception:
            numbers["inception"] = self.inception.compare(pixels, real.pixels)
        return numbers

    def accuracy(self, features: Features, labels: NDArray[np.int64]) -> float:
        """How often the classifier finds the label among the classes."""
        return float(self.classifier.found(features, labels, self.classes).mean())

    def real(self, count: int) -> dict[str, Any]:
        """What held-out images get, `count` of them if there are so many, for numbers compare at one count only.

        With a reference of its own all that samples get, else what needs none.
        """
        some = evenly(len(self.held_out.labels), count)
        pixels, features = self.held_out.pixels[some], self.held_out.features[some]
        labels = self.held_out.labels[some]
        if self.has_reference:
            return self.compare(pixels, features, labels)
        return {
            "pictures": len(features),
            "class_score_lite0": class_score(self.classifier.log_probabilities(features)),
            "top1_lite0": self.accuracy(features, labels),
        }


def resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Square images uint8 [N, 3, S, S] at another size."""
    if pixels.shape[-1] == size:
        return pixels
    return np.stack([codec.resize(image, size) for image in pixels])


def evaluate(subject: Subject, yardstick: Yardstick, samples: int, params: SamplingParams) -> dict[str, Any]:
    """All numbers of one model, with its name and how it was sampled. samples: how many; the classes take turns."""
    labels = np.array([yardstick.classes[i % len(yardstick.classes)] for i in range(samples)], np.int64)
    drawn = resized(subject.draw(labels.tolist(), params), yardstick.size)
    features = yardstick.classifier.features(drawn, "features of samples")
    right = yardstick.classifier.found(features, labels, yardstick.classes)
    sampling = ("seed", "num_steps", "sampler", "guidance_scale", "guidance_start", "guidance_stop")
    return {
        "name": subject.name,
        "fingerprint": subject.fingerprint,
        "image_size": subject.image_size,
        "engine": subject.engine,
        "sampling": {key: getattr(params, key) for key in sampling},
        "samples": yardstick.compare(drawn, features, labels),
        **reconstruction_and_latents(subject, yardstick),
        "top1_by_class": {str(c): round(float(right[labels == c].mean()), 4) for c in yardstick.classes[:samples]},
    }


def reconstruction_and_latents(subject: Subject, yardstick: Yardstick) -> dict[str, Any]:
    held = yardstick.held_out
    latents = subject.encode(resized(held.pixels, subject.image_size))
    rebuilt = resized(subject.decode(latents), yardstick.size)
    features = yardstick.classifier.features(rebuilt, "features of reconstructions")
    reconstruction = {
        "pictures": len(rebuilt),
        "psnr": codec.psnr(held.pixels, rebuilt),
        "ssim": ssim(held.pixels, rebuilt),
        "frechet_lite0": frechet_to(features, moments(held.features)),
        "top1_lite0": yardstick.accuracy(features, held.labels),
    }
    return {
        "reconstruction": reconstruction,
        "latents": latent_statistics(latents) | probe(subject, yardstick, latents),
    }


def probe(subject: Subject, yardstick: Yardstick, latents: NDArray[np.float32]) -> dict[str, Any]:
    """A linear probe that learns from the reference and is tried on the held-out images, or on a part of these."""
    held, reference = yardstick.held_out, yardstick.reference
    if len(yardstick.classes) < 2:
        return {}
    if yardstick.has_reference:
        some = evenly(len(reference.labels), PROBE)
        learnt = subject.encode(resized(reference.pixels[some], subject.image_size))
        train, test = (learnt, reference.labels[some]), (latents, held.labels)
    else:
        train, test = ((latents[part], held.labels[part]) for part in split_every(len(latents)))
    accuracy = probe_accuracy(*train, *test)
    return {"probe_top1": accuracy, "probe_train": len(train[0]), "probe_test": len(test[0])}


def evenly(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` indices below `count`, spread evenly: a folder is sorted by class."""
    kept = min(count, limit)
    return np.arange(kept) * count // kept


def open_images(path: str, size: int) -> Images:
    """The images at a path, before any is decoded."""
    return Images(path, size)


def read_real(images: Images, classes: Sequence[int], limit: int, sigma: float = 0.0) -> RealSet:
    """The images of some classes, at most `limit`, decoded and perhaps blurred; their features are yet to come."""
    kept = np.flatnonzero(np.isin(images.labels, classes))
    chosen = images.subset(kept[evenly(len(kept), limit)])
    chosen.hold()
    assert chosen.pixels is not None
    pixels = blur(chosen.pixels, sigma) if sigma else chosen.pixels
    return RealSet(Path(images.path).name, pixels, chosen.labels, np.empty((0, 0), np.float32))


def common_classes(subjects: Sequence[Subject], real: Sequence[Images]) -> tuple[int, ...]:
    """The classes that all models were trained on and all image sets hold."""
    groups = [set(subject.classes) for subject in subjects] + [set(images.labels.tolist()) for images in real]
    classes = sorted(set.intersection(*groups))
    if not classes:
        raise CheckpointError("there is no class that the models were trained on and that all the images have")
    return tuple(classes)


def make_yardstick(options: argparse.Namespace, subjects: Sequence[Subject]) -> Yardstick:
    """Read and look at the real images."""
    size = options.size or max((subject.image_size for subject in subjects), default=0)
    if not size:
        raise InputError("without a model, --size must say at how many pixels images are compared")
    device = options.device if options.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    inception = Inception(options.inception, device) if options.inception else None
    classifier = lite0(device)
    cache = FeatureCache(None if options.no_cache else options.cache)
    real = [open_images(path, size) for path in (options.real, options.reference) if path]
    classes = common_classes(subjects, real)
    held = options.limit if subjects else min(options.limit, options.samples or options.limit)
    sets = [
        read_real(images, classes, limit, sigma)
        for images, limit, sigma in zip(real, (held, options.limit), (options.blur, 0.0), strict=False)
    ]
    for one in sets:
        one.features = cache.features(classifier, one.pixels, f"features of {one.name}")
    return Yardstick(size, classes, sets[0], sets[-1], classifier, inception)


def chosen_params(options: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """What the command line says, else the model's recommendation."""
    given = {
        "num_steps": options.steps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance,
        "guidance_start": options.guidance_start,
        "guidance_stop": options.guidance_stop,
    }
    return replace(defaults, seed=options.seed, **{key: value for key, value in given.items() if value is not None})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Carry out the command line."""
    if options.beside and not options.model:
        raise InputError("--beside needs a model to stand beside: dsd-eval MODEL --beside OTHER --real IMAGES")
    if not options.model and not options.reference:
        raise InputError("there is nothing to compare: give a model, or --reference with other real images")
    if options.blur and options.model:
        raise InputError("--blur is for real images against real ones, without a model")
    key = os.environ.get("DSD_API_KEY", "")
    subjects = [
        open_subject(place, options.engine, options.device, options.precision, key)
        for place in (options.model, options.beside)
        if place
    ]
    params = [chosen_params(options, subject.defaults) for subject in subjects]
    yardstick = make_yardstick(options, subjects)
    held, reference = yardstick.held_out, yardstick.reference
    samples = options.samples or len(held.labels)
    return {
        "size": yardstick.size,
        "classes": list(yardstick.classes),
        "held_out": {"name": held.name, "pictures": len(held.labels), "blur": options.blur},
        "reference": {"name": reference.name, "pictures": len(reference.labels)},
        "real": yardstick.real(samples),
        "models": [evaluate(subject, yardstick, samples, p) for subject, p in zip(subjects, params, strict=True)],
    }


def count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return value


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model directory, or http://HOST:PORT of a server")
    parser.add_argument("--real", required=True, metavar="IMAGES", help="real images that are new to the model")
    parser.add_argument("--reference", metavar="IMAGES", help="what samples are compared with (default: --real)")
    parser.add_argument("--beside", metavar="MODEL", help="a second model, measured on the same images")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON file for the numbers")
    parser.add_argument("--inception", type=Path, metavar="WEIGHTS", help="measure FID too, with these weights")
    drawing = parser.add_argument_group("samples")
    drawing.add_argument("--samples", type=count, metavar="N", help="of the model, and of --real (default: all of it)")
    drawing.add_argument("--seed", type=int, default=1)
    drawing.add_argument("--steps", type=int, help="this and the following: default, the model's recommendation")
    drawing.add_argument("--sampler", choices=SAMPLER_NAMES)
    drawing.add_argument("--guidance", type=float, metavar="SCALE")
    drawing.add_argument("--guidance-start", type=float, metavar="T", help="time from which guidance is on (0)")
    drawing.add_argument("--guidance-stop", type=float, metavar="T", help="time until which guidance is on (1)")
    running = parser.add_argument_group("running; a server that wants a key gets DSD_API_KEY")
    running.add_argument("--engine", choices=ENGINE_NAMES, default="onnx")
    running.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    running.add_argument("--precision", choices=PRECISIONS, default="fp32")
    real = parser.add_argument_group("real images")
    real.add_argument("--size", type=count, metavar="S", help="pixels at which all is compared (default: the model's)")
    real.add_argument("--limit", type=count, default=LIMIT, metavar="N", help=f"of each set at most N ({LIMIT})")
    real.add_argument("--blur", type=float, default=0.0, metavar="SIGMA", help="blur --real, to see the numbers rise")
    real.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="keeps features of real images"
    )
    real.add_argument("--no-cache", action="store_true")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser()
    options = parser.parse_args(arguments)
    try:
        numbers = run(options)
        if options.output:
            with atomic(options.output) as temporary:
                temporary.write_text(json.dumps(rounded(numbers), indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        sys.exit("dsd-eval: stopped; the features of real images that were ready are kept")
    except (DSDError, OSError) as error:
        sys.exit(f"dsd-eval: {error}")
    print(sheet(numbers))


def rounded(value: Any) -> Any:
    """Plain values with floats at six digits: the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
