"""A simulated accelerator, on which a batch takes as long as one row, up to a limit."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsd_serve.config import ModelConfig
from dsd_serve.rows import Array, Decode, Denoise, Row

STEP_SECONDS = 0.020
FLAT_ROWS = 32


class SimulatedEngine:
    """An engine whose call takes `step_seconds` up to `flat_rows` rows and proportionally longer above.

    The caller sleeps meanwhile, as if waiting for a device, so the processor is free for the server. Outputs have the
    right shapes and types and depend on their own row only; they come from simple arithmetic, not from a network.
    """

    def __init__(self, config: ModelConfig, *, step_seconds: float = STEP_SECONDS, flat_rows: int = FLAT_ROWS) -> None:
        self.config, self.step_seconds, self.flat_rows = config, step_seconds, flat_rows

    def seconds(self, num_rows: int) -> float:
        return self.step_seconds * max(1.0, num_rows / self.flat_rows)

    def run(self, rows: Sequence[Row]) -> list[Array]:
        ready = time.perf_counter() + self.seconds(len(rows))
        outputs = [self.output(row) for row in rows]
        time.sleep(max(0.0, ready - time.perf_counter()))
        return outputs

    def output(self, row: Row) -> Array:
        if isinstance(row, Denoise):
            return row.z_t * np.float32((1 + row.t) / 2) + np.float32(0.1 * row.label / self.config.num_classes)
        if isinstance(row, Decode):
            return np.resize(np.clip(row.z * 64 + 128, 0, 255).astype(np.uint8), self.config.pixel_shape)
        return np.resize(row.pixels.astype(np.float32) / 127.5 - 1, self.config.latent_shape)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "simulated",
            "device": "none",
            "precision": "fp32",
            "version": f"{1000 * self.step_seconds:g} ms up to {self.flat_rows} rows",
        }
