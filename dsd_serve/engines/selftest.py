"""The self-test of batch invariance: whether a row's result depends on its neighbours.

It runs on every engine before it serves, and on every exported graph. On a CPU it must hold. On a GPU libraries split
sums by the number of rows, so there it is tried at several numbers, and no more is promised than what they showed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsd_serve.config import ModelConfig
from dsd_serve.engines import Engine
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineError
from dsd_serve.rows import Array, Decode, Denoise, Encode, Row

# Encode, denoise and decode rows of the calls of the self-test.
ON_CPU = ((1, 2, 1),)
ON_GPU = ((0, 1, 0), (0, 2, 0), (0, 3, 0), (2, 5, 2), (0, 33, 0), (0, 64, 0))


@dataclass(frozen=True)
class BatchInvariance:
    """Result of the self-test.

    dependent_rows: rows, of num_rows, that differ in any bit from the same row alone. max_difference: the largest
    difference, in units of the latents, or grey levels / 255 for pixels. row_counts: the rows of each call that was
    tried; empty where an earlier version did not tell.
    """

    num_rows: int
    dependent_rows: int
    max_difference: float
    row_counts: tuple[int, ...] = ()

    @property
    def holds(self) -> bool:
        return self.dependent_rows == 0

    def __str__(self) -> str:
        calls = f"calls of {', '.join(map(str, self.row_counts))}" if self.row_counts else "a mixture"
        if self.holds:
            return f"{self.num_rows} rows give the same bits alone and in {calls}"
        return (
            f"{self.dependent_rows} of {self.num_rows} rows differ between {calls} and a call of their own, by at most "
            f"{self.max_difference:.1e}: the same seed may give slightly different images under load"
        )


def mixture(config: ModelConfig, counts: Sequence[int], seed: int) -> list[Row]:
    """Random rows in shuffled order. counts: of encode, denoise and decode rows."""
    rng = np.random.default_rng(seed)
    encode, denoise, decode = counts
    labels = [*config.trained_classes, config.null_label]
    rows: list[Row] = [Encode(rng.integers(0, 256, config.pixel_shape, dtype=np.uint8)) for _ in range(encode)]
    for _ in range(denoise):
        z_t = rng.standard_normal(config.latent_shape, dtype=np.float32)
        t, label = float(rng.uniform(0, 0.999)), int(rng.choice(labels))
        rows.append(Denoise(z_t, t, label, float(rng.uniform(t, 1)) if config.flow_map else None))
    rows += [Decode(rng.standard_normal(config.latent_shape, dtype=np.float32)) for _ in range(decode)]
    return [rows[i] for i in rng.permutation(len(rows))]


def batch_invariance(engine: Engine, rows: Sequence[Row], together: Sequence[Array] | None = None) -> BatchInvariance:
    """Compare each row of a mixture with the same row alone. together: the outputs of the mixture, if known."""
    dependent, worst = 0, 0.0
    outputs = engine.run(rows) if together is None else together
    for row, output in zip(rows, outputs, strict=True):
        (alone,) = engine.run([row])
        if not np.array_equal(alone, output):
            dependent += 1
            scale = 255.0 if output.dtype == np.uint8 else 1.0
            worst = max(worst, float(np.abs(alone.astype(np.float64) - output).max()) / scale)
    return BatchInvariance(len(rows), dependent, worst, (len(rows),))


def self_test(engine: Engine) -> BatchInvariance:
    """Compare rows in calls of several sizes with the same rows alone.

    A call that is too large for a GPU ends the test; `row_counts` says which were tried. Raises CheckpointError if the
    network gives values that are not finite, EngineError if it cannot run a single row.
    """
    on_cpu = engine.describe().get("device", "cpu") in ("cpu", "none")
    results: list[BatchInvariance] = []
    for counts in ON_CPU if on_cpu else ON_GPU:
        rows = mixture(engine.config, counts, seed=0)
        try:
            outputs = engine.run(rows)
        except EngineDeadError:
            raise
        except EngineError:
            if not results:
                raise
            break
        if not all(np.isfinite(output).all() for output in outputs):
            raise CheckpointError("the network gives values that are not finite: export it again")
        results.append(batch_invariance(engine, rows, outputs))
    return BatchInvariance(
        sum(result.num_rows for result in results),
        sum(result.dependent_rows for result in results),
        max(result.max_difference for result in results),
        tuple(count for result in results for count in result.row_counts),
    )
