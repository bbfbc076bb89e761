"""The sampler study: quality against cost.

python -m studies.sampler_choice MODEL --real IMAGES --reference IMAGES

For each sampler, number of network evaluations, shift of the timesteps,
guidance scale and guidance interval it draws the same samples and measures

  latent PSNR                of the final latents against heun with 500 steps, same noise and guidance: sampler error
  frechet_lite0, kid_lite0   of the images against the reference, and classifier accuracy: quality

Each of five seeds draws a fifth of the samples. Metrics are means over the seeds, with their standard errors.
Cost is counted in rows: evaluations of the network per image, two with guidance. Writes samplers.json after every
setting, and samplers.png and samplers.md at the end. Rerun a stopped study to resume it; another network, other images
or other counts start a new one. --minutes 5 stops it after five.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.output import add_flag, output_of
from dsd_serve.checkpoint import ModelDir, read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines import Engine, load_engine
from dsd_serve.errors import DSDError, InputError
from dsd_serve.files import atomic
from dsd_serve.labels import table_of
from dsd_serve.params import SamplingParams, samplers_of, to_config
from dsd_serve.programs import run_all
from dsd_serve.rows import Decode, Program
from dsd_serve.samplers import SAMPLERS, guided, initial_noise
from studies import sampler_settings
from studies.sampler_report import document, draw, plus_minus
from studies.sampler_rule import mean_and_error, recommend, summarised
from studies.sampler_settings import SEEDS, Setting, settings_of
from training.dataset import Images
from training.evaluation.classifier import FeatureCache, Lite0, default_cache, lite0
from training.evaluation.distances import KernelSet, frechet_to, kid, moments
from training.evaluation.evaluator import LIMIT, ImageSet, evenly, read_images
from training.evaluation.main import count

log = logging.getLogger(__name__)

BATCH = 50  # programs in the engine at a time
DIGITS = {"frechet_lite0": 2, "kid_lite0": 5, "top1_lite0": 4}  # of the metrics, after the point
COMPARED = ("few", "samplers", "shift")  # the parts with latent PSNR


def program(config: ModelConfig, label: int, seed: int, index: int, setting: Setting) -> Program:
    """Draws one image; its result is latents float32 [L, C] and pixels uint8 [3, S, S]."""
    z = initial_noise(seed, index, config.latent_shape)
    denoise = guided({label: 1.0}, setting.params(seed), config.null_label)
    z = yield from SAMPLERS[setting.sampler](z, setting.timesteps, denoise)
    (pixels,) = yield [Decode(z)]
    return z, pixels


def sample(engine: Engine, setting: Setting, seed: int, labels: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents [N, L, C] and pixels [N, 3, S, S], image i from index i of the seed."""
    programs = [program(engine.config, label, seed, i, setting) for i, label in enumerate(labels)]
    pairs = [pair for i in range(0, len(programs), BATCH) for pair in run_all(engine, programs[i : i + BATCH])]
    return np.stack([z for z, _ in pairs]), np.stack([pixels for _, pixels in pairs])


def latent_psnr(latents: NDArray[Any], reference: NDArray[Any]) -> float:
    """10 log10 of the reference's mean square over that of the difference, in dB; at most 120."""
    error = float(np.square(latents.astype(np.float64) - reference).mean())
    energy = float(np.square(reference.astype(np.float64)).mean())
    return float(min(120.0, 10 * np.log10(energy / max(error, 1e-300))))


class Study:
    """Measures settings one by one, on one engine against one reference."""

    def __init__(self, engine: Engine, classifier: Lite0, real: ImageSet, counts: tuple[int, int], file: Path) -> None:
        """counts: samples per seed, and how many of the first seed's latents are compared with the reference's."""
        self.engine, self.classifier, self.file = engine, classifier, file
        self.moments, self.kernel = moments(real.features), KernelSet(real.features)
        (self.samples, self.compared) = counts
        self.classes = engine.config.trained_classes
        self.references: dict[Setting, NDArray[Any]] = {}

    def labels(self, count: int) -> list[int]:
        return [self.classes[i % len(self.classes)] for i in range(count)]

    def reference(self, setting: Setting) -> NDArray[Any]:
        """Latents of the 500-step reference, cached in memory and, while the study is unfinished, next to `file`."""
        exact = setting.reference
        if exact not in self.references:
            file = self.file.with_name(f".{self.file.stem}-{exact.key.replace(' ', '-')}.npy")
            if not file.exists():
                latents, _ = sample(self.engine, exact, SEEDS[0], self.labels(self.compared))
                with atomic(file) as temporary, temporary.open("wb") as out:
                    np.save(out, latents, allow_pickle=False)
            self.references[exact] = np.load(file, allow_pickle=False)
        return self.references[exact]

    def measure(self, setting: Setting, *, is_compared: bool) -> dict[str, Any]:
        """Metrics of one setting. is_compared: latent PSNR too, whose reference costs 999 evaluations per image."""
        labels = self.labels(self.samples)
        of_seeds: dict[str, list[float]] = {name: [] for name in DIGITS}
        numbers: dict[str, Any] = {**asdict(setting), "num_steps": setting.num_steps, "rows": setting.rows}
        for seed in SEEDS:
            latents, pixels = sample(self.engine, setting, seed, labels)
            features = self.classifier.features(pixels)
            correct = self.classifier.correct(features, np.array(labels), self.classes)
            of_seeds["frechet_lite0"].append(frechet_to(features, self.moments))
            of_seeds["kid_lite0"].append(kid(KernelSet(features), self.kernel))
            of_seeds["top1_lite0"].append(float(correct.mean()))
            if is_compared and seed == SEEDS[0]:
                reference = self.reference(setting)
                numbers["latent_psnr"] = round(latent_psnr(latents[: len(reference)], reference), 2)
        return numbers | summarised(of_seeds, DIGITS)


def conditions_of(options: argparse.Namespace, model: ModelDir, engine: Engine, real: Any) -> dict[str, Any]:
    """The conditions of the results; different ones start a new study.

    What the model recommends is not one of them: it follows the study, and only names settings to measure.
    """
    return {
        "network": replace(model, defaults=SamplingParams()).fingerprint(),
        "engine": engine.describe(),
        "samplers": list(samplers_of(engine.config.flow_map)),
        "seeds": list(SEEDS),
        "samples": options.samples,
        "compared": options.compared,
        "classes": len(engine.config.trained_classes),
        "reference_steps": sampler_settings.REFERENCE_STEPS,
        "real": real,
    }


def load(file: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The study so far, or an empty one if the file holds none under these conditions."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["conditions"] == conditions:
            return dict(values)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    for old in file.parent.glob(f".{file.stem}-*.npy"):  # references of another network
        old.unlink()
    return {"conditions": conditions, "model": {}, "parts": {}, "results": {}}


def save(file: Path, values: dict[str, Any]) -> None:
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def measure_missing(study: Study, values: dict[str, Any], minutes: float) -> int:
    """Measure missing settings until the time is up; returns how many are left."""
    parts = settings_of(values["model"]["defaults"], values["conditions"]["samplers"])
    values["parts"] = {name: [setting.key for setting in settings] for name, settings in parts.items()}
    compared = {setting for name in COMPARED for setting in parts[name]}
    settings = {s for part in parts.values() for s in part if s.key not in values["results"]}
    missing = sorted(settings, key=lambda s: (s.rows, s.key))  # cheap ones first: a stopped study has more of them
    deadline = time.monotonic() + 60 * minutes
    for number, setting in enumerate(missing):
        if time.monotonic() > deadline:
            return len(missing) - number
        result = study.measure(setting, is_compared=setting in compared)
        values["results"][setting.key] = result
        save(study.file, values)
        log.info("%d of %d: %s: %s", number + 1, len(missing), setting.key, summary(result))
    return 0


def summary(result: Mapping[str, Any]) -> str:
    psnr = f"{result['latent_psnr']:.1f} dB, " if "latent_psnr" in result else ""
    distance = plus_minus(result, "frechet_lite0", ".1f")
    return f"{psnr}frechet_lite0 {distance}, top1 {plus_minus(result, 'top1_lite0', '.1%')}"


def read_sets(options: argparse.Namespace, config: ModelConfig, classifier: Lite0) -> tuple[ImageSet, dict[str, Any]]:
    """The reference, and the metrics of as many real images as a seed draws against it: the floor."""
    if not table_of(config).is_imagenet:
        raise InputError("the study needs a model of ImageNet-1k's classes, because its classifier knows no others")
    sets, cache = [], FeatureCache(options.cache)
    for path in (options.real, options.reference):
        images = Images(path, config.image_size)
        if missing := set(config.trained_classes) - set(images.labels.tolist()):
            raise InputError(f"{path} has no images of class {min(missing)}, which the model draws")
        limit = options.samples if path == options.real else LIMIT
        one = read_images(images, config.trained_classes, limit)
        one.features = cache.features(classifier, one.pixels, f"features of {one.name}")
        sets.append(one)
    held, reference = sets
    groups = split(held.labels, options.samples // len(SEEDS))
    target = moments(reference.features)
    correct = classifier.correct(held.features, held.labels, config.trained_classes)
    distance, error = mean_and_error([frechet_to(held.features[group], target) for group in groups])
    return reference, {
        "images": len(groups[0]),
        "sets": len(groups),
        "reference_images": len(reference.labels),
        "frechet_lite0": round(distance, 2),
        "frechet_lite0_error": round(error, 2),
        "top1_lite0": round(float(np.mean([correct[group].mean() for group in groups])), 4),
    }


def split(labels: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
    """Indices of disjoint sets of `count` images, with all classes alike: one for each seed, or as many as there are.

    With fewer images than `count` they are one set.
    """
    by_class = np.argsort(labels, kind="stable")
    number = max(1, min(len(SEEDS), len(labels) // count))
    groups = [by_class[first::number] for first in range(number)]
    return [group[evenly(len(group), count)] for group in groups]


def check_counts(options: argparse.Namespace) -> None:
    number = len(SEEDS)
    if options.samples % number or options.samples < 2 * number:
        raise InputError(
            f"--samples must be a multiple of {number} and at least {2 * number}, because each of {number} seeds draws "
            f"as many, got {options.samples}"
        )
    if options.compared > options.samples // number:
        raise InputError(
            f"--compared must be at most the samples of one seed, {options.samples // number}, got {options.compared}"
        )


def run(options: argparse.Namespace) -> int:
    """Run or resume the study; returns how many settings are left."""
    check_counts(options)
    engine, classifier = load_engine("onnx", options.model), lite0()
    model = read_model_dir(options.model)
    real, floor = read_sets(options, engine.config, classifier)
    output = output_of(options)
    file = output.results / "samplers.json"
    values = load(file, conditions_of(options, model, engine, floor))
    values["model"] = {"name": model.name, "fingerprint": model.fingerprint(), "defaults": to_config(model.defaults)}
    study = Study(engine, classifier, real, (options.samples // len(SEEDS), options.compared), file)
    left = measure_missing(study, values, options.minutes)
    if not left:
        measured = [values["results"][key] for part in values["parts"].values() for key in part]
        values["recommended"] = recommend(measured, floor["frechet_lite0"])
        for old in output.results.glob(f".{file.stem}-*.npy"):
            old.unlink()
    save(file, values)
    draw(values, output.pages / "samplers.png")
    (output.pages / "samplers.md").write_text(document(values), encoding="utf-8")
    return left


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.sampler_choice", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model directory")
    parser.add_argument("--real", required=True, metavar="IMAGES", help="held-out real images: the floor")
    parser.add_argument("--reference", required=True, metavar="IMAGES", help="real images to compare samples with")
    add_flag(parser, "studies/results")
    parser.add_argument(
        "--samples", type=count, default=1000, help="images per setting, a fifth from each seed (default 1000)"
    )
    parser.add_argument(
        "--compared",
        type=count,
        default=20,
        help="how many of the first seed's are compared with 500 steps (default 20)",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time; rerun to resume")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="cache for features of real images"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        left = run(options)
    except KeyboardInterrupt:
        sys.exit("sampler_choice: stopped; rerun to resume")
    except (DSDError, OSError) as error:
        sys.exit(f"sampler_choice: {error}")
    if left:
        sys.exit(f"sampler_choice: {left} settings are left; rerun to resume")
    log.info("%s is written", output_of(options).pages / "samplers.md")


if __name__ == "__main__":
    main()
