"""dsd-eval: evaluate a model against real images.

dsd-eval MODEL --real IMAGES [--reference IMAGES] [--beside MODEL]
dsd-eval --real IMAGES --reference IMAGES --size S
dsd-eval --samples PLACE --statistics FILE.npz --inception WEIGHTS
dsd-eval MODEL --samples N --statistics FILE.npz --inception WEIGHTS

MODEL is a model directory or hf:org/name, which --engine runs, or the URL of a running server. --real are held-out
images, --reference (default: the same) the images that samples are compared with: a parquet file, a folder of them, or
a folder of images by class, as for training. The classes of a model are found in them by name.

  samples         against the reference: Frechet and kernel distance, precision, recall; class score, class accuracy
                  (the accuracy only where all classes have a wnid of ImageNet-1k)
  reconstruction  of --real: PSNR, SSIM, Frechet distance from the originals, class accuracy
  latents         of --real: effective rank, spread of channels, accuracy of a linear probe

Features are those of EfficientNet-Lite0, hence the suffix _lite0: this is not FID. --inception WEIGHTS adds FID, KID,
Inception score, precision and recall by torch-fidelity. The table also has the metrics of the real images of --real:
the floor, which no model can be expected to beat at the same count. Without MODEL only the floor is measured.

--beside measures a second model on the same images, at the larger size of the two and on their common classes; and how
far the samples of the first are from those of the second for the same seeds, as of a distilled model from its teacher.

--statistics gives FID, sFID and Inception score as papers state them, against mean and covariance of Inception features
(mu and sigma, or a reference batch of ADM). The samples are those of any model: a folder of images, an .npz file with
arr_0 or tar files, or N images of MODEL, its classes in turn. They are read in constant memory.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsd_serve import __version__
from dsd_serve.engines import ENGINE_NAMES
from dsd_serve.errors import DSDError, InputError, shown
from dsd_serve.files import atomic, sentence_of
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.precision import PRECISIONS
from training.classes import IMAGENET
from training.dataset import Images
from training.evaluation import against_statistics
from training.evaluation.classifier import FeatureCache, default_cache, lite0
from training.evaluation.distances import check_enough
from training.evaluation.evaluator import (
    LIMIT,
    Evaluator,
    at_equal_seeds,
    common_classes,
    imagenet_labels,
    read_images,
)
from training.evaluation.inception import Inception
from training.evaluation.report import table
from training.evaluation.sample_files import open_samples
from training.evaluation.subject import DrawnSamples, Subject, names_of, open_subject


def make_evaluator(options: argparse.Namespace, subjects: Sequence[Subject]) -> Evaluator:
    """Read the real images and compute their features."""
    size = options.size or max((subject.image_size for subject in subjects), default=0)
    if not size:
        raise InputError("without a model, --size must give the size in pixels at which images are compared")
    device = options.device if options.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    inception = Inception(options.inception, device) if options.inception else None
    classifier = lite0(device)
    cache = FeatureCache(None if options.no_cache else options.cache)
    names = names_of(subjects[0]) if subjects else None
    real = [Images(options.real, size, table=names, common=True)]
    if options.reference:
        real.append(Images(options.reference, size, table=real[0].table, common=True))
    classes = common_classes(subjects, real)
    imagenet = imagenet_labels(classes, subjects) if subjects or real[0].table == IMAGENET else None
    held = options.limit if subjects else min(options.limit, options.samples or options.limit)
    kept = classes if all(None not in subject.classes.values() for subject in subjects) else None
    sets = [
        read_images(images, kept, limit, sigma)
        for images, limit, sigma in zip(real, (held, options.limit), (options.blur, 0.0), strict=False)
    ]
    for one in sets:
        one.features = cache.features(classifier, one.pixels, f"features of {one.name}")
    return Evaluator(size, classes, sets[0], sets[-1], classifier, inception, imagenet)


def sampling_params(options: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The settings of the command line, else the model's recommendation."""
    given = {
        "num_steps": options.steps,
        "sampler": options.sampler,
        "guidance_scale": options.guidance,
        "guidance_start": options.guidance_start,
        "guidance_stop": options.guidance_stop,
    }
    return replace(defaults, seed=options.seed, **{key: value for key, value in given.items() if value is not None})


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All metrics that the command line requests, as the JSON file has them."""
    if isinstance(options.samples, str):
        raise InputError(
            f"--samples must be a whole number of 1 or more, got {shown(options.samples)}; samples from files need "
            "--statistics FILE.npz and --inception WEIGHTS"
        )
    if not options.real:
        raise InputError("give real images by --real, or published statistics by --statistics")
    if options.beside and not options.model:
        raise InputError("--beside needs a first model: dsd-eval MODEL --beside OTHER --real IMAGES")
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
    params = [sampling_params(options, subject.defaults) for subject in subjects]
    evaluator = make_evaluator(options, subjects)
    held, reference = evaluator.held_out, evaluator.reference
    samples = options.samples or len(held.labels)
    check_enough(samples, len(reference.labels))
    drawn = [evaluator.draw(subject, samples, p) for subject, p in zip(subjects, params, strict=True)]
    return {
        "size": evaluator.size,
        "classes": [] if any(None in subject.classes.values() for subject in subjects) else list(evaluator.classes),
        **named_classes(evaluator, subjects),
        "held_out": {"name": held.name, "images": len(held.labels), "blur": options.blur},
        "reference": {"name": reference.name, "images": len(reference.labels)},
        "real": evaluator.real(samples),
        "models": [evaluator.evaluate(*one) for one in zip(subjects, drawn, params, strict=True)],
        **({"equal_seeds": at_equal_seeds(drawn[0], drawn[1], subjects[1])} if len(subjects) > 1 else {}),
    }


def named_classes(evaluator: Evaluator, subjects: Sequence[Subject]) -> dict[str, Any]:
    """The names of the classes in their order, and a sentence about metrics that are left out."""
    found = [subjects[0].classes[label] for label in evaluator.classes] if subjects else []
    values: dict[str, Any] = {"class_names": [c.name for c in found if c]} if any(found) else {}
    if evaluator.imagenet is None:
        values["left_out"] = (
            "top1_lite0 is left out: the classifier has the classes of ImageNet-1k, but the model has others or none"
        )
    return values


def run_statistics(options: argparse.Namespace) -> dict[str, Any]:
    """The sheet of `--statistics`: samples of files, or of a model."""
    for name in ("real", "reference", "beside", "blur"):
        if getattr(options, name):
            raise InputError(f"--{name} compares with real images, which --statistics replaces; leave one of them out")
    if not options.inception:
        raise InputError("--statistics needs the Inception network: --inception WEIGHTS")
    if bool(options.model) == isinstance(options.samples, str):
        raise InputError(
            "--statistics needs samples: either --samples with a folder, an .npz or a .tar file, or a MODEL and "
            "--samples with a number"
        )
    device = options.device if options.device.startswith("cuda") and torch.cuda.is_available() else "cpu"
    measure = against_statistics.measure
    if options.model:
        subject = open_subject(
            options.model, options.engine, options.device, options.precision, os.environ.get("DSD_API_KEY", "")
        )
        drawn = DrawnSamples(subject, sampling_params(options, subject.defaults), options.samples or LIMIT)
        batches, total, describe = drawn.batches, drawn.count, drawn.describe
    else:
        files = open_samples(options.samples)
        batches, total, describe = files.batches, files.count, files.describe
    return measure(batches, total, describe, options.statistics, options.inception, device, options.size)


def count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return value


def number_or_place(text: str) -> int | str:
    return count(text) if text.isdecimal() or not text else text


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd-eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory, hf:org/name, or a server http://HOST:PORT"
    )
    parser.add_argument("--real", metavar="IMAGES", help="held-out real images")
    parser.add_argument("--reference", metavar="IMAGES", help="real images to compare samples with (default: --real)")
    parser.add_argument("--beside", metavar="MODEL", help="a second model, measured on the same images")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the numbers to")
    parser.add_argument("--inception", type=Path, metavar="WEIGHTS", help="add FID, with these Inception weights")
    parser.add_argument("--statistics", type=Path, metavar="FILE.npz", help="published statistics to compare with")
    drawing = parser.add_argument_group("samples")
    drawing.add_argument(
        "--samples",
        type=number_or_place,
        metavar="N|PLACE",
        help="number of images to draw and to take from --real (default: all of --real; with --statistics 50,000); or "
        "a folder, an .npz or a .tar file with samples of any model",
    )
    drawing.add_argument("--seed", type=int, default=1, help="seed of the noise (1)")
    drawing.add_argument(
        "--steps", type=int, help="steps of the sampler; this and the next flags default to the model's"
    )
    drawing.add_argument("--sampler", choices=SAMPLER_NAMES)
    drawing.add_argument("--guidance", type=float, metavar="SCALE")
    drawing.add_argument("--guidance-start", type=float, metavar="T", help="time from which guidance is on; 0 is noise")
    drawing.add_argument("--guidance-stop", type=float, metavar="T", help="time until which guidance is on; 1 is data")
    running = parser.add_argument_group("engine, or the server's API key in DSD_API_KEY")
    running.add_argument("--engine", choices=ENGINE_NAMES, default="onnx", help="engine that runs the network (onnx)")
    running.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    running.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="a precision of the exported model (fp32)"
    )
    real = parser.add_argument_group("real images")
    real.add_argument(
        "--size",
        type=count,
        metavar="S",
        help="compare images at S x S pixels (default: the model's, or the samples' own)",
    )
    real.add_argument("--limit", type=count, default=LIMIT, metavar="N", help=f"at most N images of each set ({LIMIT})")
    real.add_argument(
        "--blur", type=float, default=0.0, metavar="SIGMA", help="blur --real, to check that the distances rise"
    )
    real.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="cache for features of real images"
    )
    real.add_argument("--no-cache", action="store_true", help="compute the features of real images again")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_parser()
    options = parser.parse_args(arguments)
    try:
        numbers = run_statistics(options) if options.statistics else run(options)
        if options.output:
            with atomic(options.output) as temporary:
                temporary.write_text(json.dumps(rounded(numbers), indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        sys.exit("dsd-eval: stopped; finished features of real images stay cached")
    except DSDError as error:
        sys.exit(f"dsd-eval: {error}")
    except OSError as error:
        sys.exit(f"dsd-eval: {sentence_of(error)}")
    print(against_statistics.text(numbers) if options.statistics else table(numbers))


def rounded(value: Any) -> Any:
    """Plain values, with floats rounded to six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
