"""python -m studies.sampler_choice MODEL --real IMAGES --reference IMAGES

The sampler study: what quality costs. For each sampler, number of network evaluations, shift of the timesteps,
guidance scale and guidance interval it draws the same samples and measures

  latent PSNR     of the final latents from those of heun with 500 steps, same noise, same guidance: the sampler's error
  frechet_lite0, kid_lite0   of the images from the reference, and how often a classifier finds their class: quality

Cost is counted in rows: evaluations of the network for one image, a guided one as two. Writes samplers.json after
every setting, and at the end samplers.png and samplers.md; a stopped study goes on where it was, and another model,
other images or other counts begin a new one. --minutes 5 stops it after five.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import run_all
from dsd_serve.rows import Decode, Program
from dsd_serve.samplers import SAMPLERS, guided, initial_noise, num_rows, timesteps
from studies.sampler_report import document, draw
from training.evaluation.classifier import FeatureCache, Lite0, default_cache, lite0
from training.evaluation.distances import KernelSet, frechet_to, kid, moments
from training.evaluation.main import LIMIT, RealSet, count, read_real
from training.sources import Images

log = logging.getLogger(__name__)

BATCH = 50  # programs that go through the engine together

REFERENCE_STEPS = 500
EVALUATIONS = (5, 9, 19, 39)  # of the network, without guidance: what heun takes for 3, 5, 10 and 20 steps
SHIFTS = (0.5, 2.0)  # beside 1, which is even steps
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)
INTERVALS = ((0.0, 0.75), (0.1, 1.0), (0.25, 1.0))
MANY = 19  # evaluations at which guidance is studied
SEED = 1


@dataclass(frozen=True)
class Setting:
    """How images are drawn. shift s: times t become t / (t + s (1 - t)), so above 1 more steps are noisy ones."""

    sampler: str
    evaluations: int
    guidance_scale: float
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    shift: float = 1.0

    @property
    def num_steps(self) -> int:
        """heun evaluates twice in all steps but the last."""
        return (self.evaluations + 1) // 2 if self.sampler == "heun" else self.evaluations

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            seed=SEED,
            num_steps=self.num_steps,
            sampler=self.sampler,
            guidance_scale=self.guidance_scale,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
        )

    @property
    def timesteps(self) -> list[float]:
        return [shifted(t, self.shift) for t in timesteps(self.num_steps)]

    @property
    def rows(self) -> int:
        """Rows of the network for one image."""
        return num_rows(self.params, self.timesteps)

    @property
    def key(self) -> str:
        interval = f"{self.guidance_start:g}-{self.guidance_stop:g}"
        return f"{self.sampler} {self.evaluations} shift {self.shift:g} guidance {self.guidance_scale:g} {interval}"

    @property
    def reference(self) -> "Setting":
        """What its latents are compared with: the same guidance, all but without error of the sampler."""
        return replace(self, sampler="heun", evaluations=2 * REFERENCE_STEPS - 1, shift=1.0)


def shifted(t: float, shift: float) -> float:
    """The shift of Stable Diffusion 3 (arXiv 2403.03206) for t = 0 noise: 1 leaves t as it is, 0 and 1 stay."""
    return t / (t + shift * (1 - t)) if t else 0.0


def default_setting(defaults: Mapping[str, Any]) -> Setting:
    """The model's own recommendation."""
    steps = defaults["num_steps"]
    evaluations = 2 * steps - 1 if defaults["sampler"] == "heun" else steps
    return Setting(defaults["sampler"], evaluations, defaults["guidance_scale"])


def settings_of(defaults: Mapping[str, Any]) -> dict[str, list[Setting]]:
    """The study, by part. What parts share is measured once."""
    default_guidance = defaults["guidance_scale"] if defaults["guidance_scale"] > 1 else 2.0
    guidance = [1.0, default_guidance]
    best = Setting("heun", MANY, default_guidance)
    return {
        "default": [default_setting(defaults)],
        "samplers": [Setting(s, n, g) for g in guidance for s in SAMPLER_NAMES for n in EVALUATIONS],
        "guidance": [replace(best, guidance_scale=g) for g in sorted({*GUIDANCE, default_guidance})],
        "interval": [best]
        + [
            replace(best, guidance_scale=g, guidance_start=start, guidance_stop=stop)
            for g in (default_guidance, default_guidance + 1)
            for start, stop in INTERVALS
        ],
        "shift": [
            replace(best, sampler=sampler, evaluations=n, shift=shift)
            for sampler in ("heun", "dpmpp_2m")
            for n in EVALUATIONS[1:3]
            for shift in sorted((*SHIFTS, 1.0))
        ],
    }


def program(config: ModelConfig, label: int, index: int, setting: Setting) -> Program:
    """Draw one image: its latents float32 [L, C] and its pixels uint8 [3, S, S]."""
    z = initial_noise(SEED, index, config.latent_shape)
    denoise = guided({label: 1.0}, setting.params, config.null_label)
    z = yield from SAMPLERS[setting.sampler](z, setting.timesteps, denoise)
    (pixels,) = yield [Decode(z)]
    return z, pixels


def sample(engine: Engine, setting: Setting, labels: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Latents [N, L, C] and pixels [N, 3, S, S], image i from index i of the seed."""
    made = [program(engine.config, label, i, setting) for i, label in enumerate(labels)]
    drawn = [pair for begin in range(0, len(made), BATCH) for pair in run_all(engine, made[begin : begin + BATCH])]
    return np.stack([z for z, _ in drawn]), np.stack([pixels for _, pixels in drawn])


def latent_psnr(latents: NDArray[Any], reference: NDArray[Any]) -> float:
    """10 log10 of the reference's mean square over that of the difference, in dB; at most 120."""
    error = float(np.square(latents.astype(np.float64) - reference).mean())
    energy = float(np.square(reference.astype(np.float64)).mean())
    return float(min(120.0, 10 * np.log10(energy / max(error, 1e-300))))


class Study:
    """Measures settings, one after the other, and keeps what it found in a file."""

    def __init__(self, engine: Engine, classifier: Lite0, real: RealSet, counts: tuple[int, int], file: Path) -> None:
        """counts: samples of a setting, and those of them whose latents are compared with the reference's."""
        self.engine, self.classifier, self.file = engine, classifier, file
        self.moments, self.kernel = moments(real.features), KernelSet(real.features)
        (self.samples, self.compared) = counts
        self.classes = engine.config.trained_classes
        self.references: dict[Setting, NDArray[Any]] = {}

    def labels(self, count: int) -> list[int]:
        return [self.classes[i % len(self.classes)] for i in range(count)]

    def reference(self, setting: Setting) -> NDArray[Any]:
        """The latents of the 500-step reference, kept while the study runs and beside its file."""
        wanted = setting.reference
        if wanted not in self.references:
            file = self.file.with_name(f".{self.file.stem}-{wanted.key.replace(' ', '-')}.npy")
            if not file.exists():
                latents, _ = sample(self.engine, wanted, self.labels(self.compared))
                with atomic(file) as temporary, temporary.open("wb") as out:
                    np.save(out, latents, allow_pickle=False)
            self.references[wanted] = np.load(file, allow_pickle=False)
        return self.references[wanted]

    def measure(self, setting: Setting, *, is_compared: bool) -> dict[str, Any]:
        """The numbers of one setting. is_compared: also with the reference, which costs 999 evaluations an image."""
        began = time.perf_counter()
        labels = self.labels(self.samples)
        latents, pixels = sample(self.engine, setting, labels)
        seconds = time.perf_counter() - began
        features = self.classifier.features(pixels)
        found = self.classifier.found(features, np.array(labels), self.classes)
        numbers = {
            **asdict(setting),
            "num_steps": setting.num_steps,
            "rows": setting.rows,
            "frechet_lite0": round(frechet_to(features, self.moments), 2),
            "kid_lite0": round(kid(KernelSet(features), self.kernel), 5),
            "top1_lite0": round(float(found.mean()), 4),
            "seconds": round(seconds, 1),
        }
        if is_compared:
            reference = self.reference(setting)
            numbers["latent_psnr"] = round(latent_psnr(latents[: len(reference)], reference), 2)
        return numbers


def recommend(results: Mapping[str, Mapping[str, Any]], samples: int, floor: float) -> dict[str, Any]:
    """The cheapest setting that is as good as the best within what the samples can tell, by both qualities.

    As good: frechet_lite0 above the floor, what as many real images get, by at most 5 % more than the best among the
    evenly stepped ones; of those, class accuracy within two standard errors of the best of them.
    """
    even = [r for r in results.values() if r["shift"] == 1]
    least = min(r["frechet_lite0"] for r in even)
    near = [r for r in even if r["frechet_lite0"] - floor <= 1.05 * max(least - floor, 0)]
    near = near or [r for r in even if r["frechet_lite0"] == least]
    accuracy = max(r["top1_lite0"] for r in near)
    error = 2 * (accuracy * (1 - accuracy) / samples) ** 0.5
    good = [r for r in near if r["top1_lite0"] >= accuracy - error]
    return dict(min(good, key=lambda r: (r["rows"], r["frechet_lite0"])))


def conditions(options: argparse.Namespace, engine: Engine, real: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers hold for; another of these begins a new study."""
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
        "reference_steps": REFERENCE_STEPS,
        "real": dict(real),
    }


def begin(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The study so far, or an empty one where there is none for these conditions."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["conditions"] == wanted:
            return dict(found)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    for old in file.parent.glob(f".{file.stem}-*.npy"):  # references of another model
        old.unlink()
    return {"conditions": wanted, "parts": {}, "results": {}}


def save(file: Path, values: dict[str, Any]) -> None:
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def work(study: Study, values: dict[str, Any], minutes: float) -> int:
    """Measure what is missing, for some minutes; returns how many settings are still missing then."""
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
        log.info("%d of %d: %s: %s", number + 1, len(missing), setting.key, written(result))
    return 0


def written(result: Mapping[str, Any]) -> str:
    psnr = f"{result['latent_psnr']:.1f} dB, " if "latent_psnr" in result else ""
    return f"{psnr}frechet_lite0 {result['frechet_lite0']:.1f}, top1 {result['top1_lite0']:.1%}"


def read_images(options: argparse.Namespace, config: ModelConfig, classifier: Lite0) -> tuple[RealSet, dict[str, Any]]:
    """The reference, and what real images get against it: the floor, at the count of the samples."""
    sets, cache = [], FeatureCache(options.cache)
    for path in (options.real, options.reference):
        images = Images(path, config.image_size)
        if missing := set(config.trained_classes) - set(images.labels.tolist()):
            raise InputError(f"{path} has no images of class {min(missing)}, which the model draws")
        limit = options.samples if path == options.real else LIMIT
        one = read_real(images, config.trained_classes, limit)
        one.features = cache.features(classifier, one.pixels, f"features of {one.name}")
        sets.append(one)
    held, reference = sets
    right = classifier.found(held.features, held.labels, config.trained_classes)
    return reference, {
        "pictures": len(held.labels),
        "reference_pictures": len(reference.labels),
        "frechet_lite0": round(frechet_to(held.features, moments(reference.features)), 2),
        "top1_lite0": round(float(right.mean()), 4),
    }


def run(options: argparse.Namespace) -> int:
    """Carry the study on; returns how many settings are still missing."""
    if options.compared > options.samples:
        raise InputError(f"--compared must be at most --samples, got {options.compared} and {options.samples}")
    engine, classifier = load_engine("onnx", options.model), lite0()
    real, floor = read_images(options, engine.config, classifier)
    output = output_of(options)
    file = output.results / "samplers.json"
    values = begin(file, conditions(options, engine, floor))
    study = Study(engine, classifier, real, (options.samples, options.compared), file)
    left = work(study, values, options.minutes)
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
    parser.add_argument("--real", required=True, metavar="IMAGES", help="held-out images: the floor")
    parser.add_argument("--reference", required=True, metavar="IMAGES", help="what samples are compared with")
    add_flag(parser, "studies/results")
    parser.add_argument("--samples", type=count, default=200, help="images of each setting (default 200)")
    parser.add_argument("--compared", type=count, default=20, help="of them compared with 500 steps (default 20)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; run it again to go on")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="features of real images")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        left = run(options)
    except KeyboardInterrupt:
        sys.exit("sampler_choice: stopped; the same command goes on from here")
    except (DSDError, OSError) as error:
        sys.exit(f"sampler_choice: {error}")
    if left:
        sys.exit(f"sampler_choice: {left} settings are left; the same command goes on from here")
    log.info("%s is written", output_of(options).pages / "samplers.md")


if __name__ == "__main__":
    main()
