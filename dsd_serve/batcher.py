"""The batcher: many programs on one engine, their rows mixed in every tick.

A tick takes the rows that programs wait for, runs the engine once and sends the outputs back. Programs join and leave
between ticks, so requests of different kinds, samplers and step counts share batches and nobody waits for a stranger's
last step. The rows of one yield always go in the same tick. Results equal those of `programs.run`, whatever the
company.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsd_serve.engines import Engine
from dsd_serve.errors import CancelledError, ClosedError, DSDError, EngineError, QueueFullError
from dsd_serve.programs import Program
from dsd_serve.rows import Array, Denoise, Row

log = logging.getLogger(__name__)

MAX_BUDGET = 64
NEARLY_BEST = 0.95  # of the best rate: more rows than that would only delay everyone
DEAD_AFTER = 3  # failed ticks in a row


@dataclass(eq=False)
class Job:
    """A program on its way. `future` gets its result, or an error; `cancel` takes effect at the next tick."""

    program: Program
    cost: int
    number: int
    future: "Future[Any]" = field(default_factory=Future)
    rows: list[Row] = field(default_factory=list)
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def is_border(self) -> bool:
        """Whether it waits for encode or decode rows only: these go first, they end or begin a picture."""
        return not any(isinstance(row, Denoise) for row in self.rows)


class Observer:
    """What a batcher tells of its work, from its own thread. The methods do nothing; override those of interest."""

    def tick(self, rows: Sequence[Row], seconds: float) -> None:
        """One engine call took `seconds`."""

    def started(self, waited: float) -> None:
        """A program left the queue after `waited` seconds."""

    def finished(self, outcome: str) -> None:
        """A program ended: done, failed or cancelled."""

    def rejected(self, reason: str) -> None:
        """Programs were refused: queue_full, deadline, draining or dead."""


class Batcher:
    """Owns one thread and the engine. All methods may be called from any thread.

    budget: rows per tick; 0 measures it. max_waiting: programs that may wait; one more raises QueueFullError.
    """

    def __init__(
        self, engine: Engine, *, budget: int = 0, max_waiting: int = 256, observer: Observer | None = None
    ) -> None:
        self.engine, self.max_waiting, self.observer = engine, max_waiting, observer or Observer()
        self.budget = budget or measure_budget(engine)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.condition = threading.Condition()
        self.numbers = itertools.count()
        self.closed = False
        self.dead: str | None = None
        self.failures = 0
        self.num_ticks = 0
        self.num_rows = 0
        self.row_seconds = 0.0  # moving average
        self.thread = threading.Thread(target=self.loop, name="batcher", daemon=True)
        self.thread.start()

    # What callers use.

    def submit(self, program: Program, *, cost: int = 1) -> Job:
        """Put a program in the queue. cost: rows that it will take, for the estimate of waiting time.

        Raises QueueFullError, or ClosedError once the batcher drains or its engine is dead.
        """
        return self.submit_all([(program, cost)])[0]

    def submit_all(self, programs: Sequence[tuple[Program, int]]) -> list[Job]:
        """Put several (program, cost) in the queue, all or none."""
        with self.condition:
            if self.dead or self.closed:
                self.observer.rejected("dead" if self.dead else "draining")
                raise ClosedError(self.dead or "the server is shutting down")
            if len(self.waiting) + len(programs) > self.max_waiting:
                self.observer.rejected("queue_full")
                raise QueueFullError(
                    f"{len(self.waiting)} images are waiting, {len(programs)} more would exceed the limit of "
                    f"{self.max_waiting}; try again later",
                    self.seconds_ahead(),
                )
            jobs = [Job(program, cost, next(self.numbers)) for program, cost in programs]
            self.waiting.extend(jobs)
            self.condition.notify()
            return jobs

    def seconds_ahead(self) -> float:
        """Estimated seconds until what is queued and running now is done."""
        return sum(job.cost for job in itertools.chain(self.running, self.waiting)) * self.row_seconds

    @property
    def ready(self) -> bool:
        return self.dead is None and not self.closed and self.thread.is_alive()

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more and finish what is there; after `timeout` seconds cancel the rest. True if all finished."""
        with self.condition:
            self.closed = True
            self.condition.notify()
        self.thread.join(timeout)
        finished = not self.thread.is_alive()
        if not finished:
            with self.condition:
                for job in (*self.waiting, *self.running):
                    job.cancel()
            self.thread.join()
        return finished

    # The thread.

    def loop(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.waiting or self.running or self.closed)
                if self.closed and not self.waiting and not self.running:
                    return
            try:
                self.tick()
            except BaseException as error:  # a bug of ours: never leave callers waiting
                log.exception("the batcher failed")
                self.die(f"the batcher failed: {error!r}")
                return
            if self.dead:
                return

    def tick(self) -> None:
        chosen = self.choose()
        if not chosen:
            return
        rows = [row for job in chosen for row in job.rows]
        began = time.perf_counter()
        try:
            outputs = self.engine.run(rows)
        except Exception as error:
            self.engine_failed(chosen, error)
            return
        elapsed = time.perf_counter() - began
        self.observer.tick(rows, elapsed)
        seconds = elapsed / len(rows)
        self.row_seconds += (seconds - self.row_seconds) * (0.1 if self.num_ticks else 1.0)
        self.failures, self.num_ticks, self.num_rows = 0, self.num_ticks + 1, self.num_rows + len(rows)
        results = iter(outputs)
        for job in chosen:
            job.cost = max(0, job.cost - len(job.rows))
            self.advance(job, [next(results) for _ in job.rows])

    def choose(self) -> list[Job]:
        """The jobs whose rows make up this tick: borders first, then first come, first served, within the budget."""
        self.drop_cancelled()
        chosen: list[Job] = []
        used = 0
        for job in sorted(self.running, key=lambda job: (not job.is_border, job.number)):
            if not chosen or used + len(job.rows) <= self.budget:
                chosen.append(job)
                used += len(job.rows)
        while used < self.budget and (started := self.start_next()) is not None:
            if chosen and used + len(started.rows) > self.budget:
                break  # it runs, and has its turn in the next tick
            chosen.append(started)
            used += len(started.rows)
        return chosen

    def drop_cancelled(self) -> None:
        with self.condition:
            cancelled = [job for job in (*self.running, *self.waiting) if job.cancelled]
            self.running = [job for job in self.running if not job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for job in cancelled:
            job.program.close()
            self.finish(job, error=CancelledError("the job was cancelled"))

    def start_next(self) -> Job | None:
        """Move the first waiting job to the running ones; jobs that end at once do not count."""
        while True:
            with self.condition:
                if not self.waiting:
                    return None
                job = self.waiting.popleft()
                self.running.append(job)
            self.observer.started(time.monotonic() - job.submitted)
            self.advance(job, None)
            if job.rows:
                return job

    def advance(self, job: Job, outputs: list[Array] | None) -> None:
        """Send a program its outputs; note the rows that it yields next, or its end."""
        job.rows = []
        try:
            rows = next(job.program) if outputs is None else job.program.send(outputs)
            if not rows:
                raise EngineError("a program yielded no rows")
            job.rows = rows
            return
        except StopIteration as stop:
            self.finish(job, stop.value)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("a program failed")
            self.finish(job, error=error)
        with self.condition:
            self.running.remove(job)

    def engine_failed(self, chosen: list[Job], error: Exception) -> None:
        """Fail the programs of this tick; after several such ticks in a row the engine counts as dead."""
        log.error("the engine failed", exc_info=error)
        self.failures += 1
        with self.condition:
            self.running = [job for job in self.running if job not in chosen]
        for job in chosen:
            job.program.close()
            self.finish(job, error=error if isinstance(error, DSDError) else EngineError(f"the engine failed: {error}"))
        if self.failures >= DEAD_AFTER:
            self.die(f"the engine failed {self.failures} times in a row; the last time: {error}")

    def die(self, reason: str) -> None:
        with self.condition:
            self.dead = reason
            jobs = [*self.running, *self.waiting]
            self.running, self.waiting = [], deque()
        for job in jobs:
            self.finish(job, error=ClosedError(reason))

    def finish(self, job: Job, result: Any = None, *, error: BaseException | None = None) -> None:
        outcome = "done" if error is None else "cancelled" if isinstance(error, CancelledError) else "failed"
        self.observer.finished(outcome)
        if not job.future.set_running_or_notify_cancel():
            return  # the caller cancelled the future itself
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)


def measure_budget(engine: Engine, seconds: float = 1.0) -> int:
    """The smallest number of denoise rows within 5 % of the best rows per second, from 1, 2, 4 ... 64.

    Also warms the engine up. Takes about `seconds`, or a few ticks where a tick is longer.
    """
    rng = np.random.default_rng(0)
    config = engine.config
    row = Denoise(rng.standard_normal(config.latent_shape, dtype=np.float32), 0.5, config.null_label)
    engine.run([row])
    rates: dict[int, float] = {}
    deadline = time.perf_counter() + seconds
    size = 1
    while size <= MAX_BUDGET:
        best = min(timed(engine, [row] * size) for _ in range(3))
        rates[size] = size / best
        # Past the knee more rows do not help; a slow engine is not kept busy for the sake of a measurement.
        if time.perf_counter() > deadline or rates[size] < NEARLY_BEST * max(rates.values()):
            break
        size *= 2
    return min(size for size, rate in rates.items() if rate >= NEARLY_BEST * max(rates.values()))


def timed(engine: Engine, rows: Sequence[Row]) -> float:
    began = time.perf_counter()
    engine.run(rows)
    return time.perf_counter() - began
