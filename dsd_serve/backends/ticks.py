"""Ticks in flight: one on an engine in this thread, two on a device, which runs one while Python advances the other."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from dsd_serve.backends.program_job import ProgramJob
from dsd_serve.backends.row_budget import RowBudget
from dsd_serve.backends.tick_times import TickTimes, average
from dsd_serve.rows import Array, DeviceEngine, Engine, Row


@dataclass
class Tick:
    """A tick that has begun. rows: those of `jobs`, in order. wait: returns their outputs."""

    jobs: Sequence[ProgramJob]
    rows: Sequence[Row]
    began: float
    wait: Callable[[], list[Array]]


class Ticks:
    """The ticks that an engine has begun and that have not ended, in order. depth: the most of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.depth = 2 if isinstance(engine, DeviceEngine) else 1
        self.begun: deque[Tick] = deque()
        self.last_end = 0.0
        self.python_row = 0.0  # average seconds that advancing the programs of a tick takes for each of its rows

    def __len__(self) -> int:
        return len(self.begun)

    @property
    def busy_since(self) -> float | None:
        """When the oldest tick began, if there is one."""
        try:
            return self.begun[0].began
        except IndexError:
            return None

    def begin(self, jobs: Sequence[ProgramJob]) -> None:
        """Begin a tick with the rows of these jobs. An engine without `start` runs it when it is waited for, and an
        error of `start` comes then too."""
        rows = [row for job in jobs for row in job.rows]
        began = time.monotonic()
        wait: Callable[[], list[Array]] = partial(self.engine.run, rows)
        if isinstance(self.engine, DeviceEngine):
            try:
                wait = self.engine.start(rows)
            except Exception as error:
                wait = partial(fail, error)
        for job in jobs:
            job.in_tick = True
        self.begun.append(Tick(jobs, rows, began, wait))

    def end(self) -> tuple[Tick, list[Array] | Exception, float]:
        """Wait for the oldest tick: its outputs or the engine's error, and the seconds for which the engine ran it."""
        tick = self.begun[0]
        outputs: list[Array] | Exception
        try:
            outputs = tick.wait()
        except Exception as error:
            outputs = error
        ended = time.monotonic()
        seconds = ended - max(tick.began, self.last_end)
        self.last_end = ended
        self.begun.popleft()
        for job in tick.jobs:
            job.in_tick = False
        return tick, outputs, seconds

    def programs_advanced(self, rows: int) -> None:
        """Since the end of the last tick, of so many rows, its programs were advanced."""
        self.python_row = average(self.python_row, (time.monotonic() - self.last_end) / rows)

    def share_of(self, rows: int, limit: int, budget: RowBudget, times: TickTimes) -> int:
        """The most rows of the next tick, of `rows` in all: half of them where two ticks at a time pay, else `limit`.

        A device takes longer for two halves than for the whole, but Python's time for one half is hidden.
        """
        half = -(-rows // 2)
        if self.depth == 1 or half >= limit:
            return limit
        longer = (budget.gain_at(half) - 1) * times.row
        return half if self.python_row > longer else limit


def fail(error: Exception) -> NoReturn:
    raise error
