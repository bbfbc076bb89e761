"""How many rows a tick takes: the row budget of a batcher, measured on its engine."""

import math
import time
from collections.abc import Sequence

import numpy as np

from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.rows import Denoise, Engine, Row

MAX_BUDGET = 64
NEARLY_BEST = 0.95  # of the best rate; more rows would only delay everyone
MEASURE_ROUNDS = 10


def measure_budget(engine: Engine, seconds: float = 0.6) -> tuple[int, TickTimes]:
    """The smallest number of denoise rows within 5 % of the best rows per second, from 1, 2, 4 ... 64.

    Also returns the seconds of a tick with one row, and those per row at that number. Warms the engine up. Takes about
    `seconds`, or two ticks of one row if they take longer. All numbers are measured in turn and the best time of each
    counts, so that a moment in which the machine was busy does not decide.
    """
    rng = np.random.default_rng(0)
    config = engine.config
    row = Denoise(rng.standard_normal(config.latent_shape, dtype=np.float32), 0.5, config.null_label)
    engine.run([row])
    deadline = time.perf_counter() + seconds
    best = {1: timed(engine, [row])}
    for _ in range(MEASURE_ROUNDS):
        for size in (2**power for power in range(MAX_BUDGET.bit_length())):
            if time.perf_counter() + best.get(size, 2 * best[max(1, size // 2)]) > deadline:
                break
            best[size] = min(best.get(size, math.inf), timed(engine, [row] * size))
    rates = {size: size / duration for size, duration in best.items()}
    budget = min(size for size, rate in rates.items() if rate >= NEARLY_BEST * max(rates.values()))
    return budget, TickTimes(tick=best[1], row=best[budget] / budget)


def timed(engine: Engine, rows: Sequence[Row]) -> float:
    began = time.perf_counter()
    engine.run(rows)
    return time.perf_counter() - began
