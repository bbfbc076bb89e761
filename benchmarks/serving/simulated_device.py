"""A simulated GPU behind a stream: batches run one after another, and the caller is free until it waits for one."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsd_serve.config import ModelConfig
from dsd_serve.rows import Array, Decode, Denoise, Encode, Pixels, Row

# The model of dsd-s in fp16 on an H100 (docs/scaling.md): 0.8 ms for one row, 5.4 ms for 64.
FLOOR, BASE, PER_ROW = 0.0008, 0.00037, 0.0000786  # seconds


class SimulatedDevice:
    """An engine whose batch of n rows takes max(FLOOR, BASE + n * PER_ROW) seconds of the device.

    Outputs are the same arrays for all rows of a kind, so that they cost nothing. busy: seconds that the device worked.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.busy = self.free_at = 0.0
        self.outputs: dict[type[Row], Array] = {
            Encode: np.zeros(config.latent_shape, np.float32),
            Denoise: np.zeros(config.latent_shape, np.float32),
            Decode: blurred_noise(config.image_size),
        }

    def begin(self, rows: Sequence[Row]) -> Callable[[], list[Array]]:
        seconds = max(FLOOR, BASE + PER_ROW * len(rows))
        self.free_at = ready = max(time.perf_counter(), self.free_at) + seconds
        self.busy += seconds

        def wait() -> list[Array]:
            time.sleep(max(0.0, ready - time.perf_counter()))
            return [self.outputs[type(row)] for row in rows]

        return wait

    def run(self, rows: Sequence[Row]) -> list[Array]:
        return self.begin(rows)()

    def describe(self) -> dict[str, Any]:
        return {"engine": "simulated", "device": "none", "precision": "fp16", "version": "dsd-s on an H100"}


class SimulatedStream(SimulatedDevice):
    """The same, for two ticks at a time."""

    def start(self, rows: Sequence[Row]) -> Callable[[], list[Array]]:
        return self.begin(rows)


def blurred_noise(side: int) -> Pixels:
    """An image that a JPEG takes as many bytes for as for a photo, uint8 [3, side, side]."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    large = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (side, side, 3))
    return np.ascontiguousarray(large.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
