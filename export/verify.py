"""Verification: the errors of a graph or an engine against a reference, on mixtures of rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsd_serve.engines import Engine
from dsd_serve.engines.selftest import batch_invariance, mixture
from dsd_serve.precision import PRECISIONS, REFERENCE, Limits
from dsd_serve.rows import Decode

MIXTURES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 4), (0, 5, 0), (3, 0, 2), (1, 7, 1))


@dataclass(frozen=True)
class Report:
    """Errors of an engine against a reference, to be compared with `Limits`.

    latent_error: largest absolute difference of encode and denoise rows. latent_rms: root mean square of that
    difference, as a share of the reference's. pixel_error: largest difference of decode rows, in grey levels.
    dependent_rows: rows, of num_rows, whose bits differ from the same row alone.
    """

    latent_error: float
    pixel_error: int
    dependent_rows: int
    num_rows: int
    latent_rms: float = 0.0
    precision: str = "fp32"

    @property
    def limits(self) -> Limits:
        return PRECISIONS[self.precision].limits

    @property
    def within_limits(self) -> bool:
        """Whether the errors of all rows are within the limits, even if rows depend on their neighbours."""
        return (
            self.latent_error <= self.limits.latents
            and self.latent_rms <= self.limits.latents_rms
            and self.pixel_error <= self.limits.pixels
        )

    @property
    def passed(self) -> bool:
        """Within the limits, and no row depends on its neighbours: the requirement on a CPU."""
        return self.within_limits and not self.dependent_rows

    @property
    def reference(self) -> str:
        return "torch" if self.precision == REFERENCE else REFERENCE

    def __str__(self) -> str:
        limits = self.limits
        return (
            f"latents differ from {self.reference} by at most {self.latent_error:.1e} (limit {limits.latents:.0e}), "
            f"{self.latent_rms:.1e} of their size (limit {limits.latents_rms:.1e}), pixels by {self.pixel_error} grey "
            f"levels (limit {limits.pixels}); {self.dependent_rows} of {self.num_rows} rows depend on their neighbours "
            "(limit 0)"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(engine: Engine, reference: Engine, precision: str = "fp32") -> Report:
    """Compare an engine with a reference on mixtures of rows, and each row of a mixture with the same row alone."""
    latent_error, pixel_error, dependent, total = 0.0, 0, 0, 0
    squares, energy = 0.0, 0.0
    for seed, counts in enumerate(MIXTURES):
        rows = mixture(engine.config, counts, seed)
        outputs = engine.run(rows)
        for row, ours, theirs in zip(rows, outputs, reference.run(rows), strict=True):
            difference = ours.astype(np.float64) - theirs
            error = float(np.abs(difference).max())
            if isinstance(row, Decode):
                pixel_error = max(pixel_error, int(error))
            else:
                latent_error = max(latent_error, error) if np.isfinite(error) else float("inf")
                squares += float(np.square(difference).sum())
                energy += float(np.square(theirs, dtype=np.float64).sum())
        dependent += batch_invariance(engine, rows, outputs).dependent_rows
        total += len(rows)
    rms = float(np.sqrt(squares / energy)) if np.isfinite(latent_error) else float("inf")
    return Report(latent_error, pixel_error, dependent, total, rms, precision)
