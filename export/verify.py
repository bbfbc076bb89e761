"""Is the exported graph the network? Measured on mixtures of rows, before anyone relies on it."""

from dataclasses import dataclass

import numpy as np

from dsd_serve.engines import Engine
from dsd_serve.engines.selftest import invariance, mixture
from dsd_serve.rows import Decode

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


def verify(engine: Engine, reference: Engine) -> Report:
    """Compare an engine with a reference on mixtures of rows, and each row in company with itself alone."""
    latent_error, pixel_error, dependent, total = 0.0, 0, 0, 0
    for seed, counts in enumerate(MIXTURES):
        rows = mixture(engine.config, counts, seed)
        outputs = engine.run(rows)
        for row, ours, theirs in zip(rows, outputs, reference.run(rows), strict=True):
            error = float(np.abs(ours.astype(np.float64) - theirs).max())
            if isinstance(row, Decode):
                pixel_error = max(pixel_error, int(error))
            else:
                latent_error = max(latent_error, error) if np.isfinite(error) else float("inf")
        dependent += invariance(engine, rows, outputs).dependent_rows
        total += len(rows)
    return Report(latent_error, pixel_error, dependent, total)
