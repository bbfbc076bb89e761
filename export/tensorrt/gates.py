"""What an engine must show before it is accepted: run on the device that it is for, against float32 on the CPU."""

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
from dsd_serve.programs import generate, run_all
from dsd_serve.rows import Array, Denoise, Row
from export.verify import verify

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAME_ROWS = (2, 3, 5, 8, 13, 33, 64)  # on and between the row counts that an engine may pad to
NUM_STEPS, NUM_PICTURES = 50, 2
# dB of a whole generation against float32. Networks of this project show 64, 50 and 43 at worst (docs/precision.md).
LEAST_PSNR = {"fp32": 50.0, "fp16": 40.0, "bf16": 35.0, "int8": 30.0}
FINITE, ERRORS, SAME, NEIGHBOURS, PICTURE, BUILT = (
    "finite outputs for every class",
    "error of each row against float32",
    "equal rows give equal outputs",
    "a row does not depend on what its neighbours hold",
    "the picture after a whole generation",
    "the precision that was really built",
)
NAMES = (FINITE, ERRORS, SAME, NEIGHBOURS, PICTURE, BUILT)
# How TensorRT names the type of a layer's tensors, in the versions that we know.
TYPES = {
    "fp32": re.compile(r"\b(FP32|Float|FLOAT)\b"),
    "fp16": re.compile(r"\b(FP16|Half|HALF)\b"),
    "bf16": re.compile(r"\b(BF16|BFloat16|BFLOAT16)\b"),
}


@dataclass(frozen=True)
class Gate:
    """What one gate found. text: its numbers, in words."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.passed else 'FAILS'} {self.name}: {self.text}"


def run_gates(
    engine: Engine, reference: Engine, precision: str, defaults: SamplingParams, layers: str | None = None
) -> list[Gate]:
    """All gates. reference: the float32 engine. defaults: how the model is best sampled. layers: what TensorRT tells of
    its layers, as JSON; None for an engine whose graph is what it runs."""
    gates = [
        finite(engine),
        errors(engine, reference, precision),
        same(engine),
        neighbours(engine),
        picture(engine, reference, precision, defaults),
    ]
    return gates if layers is None else [*gates, built(layers, precision)]


def record(gates: Sequence[Gate]) -> dict[str, dict[str, Any]]:
    """As a manifest keeps them."""
    return {gate.name: {key: value for key, value in asdict(gate).items() if key != "name"} for gate in gates}


def finite(engine: Engine) -> Gate:
    """Every class that the model knows, and none, at every time of TIMES."""
    config = engine.config
    z_t = noise(config)
    broken: list[str] = []
    for label in (*config.trained_classes, config.null_label):
        rows: list[Row] = [Denoise(z_t, t, label) for t in TIMES]
        outputs = engine.run(rows)
        broken += [
            f"class {label} at t = {t:g}" for t, z in zip(TIMES, outputs, strict=True) if not np.isfinite(z).all()
        ]
    total = len(TIMES) * (len(config.trained_classes) + 1)
    return Gate(FINITE, not broken, f"{len(broken)} of {total} rows are not finite {' '.join(broken[:1])}".rstrip())


def errors(engine: Engine, reference: Engine, precision: str) -> Gate:
    """On a GPU the bits of a row may depend on how many rows there are. These are told here, and must be as near to
    float32 as all others; only the CPU promises equal bits."""
    report = verify(engine, reference, precision)
    return Gate(ERRORS, report.within_limits, str(report))


def same(engine: Engine) -> Gate:
    """Calls of equal rows: every output must be that of the first row."""
    row = Denoise(noise(engine.config), 0.5, engine.config.trained_classes[0])
    differing = 0
    for count in SAME_ROWS:
        outputs = engine.run([row] * count)
        differing += sum(not np.array_equal(output, outputs[0]) for output in outputs)
    return Gate(SAME, not differing, f"{differing} of {sum(SAME_ROWS)} equal rows differ")


def neighbours(engine: Engine) -> Gate:
    """Calls that have one row in common, and the numbers of rows of each kind, but not what the others hold."""
    config, differing = engine.config, 0
    mixtures = ((0, 8, 0), (0, 64, 0), (2, 5, 2))
    row = Denoise(noise(config), 0.5, config.trained_classes[0])
    for counts in mixtures:
        outputs = []
        for seed in (1, 2):
            rows = sorted(mixture(config, counts, seed), key=lambda other: isinstance(other, Denoise))
            outputs.append(engine.run([row, *rows])[0])
        differing += not np.array_equal(outputs[0], outputs[1])
    return Gate(NEIGHBOURS, not differing, f"a row differs in {differing} of {len(mixtures)} pairs of calls")


def picture(engine: Engine, reference: Engine, precision: str, defaults: SamplingParams) -> Gate:
    config = engine.config
    labels = config.trained_classes[:: max(1, len(config.trained_classes) // NUM_PICTURES)][:NUM_PICTURES]
    params = replace(defaults, num_steps=NUM_STEPS, sampler="euler")

    def drawn(by: Engine) -> list[Array]:
        return run_all(by, [generate(config, label, params) for label in labels])

    worst = min(psnr(ours[None], theirs[None]) for ours, theirs in zip(drawn(engine), drawn(reference), strict=True))
    least = LEAST_PSNR[precision]
    return Gate(PICTURE, worst >= least, f"{worst:.1f} dB against fp32 after {NUM_STEPS} steps (at least {least:g})")


def built(layers: str, precision: str) -> Gate:
    """The types of the tensors that TensorRT's layers write, as its inspector tells them."""
    found = types_of(layers)
    told = ", ".join(f"{count} in {name}" for name, count in found.items()) or "none that the library names"
    return Gate(BUILT, found[precision] > 0 and found.most_common(1)[0][0] == precision, f"outputs of layers: {told}")


def types_of(layers: str) -> "Counter[str]":
    """Precision -> outputs of layers, of what `ICudaEngine.create_engine_inspector` gives as JSON."""
    values: Any = json.loads(layers)
    found: Counter[str] = Counter()
    for layer in values.get("Layers", ()) if isinstance(values, Mapping) else ():
        for output in layer.get("Outputs", ()) if isinstance(layer, Mapping) else ():
            text = str(output.get("Format/Datatype", output.get("Datatype", "")))
            found.update(name for name, pattern in TYPES.items() if pattern.search(text))
    return found


def noise(config: ModelConfig) -> Array:
    return np.random.default_rng(0).standard_normal(config.latent_shape, dtype=np.float32)
