"""The sampler study: quality against cost.

python -m studies.sampler_choice MODEL --real IMAGES --reference IMAGES

For each sampler, number of network evaluations, shift of the timesteps,
guidance scale and guidance interval it draws the same samples and measures

  latent PSNR                of the final latents against heun with 500 steps, same noise and guidance: sampler error
  frechet_lite0, kid_lite0   of the images against the reference, and classifier accuracy: quality

Cost is counted in rows: evaluations of the network per image, two with guidance. Writes samplers.json after every
setting, and samplers.png and samplers.md at the end. Rerun a stopped study to resume it; another model, other images or
other counts start a new one. --minutes 5 stops it after five.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.output import add_flag, output_of
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines import Engine, load_engine
from dsd_serve.errors import DSDError, InputError
from dsd_serve.files import atomic
from dsd_serve.labels import table_of
from dsd_serve.programs import run_all
from dsd_serve.rows import Decode, Program
from dsd_serve.samplers import SAMPLERS, guided, initial_noise
from studies import sampler_settings
from studies.sampler_report import document, draw
from studies.sampler_settings import SEED, Setting, settings_of
from training.dataset import Images
from training.evaluation.classifier import FeatureCache, Lite0, default_cache, lite0
from training.evaluation.distances import KernelSet, frechet_to, kid, moments
from training.evaluation.evaluator import LIMIT, ImageSet, read_images
from training.evaluation.main import count

log = logging.getLogger(__name__)

BATCH = 50  # programs in the engine at a time


def program(config: ModelConfig, label: int, index: int, setting: Setting) -> Program:
    """Draws one image; its result is latents float32 [L, C] and pixels uint8 [3, S, S]."""
    z = initial_noise(SEED, index, config.latent_shape)
    denoise = guided({label: 1.0}, setting.params, config.null_label)
    z = yield from SAMPLERS[setting.sampler](z, setting.timesteps, denoise)
    (pixels,) = yield [Decode(z)]
    return z, pixels


def sample(engine: Engine, setting: Setting, labels: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents [N, L, C] and pixels [N, 3, S, S], image i from index i of the seed."""
    programs = [program(engine.config, label, i, setting) for i, label in enumerate(labels)]
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
        """counts: samples per setting, and how many of their latents are compared with the reference's."""
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
                latents, _ = sample(self.engine, exact, self.labels(self.compared))
                with atomic(file) as temporary, temporary.open("wb") as out:
                    np.save(out, latents, allow_pickle=False)
            self.references[exact] = np.load(file, allow_pickle=False)
        return self.references[exact]

    def measure(self, setting: Setting, *, is_compared: bool) -> dict[str, Any]:
        """Metrics of one setting. is_compared: latent PSNR too, whose reference costs 999 evaluations per image."""
        began = time.perf_counter()
        labels = self.labels(self.samples)
        latents, pixels = sample(self.engine, setting, labels)
        seconds = time.perf_counter() - began
        features = self.classifier.features(pixels)
        correct = self.classifier.correct(features, np.array(labels), self.classes)
        numbers = {
            **asdict(setting),
            "num_steps": setting.num_steps,
            "rows": setting.rows,
            "frechet_lite0": round(frechet_to(features, self.moments), 2),
            "kid_lite0": round(kid(KernelSet(features), self.kernel), 5),
            "top1_lite0": round(float(correct.mean()), 4),
            "seconds": round(seconds, 1),
        }
        if is_compared:
            reference = self.reference(setting)
            numbers["latent_psnr"] = round(latent_psnr(latents[: len(reference)], reference), 2)
        return numbers


def recommend(results: Mapping[str, Mapping[str, Any]], samples: int, floor: float) -> dict[str, Any]:
    """The cheapest setting whose quality cannot be told from the best one's at this number of samples.

    floor: frechet_lite0 of as many real images. Candidates have even steps, and exceed the floor by at most 5 % more
    than the best of them; their class accuracy is within two standard errors of the best candidate's.
    """
    even = [r for r in results.values() if r["shift"] == 1]
    least = min(r["frechet_lite0"] for r in even)
    near = [r for r in even if r["frechet_lite0"] - floor <= 1.05 * max(least - floor, 0)]
    near = near or [r for r in even if r["frechet_lite0"] == least]
    accuracy = max(r["top1_lite0"] for r in near)
    error = 2 * (accuracy * (1 - accuracy) / samples) ** 0.5
    good = [r for r in near if r["top1_lite0"] >= accuracy - error]
    return dict(min(good, key=lambda r: (r["rows"], r["frechet_lite0"])))


def conditions_of(options: argparse.Namespace, engine: Engine, real: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions of the results; different ones start a new study."""
    model = read_model_dir(options.model)
    defaults = model.defaults
    return {
        "model": model.name,
        "fingerprint": model.fingerprint(),
        "engine": engine.describe(),
        "defaults": {k: getattr(defaults, k) for k in ("sampler", "num_steps", "guidance_scale")},
        "seed": SEED,
        "samples": options.samples,
        "compared": options.compared,
        "classes": len(engine.config.trained_classes),
        "reference_steps": sampler_settings.REFERENCE_STEPS,
        "real": dict(real),
    }


def load(file: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The study so far, or an empty one if the file holds none under these conditions."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["conditions"] == conditions:
            return dict(values)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    for old in file.parent.glob(f".{file.stem}-*.npy"):  # references of another model
        old.unlink()
    return {"conditions": conditions, "parts": {}, "results": {}}


def save(file: Path, values: dict[str, Any]) -> None:
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def measure_missing(study: Study, values: dict[str, Any], minutes: float) -> int:
    """Measure missing settings until the time is up; returns how many are left."""
    parts = settings_of(values["conditions"]["defaults"])
    values["parts"] = {name: [setting.key for setting in settings] for name, settings in parts.items()}
    compared = {setting for name in ("samplers", "shift") for setting in parts[name]}
    missing = [s for s in dict.fromkeys(s for part in parts.values() for s in part) if s.key not in values["results"]]
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
    return f"{psnr}frechet_lite0 {result['frechet_lite0']:.1f}, top1 {result['top1_lite0']:.1%}"


def read_sets(options: argparse.Namespace, config: ModelConfig, classifier: Lite0) -> tuple[ImageSet, dict[str, Any]]:
    """The reference, and the metrics of as many real images as samples against it: the floor."""
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
    correct = classifier.correct(held.features, held.labels, config.trained_classes)
    return reference, {
        "pictures": len(held.labels),
        "reference_pictures": len(reference.labels),
        "frechet_lite0": round(frechet_to(held.features, moments(reference.features)), 2),
        "top1_lite0": round(float(correct.mean()), 4),
    }


def run(options: argparse.Namespace) -> int:
    """Run or resume the study; returns how many settings are left."""
    if options.compared > options.samples:
        raise InputError(f"--compared must be at most --samples, got {options.compared} and {options.samples}")
    engine, classifier = load_engine("onnx", options.model), lite0()
    real, floor = read_sets(options, engine.config, classifier)
    output = output_of(options)
    file = output.results / "samplers.json"
    values = load(file, conditions_of(options, engine, floor))
    study = Study(engine, classifier, real, (options.samples, options.compared), file)
    left = measure_missing(study, values, options.minutes)
    if not left:
        values["recommended"] = recommend(values["results"], options.samples, floor["frechet_lite0"])
        save(file, values)
        for old in output.results.glob(f".{file.stem}-*.npy"):
            old.unlink()
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
    parser.add_argument("--samples", type=count, default=200, help="images per setting (default 200)")
    parser.add_argument(
        "--compared", type=count, default=20, help="how many of them are compared with 500 steps (default 20)"
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
