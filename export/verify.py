"""Is the exported graph the network? Measured on mixtures of rows, before anyone relies on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsd_serve.config import ModelConfig
from dsd_serve.engines import Engine
from dsd_serve.rows import Decode, Denoise, Encode, Row

MIXTURES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4), (0, 5, 0), (3, 0, 2), (1, 7, 1))
MAX_LATENT_ERROR = 1e-4
MAX_PIXEL_ERROR = 1


@dataclass(frozen=True)
class Report:
    """latent_error: largest absolute difference of encode and denoise rows. pixel_error: largest difference of decode
    rows in grey levels. dependent_rows: rows whose bits differ from the same row alone, of num_rows."""

    latent_error: float
    pixel_error: int
    dependent_rows: int
    num_rows: int

    @property
    def passed(self) -> bool:
        return self.latent_error <= MAX_LATENT_ERROR and self.pixel_error <= MAX_PIXEL_ERROR and not self.dependent_rows

    def __str__(self) -> str:
        return (
            f"latents differ from torch by at most {self.latent_error:.1e} (limit {MAX_LATENT_ERROR:.0e}), pixels by "
            f"{self.pixel_error} grey levels (limit {MAX_PIXEL_ERROR}); {self.dependent_rows} of {self.num_rows} rows "
            "depend on their neighbours (limit 0)"
        )


def mixture(config: ModelConfig, counts: Sequence[int], seed: int) -> list[Row]:
    """Random rows: counts = (encode, denoise, decode), in shuffled order."""
    rng = np.random.default_rng(seed)
    encode, denoise, decode = counts
    labels = [*config.trained_classes, config.null_label]
    rows: list[Row] = [Encode(rng.integers(0, 256, config.pixel_shape, dtype=np.uint8)) for _ in range(encode)]
    for _ in range(denoise):
        z_t = rng.standard_normal(config.latent_shape, dtype=np.float32)
        rows.append(Denoise(z_t, float(rng.uniform(0, 0.999)), int(rng.choice(labels))))
    rows += [Decode(rng.standard_normal(config.latent_shape, dtype=np.float32)) for _ in range(decode)]
    return [rows[i] for i in rng.permutation(len(rows))]


def verify(engine: Engine, reference: Engine) -> Report:
    """Compare an engine with a reference on mixtures of rows, and each row in company with itself alone."""
    latent_error, pixel_error, dependent, total = 0.0, 0, 0, 0
    for seed, counts in enumerate(MIXTURES):
        rows = mixture(engine.config, counts, seed)
        for row, ours, theirs in zip(rows, engine.run(rows), reference.run(rows), strict=True):
            error = float(np.abs(ours.astype(np.float64) - theirs).max())
            if isinstance(row, Decode):
                pixel_error = max(pixel_error, int(error))
            else:
                latent_error = max(latent_error, error) if np.isfinite(error) else float("inf")
            dependent += not np.array_equal(engine.run([row])[0], ours)
            total += 1
    return Report(latent_error, pixel_error, dependent, total)
