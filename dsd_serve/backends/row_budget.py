"""The row budget of a batcher, measured at its start and while it serves.

The rates of two sizes are compared by trials: two ticks of s rows and one of 2 s, one after the other, under load that
fills both. They do the same work at the same time, so that a busy machine slows them alike, and neither is favoured
because it is shorter. The gain of a trial is the rate of the larger ticks divided by that of the smaller ones.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.rows import Denoise, DeviceEngine, Engine, Row

log = logging.getLogger(__name__)

MAX_BUDGET = 64
NEARLY_BEST = 0.95  # of the best rate; more rows would only delay everyone
RAISE_BELOW, LOWER_ABOVE = 0.94, 0.96  # the same while it serves; apart, so that a budget between them stays
MEASURE_ROUNDS = 10
FEWEST, MOST = 5, 63  # trials of a pair of sizes that decide
TRIAL_EVERY, TRIAL_SELDOM = 5, 64  # ticks from one trial to the next, before and after they decide
FULL = 0.75  # of its limit, in a tick of a trial


class RowBudget:
    """The rows of a tick, and the gains of the sizes next to it.

    size: 1, 2, 4 ... 64, moves by one step unless it is fixed. gains: by the smaller size of the pair, of an earlier
    measurement. Used by the batcher's thread, except for `size`.
    """

    def __init__(
        self, size: int, gains: dict[int, float] | None = None, most: int = MAX_BUDGET, *, fixed: bool = False
    ) -> None:
        self.size, self.fixed, self.most = size, fixed or gains is None, most
        self.gains = dict(gains or {})
        self.samples: dict[int, deque[float]] = {}
        self.least = 1  # rows that programs yield at once, if these are more than a limit was
        self.plan: list[int] = []  # limits of the trial that goes on
        self.ticks: list[tuple[int, float]] = []  # its rows and seconds so far
        self.waits = False  # for the tick of the last limit
        self.turn = 0  # of the pairs, and of the orders
        self.since = 0  # ticks since the last trial

    def limit(self, rows: int) -> int:
        """The most rows of the next tick, of `rows` that there are: the budget, or that of a trial."""
        if self.fixed:
            return self.size
        self.since += 1
        if not self.plan and self.since >= self.interval:
            self.begin_trial(rows)
        if self.waits or (self.plan and rows < self.plan[len(self.ticks)]):
            self.end_trial()
        self.waits = bool(self.plan)
        return self.plan[len(self.ticks)] if self.plan else self.size

    def on_trial(self, rows: int) -> bool:
        """Whether the next tick, of `rows` that there are, is one of a trial."""
        begins = not self.fixed and self.since + 1 >= self.interval and self.pairs_for(rows)
        return bool(self.plan or begins)

    def note(self, rows: int, seconds: float) -> None:
        """A tick took so long."""
        limit = self.plan[len(self.ticks)] if self.plan else self.size
        if rows > limit:
            self.least = step_of(rows)
        elif rows <= limit < self.least:
            self.least = 1
        self.waits = False
        if not self.plan:
            return
        if not FULL * limit <= rows <= limit or seconds <= 0:
            self.end_trial()
            return
        self.ticks.append((rows, seconds))
        if len(self.ticks) == len(self.plan):
            small = min(self.plan)
            rates = {
                size: sum(rows for rows, _ in ticks) / sum(seconds for _, seconds in ticks)
                for size in (small, 2 * small)
                if (ticks := [tick for limit, tick in zip(self.plan, self.ticks, strict=True) if limit == size])
            }
            self.end_trial()
            self.samples.setdefault(small, deque(maxlen=MOST)).append(rates[2 * small] / rates[small])
            self.decide(small)

    def failed(self) -> bool:
        """The engine failed. True if only a trial with more rows than the budget did: they may go again, in fewer."""
        trial = bool(self.plan) and self.plan[len(self.ticks)] > self.size
        self.end_trial()
        if trial:
            self.most = self.size
        return trial

    @property
    def pairs(self) -> list[int]:
        """The smaller sizes of the pairs that the budget belongs to and that can be tried."""
        size = max(self.size, self.least)
        return [small for small in (size, size // 2) if small >= self.least and 2 * small <= self.most]

    @property
    def interval(self) -> int:
        return TRIAL_SELDOM if all(map(self.is_decided, self.pairs)) else TRIAL_EVERY

    def pairs_for(self, rows: int) -> list[int]:
        """The pairs for which there are rows."""
        return [small for small in self.pairs if rows >= 2 * small]

    def begin_trial(self, rows: int) -> None:
        """Begin a trial of a pair for which there are rows, of both in turn, each in both orders."""
        if pairs := self.pairs_for(rows):
            small = pairs[self.turn % len(pairs)]
            plan = [small, small, 2 * small]
            self.plan = plan[::-1] if self.turn // 2 % 2 else plan
            self.turn += 1
            self.since = 0

    def end_trial(self) -> None:
        self.plan, self.ticks, self.waits = [], [], False

    def bounds(self, small: int) -> tuple[float, float]:
        """Between these is the best rate of larger sizes, relative to that of `small`, in 96 of 100 cases.

        Of the median of the trials, by order statistics: no rare disturbance shifts it, however long.
        """
        gains = sorted(self.samples.get(small, ()))
        if len(gains) < FEWEST:
            return 0.0, math.inf
        beyond = self.beyond(2 * small)
        rank = int(len(gains) / 2 - math.sqrt(len(gains)))
        return gains[rank] * beyond, gains[-1 - rank] * beyond

    def is_decided(self, small: int) -> bool:
        low, high = self.bounds(small)
        return low > 1 / RAISE_BELOW or high < 1 / LOWER_ABOVE or len(self.samples.get(small, ())) == MOST

    def beyond(self, size: int) -> float:
        """The best rate of this size and the larger ones, relative to that of this one."""
        best = rate = 1.0
        while 2 * size <= self.most and (gain := self.gain(size)) is not None:
            rate *= gain
            best, size = max(best, rate), 2 * size
        return best

    def gain(self, small: int) -> float | None:
        gains = self.samples.get(small, ())
        return median(gains) if len(gains) >= FEWEST else self.gains.get(small)

    def gain_at(self, rows: int) -> float:
        """The gain of twice as many rows as `rows`; 1 if it was never measured."""
        gain = self.gain(step_of(rows))
        return 1.0 if gain is None else gain

    def decide(self, small: int) -> None:
        """Move by one step if the trials of this pair say so."""
        low, high = self.bounds(small)
        if small >= self.size and low > 1 / RAISE_BELOW:
            self.move(2 * small)
        elif 2 * small == self.size and high < 1 / LOWER_ABOVE:
            self.move(small)

    def move(self, size: int) -> None:
        log.info("ticks take %d rows from now on, not %d", size, self.size)
        self.size = size
        for small in set(self.samples) - {size, size // 2}:
            self.gains[small] = median(self.samples.pop(small))  # it may be long until they are tried again


def step_of(rows: int) -> int:
    """The least of 1, 2, 4 ... that is as large."""
    return 1 << (rows - 1).bit_length()


def open_budget(engine: Engine, size: int) -> tuple[RowBudget, TickTimes]:
    """The budget of `size` rows, or the measured one for 0. On a device the gains are measured in any case."""
    if size and not isinstance(engine, DeviceEngine):
        return RowBudget(size), TickTimes()
    budget, times = measure_budget(engine)
    return (RowBudget(size, budget.gains, fixed=True) if size else budget), times


def measure_budget(engine: Engine, seconds: float = 0.6) -> tuple[RowBudget, TickTimes]:
    """The smallest number of denoise rows within 5 % of the best rows per second, from 1, 2, 4 ... 64.

    Also returns the seconds of a tick with one row, and those per row at that number. Warms the engine up. Takes about
    `seconds`, or two ticks of one row if they take longer. All numbers are measured in turn and the best time of each
    counts, so that a moment in which the machine was busy does not decide. Sizes at which the engine fails, perhaps
    because memory runs out, are left out.
    """
    rng = np.random.default_rng(0)
    config = engine.config
    row = Denoise(rng.standard_normal(config.latent_shape, dtype=np.float32), 0.5, config.null_label)
    engine.run([row])
    deadline = time.perf_counter() + seconds
    best = {1: timed(engine, [row])}
    most = MAX_BUDGET
    for _ in range(MEASURE_ROUNDS):
        for size in (2**power for power in range(most.bit_length())):
            if time.perf_counter() + best.get(size, 2 * best[max(1, size // 2)]) > deadline:
                break
            try:
                best[size] = min(best.get(size, math.inf), timed(engine, [row] * size))
            except Exception as error:
                if size == 1:
                    raise
                log.warning("the engine cannot run %d rows in a tick, so it runs fewer: %s", size, error)
                most = size // 2
                break
    rates = {size: size / duration for size, duration in best.items() if size <= most}
    size = min(size for size, rate in rates.items() if rate >= NEARLY_BEST * max(rates.values()))
    gains = {small: rates[2 * small] / rates[small] for small in rates if 2 * small in rates}
    return RowBudget(size, gains, most), TickTimes(tick=best[1], row=best[size] / size)


def timed(engine: Engine, rows: Sequence[Row]) -> float:
    began = time.perf_counter()
    engine.run(rows)
    return time.perf_counter() - began
