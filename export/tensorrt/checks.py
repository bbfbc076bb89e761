"""Checks that an engine must pass before it is accepted. They run on its device, against float32 on the CPU."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dsd_serve.config import ModelConfig
from dsd_serve.engines import Engine
from dsd_serve.engines.selftest import mixture
from dsd_serve.imaging.codec import psnr
from dsd_serve.params import SamplingParams
from dsd_serve.precision import PRECISIONS, REFERENCE
from dsd_serve.programs import generate, run_all
from dsd_serve.rows import OUTPUT_NAMES, Array, Denoise
from export.verify import verify

MOST_LABELS = 1000  # that are run; the rows of all labels differ only in their row of one table
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
EQUAL_ROWS = (2, 3, 5, 8, 13, 33, 64)  # on and between the row counts that an engine may pad to
NUM_STEPS, NUM_IMAGES = 50, 2
# Part of the format of a manifest: plans that passed record these names.
FINITE, ERRORS, EQUAL, NEIGHBOURS, IMAGE, BUILT = (
    "finite outputs for every class",
    "error of each row against float32",
    "equal rows give equal outputs",
    "a row does not depend on what its neighbours hold",
    "the image after a whole generation",
    "the precision that was really built",
)
NAMES = (FINITE, ERRORS, EQUAL, NEIGHBOURS, IMAGE, BUILT)


@dataclass(frozen=True)
class Check:
    """The result of one check. text: the numbers, in words."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'FAILS'} {self.name}: {self.text}"


def run_checks(
    engine: Engine, reference: Engine, precision: str, defaults: SamplingParams, layers: str | None = None
) -> list[Check]:
    """All checks. reference: the float32 engine. defaults: recommended sampling settings. layers: the layers that
    TensorRT built, as its inspector's JSON; None for an engine that runs its graph as it is."""
    checks = [
        finite(engine),
        errors(engine, reference, precision),
        equal(engine),
        neighbours(engine),
        image(engine, reference, precision, defaults),
    ]
    return checks if layers is None else [*checks, built(layers, precision)]


def to_record(checks: Sequence[Check]) -> dict[str, dict[str, Any]]:
    """The form of a manifest: name -> the other fields."""
    return {check.name: {key: value for key, value in asdict(check).items() if key != "name"} for check in checks}


def finite(engine: Engine) -> Check:
    """Every class of the model, or MOST_LABELS of them, and the null label, at every time of TIMES.

    A flow map also jumps from there to t = 1.
    """
    config = engine.config
    z_t = noise(config)
    broken: list[str] = []
    labels = (*evenly(config.trained_classes, MOST_LABELS), config.null_label)
    jumps = [(t, r) for r in ((None, 1.0) if config.flow_map else (None,)) for t in TIMES]
    for label in labels:
        outputs = engine.run([Denoise(z_t, t, label, r) for t, r in jumps])
        broken += [
            f"class {label} at t = {t:g}" + ("" if r is None else f", r = {r:g}")
            for (t, r), z in zip(jumps, outputs, strict=True)
            if not np.isfinite(z).all()
        ]
    total = len(jumps) * len(labels)
    return Check(FINITE, not broken, f"{len(broken)} of {total} rows are not finite {' '.join(broken[:1])}".rstrip())


def errors(engine: Engine, reference: Engine, precision: str) -> Check:
    """Errors of all rows. On a GPU the bits of a row may depend on the number of rows: the text counts such rows, which
    must be within the limits like all others. Only the CPU promises equal bits."""
    report = verify(engine, reference, precision)
    return Check(ERRORS, report.within_limits, str(report))


def equal(engine: Engine) -> Check:
    """Calls of equal rows: every output must be that of the first row."""
    row = Denoise(noise(engine.config), 0.5, engine.config.drawable_labels[0])
    differing = 0
    for count in EQUAL_ROWS:
        outputs = engine.run([row] * count)
        differing += sum(not np.array_equal(output, outputs[0]) for output in outputs)
    return Check(EQUAL, not differing, f"{differing} of {sum(EQUAL_ROWS)} equal rows differ")


def neighbours(engine: Engine) -> Check:
    """Pairs of calls with one row in common, and as many rows of each kind, but with other contents."""
    config, differing = engine.config, 0
    mixtures = ((0, 8, 0), (0, 64, 0), (2, 5, 2), (9, 5, 9))  # the last has no CUDA graphs, which part the kinds
    row = Denoise(noise(config), 0.5, config.drawable_labels[0])
    for counts in mixtures:
        outputs = []
        for seed in (1, 2):
            rows = sorted(mixture(config, counts, seed), key=lambda other: isinstance(other, Denoise))
            outputs.append(engine.run([row, *rows])[0])
        differing += not np.array_equal(outputs[0], outputs[1])
    return Check(NEIGHBOURS, not differing, f"a row differs in {differing} of {len(mixtures)} pairs of calls")


def image(engine: Engine, reference: Engine, precision: str, defaults: SamplingParams) -> Check:
    """The worst PSNR of a few images after a whole generation."""
    config = engine.config
    labels = evenly(config.drawable_labels, NUM_IMAGES)
    params = replace(defaults, num_steps=NUM_STEPS, sampler="flow_map" if config.flow_map else "euler")

    def images(by: Engine) -> list[Array]:
        return run_all(by, [generate(config, label, params) for label in labels])

    worst = min(psnr(ours[None], theirs[None]) for ours, theirs in zip(images(engine), images(reference), strict=True))
    least = PRECISIONS[precision].limits.psnr
    return Check(IMAGE, worst >= least, f"{worst:.1f} dB against fp32 after {NUM_STEPS} steps (at least {least:g})")


def built(layers: str, precision: str) -> Check:
    """The types of the tensors between TensorRT's layers, from its inspector: the precision's, and float32 for sums.

    What the inspector does not tell is unknown, and no failure: the network is strongly typed, and `check_types` has
    seen its types.
    """
    found = types_of(layers)
    if not found:
        return Check(BUILT, True, "unknown, the inspector names no types; those of the network were checked")
    counts = ", ".join(f"{count} in {name}" for name, count in found.most_common())
    passed = found[precision] > 0 and set(found) <= {precision, REFERENCE}
    return Check(BUILT, passed, f"outputs of layers: {counts}")


def types_of(layers: str) -> "Counter[str]":
    """Precision -> number of outputs of layers, from the JSON of `ICudaEngine.create_engine_inspector`.

    The outputs of the network are left out: their types are the same in every precision.
    """
    patterns = {
        name: re.compile(rf"\b({'|'.join(row.tensorrt)})\b") for name, row in PRECISIONS.items() if row.tensorrt
    }
    values: Any = json.loads(layers)
    found: Counter[str] = Counter()
    for layer in values.get("Layers", ()) if isinstance(values, Mapping) else ():
        for output in layer.get("Outputs", ()) if isinstance(layer, Mapping) else ():
            if output.get("Name") in OUTPUT_NAMES:
                continue
            text = str(output.get("Format/Datatype", output.get("Datatype", "")))
            found.update(name for name, pattern in patterns.items() if pattern.search(text))
    return found


def evenly(labels: Sequence[int], count: int) -> Sequence[int]:
    """At most `count` of the labels, evenly spaced."""
    return labels[:: max(1, len(labels) // count)][:count]


def noise(config: ModelConfig) -> Array:
    """The noise that all checks start from, float32 [L, C]."""
    return np.random.default_rng(0).standard_normal(config.latent_shape, dtype=np.float32)
