"""The batcher: many programs on one engine, their rows mixed in every tick.

A tick takes the rows that programs are waiting for, runs the engine once and returns the outputs. Programs join and
leave between ticks, so requests of different kinds, samplers and step counts share batches, and none waits for the last
step of another. The rows of one yield always go in the same tick. Results equal those of `programs.run`, independent of
the other programs.

On a GPU two ticks are in flight: while it runs the rows of some programs, Python advances the others.
"""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsd_serve.backends import Observer, outcome_of
from dsd_serve.backends.admission import Admission
from dsd_serve.backends.program_job import ProgramJob
from dsd_serve.backends.row_budget import open_budget
from dsd_serve.backends.ticks import Ticks
from dsd_serve.errors import CancelledError, ClosedError, DeadlineError, DSDError, EngineError, QueueFullError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array, Cost, Engine, OnPreview, Program, Row, count_rows

log = logging.getLogger(__name__)

DEAD_AFTER = 3  # failed ticks in a row
STALLED_AFTER = 10.0  # seconds, plus twenty average ticks, after which an engine call counts as hanging
ONE_ROW = Cost(1, 1)


class Batcher:
    """One thread that runs the programs on the engine. All methods may be called from any thread.

    budget: maximum number of rows per tick; 0 measures the best number. max_waiting: maximum number of waiting
    programs. max_seconds: maximum estimated work ahead of a program. Beyond either, QueueFullError.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        budget: int = 0,
        max_waiting: int = 256,
        max_seconds: float = math.inf,
        observer: Observer | None = None,
    ) -> None:
        self.engine = engine
        self.observer = observer or Observer()
        self.admission = Admission(max_waiting, max_seconds, self.observer)
        self.ticks = Ticks(engine)
        self.row_budget, self.times = open_budget(engine, budget)
        self.waiting: deque[ProgramJob] = deque()
        self.running: list[ProgramJob] = []
        self.condition = threading.Condition()
        self.numbers = itertools.count()
        self.closed = False
        self.dead: str | None = None
        self.failures = self.num_ticks = self.num_rows = 0
        self.thread = threading.Thread(target=self.loop, name="batcher", daemon=True)
        self.thread.start()

    # For callers.

    def submit(self, program: Program, cost: Cost = ONE_ROW, *, timeout: float | None = None) -> ProgramJob:
        """Put a program in the queue: `submit_all` of one."""
        return self.submit_all([(program, cost)], timeout=timeout)[0]

    def submit_all(self, programs: Sequence[tuple[Program, Cost]], *, timeout: float | None = None) -> list[ProgramJob]:
        """Put several programs with their costs in the queue, all or none.

        timeout: seconds after which their results are useless. Raises QueueFullError; DeadlineError when the results
        cannot be expected in time; ClosedError once the batcher drains or its engine is dead.
        """
        with self.condition:
            try:
                self.admit([cost for _, cost in programs], timeout)
            except DSDError:
                for program, _ in programs:
                    program.close()
                raise
            return self.put(programs, math.inf if timeout is None else time.monotonic() + timeout)

    def put(self, programs: Sequence[tuple[Program, Cost]], deadline: float = math.inf) -> list[ProgramJob]:
        """Put programs that were already admitted into the queue. deadline: of `time.monotonic`. Raises ClosedError
        if the engine is dead."""
        with self.condition:
            if self.dead:
                raise ClosedError(self.dead)
            jobs = [ProgramJob(next(self.numbers), deadline, one, rows_left=cost.rows) for one, cost in programs]
            self.waiting.extend(jobs)
            self.condition.notify()
            return jobs

    def submit_tasks(
        self, tasks: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> list[ProgramJob]:
        """`submit_all` with the programs of these tasks. on_preview: called from the batcher's thread."""
        return self.submit_all(self.programs_of(tasks, on_preview), timeout=timeout)

    def put_tasks(self, tasks: Sequence[Task], deadline: float, on_preview: OnPreviews | None) -> list[ProgramJob]:
        """`put` with the programs of these tasks."""
        return self.put(self.programs_of(tasks, on_preview), deadline)

    def programs_of(self, tasks: Sequence[Task], on_preview: OnPreviews | None) -> list[tuple[Program, Cost]]:
        def previews_of(number: int) -> OnPreview | None:
            return None if on_preview is None else lambda step, pixels: on_preview(number, step, pixels)

        config = self.engine.config
        return [(task.program(config, previews_of(number)), task.cost) for number, task in enumerate(tasks)]

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """The error if there is no room for `count` more programs now, else None."""
        with self.condition:
            return self.admission.queue_full(count, self.num_waiting, self.seconds_ahead())

    def admit(self, costs: Sequence[Cost], timeout: float | None) -> None:
        if self.dead or self.closed:
            self.observer.rejected("dead" if self.dead else "draining")
            raise ClosedError(self.dead or "the server is shutting down")
        self.admission.check(costs, timeout, self.num_waiting, self.seconds_ahead(), self.times)

    def seconds_ahead(self) -> float:
        """Estimated seconds until the queued and running programs are done."""
        with self.condition:  # the lists change meanwhile
            return self.times.of_rows(sum(job.rows_left for job in (*self.running, *self.waiting)))

    @property
    def budget(self) -> int:
        """Rows a tick."""
        return self.row_budget.size

    @property
    def num_running(self) -> int:
        """Programs that have started."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Programs in the queue."""
        return len(self.waiting)

    @property
    def not_ready(self) -> str | None:
        """The reason why nothing is served now, or None."""
        if self.dead or self.closed:
            return self.dead or "the server is shutting down"
        since = self.ticks.busy_since
        if since is not None and (stalled := time.monotonic() - since) > STALLED_AFTER + 20 * self.times.tick:
            return f"the engine has not answered for {stalled:.0f} s"
        return None if self.thread.is_alive() else "the batcher's thread is dead"

    @property
    def ready(self) -> bool:
        return self.not_ready is None

    @property
    def given_up(self) -> str | None:
        """The reason why nothing will ever be served again, or None."""
        return self.dead

    def snapshot(self) -> dict[str, Any]:
        """The running and waiting programs, as plain values."""
        with self.condition:
            running, waiting = list(self.running), list(self.waiting)
        return {
            "budget": self.budget,
            "ticks": self.num_ticks,
            "rows": self.num_rows,
            "row_ms": round(1000 * self.times.row, 3),
            "tick_ms": round(1000 * self.times.tick, 3),
            "seconds_ahead": round(self.seconds_ahead(), 3),
            "not_ready": self.not_ready,
            "running": [job.snapshot() for job in running],
            "waiting": [job.snapshot() for job in waiting],
        }

    def drain(self) -> None:
        """Accept nothing more, and finish what was accepted."""
        with self.condition:
            self.closed = True
            self.condition.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all programs finished."""
        self.drain()
        self.thread.join(timeout)
        finished = not self.thread.is_alive()
        if not finished:
            with self.condition:
                for job in (*self.waiting, *self.running):
                    job.cancel()
            self.thread.join()
        return finished

    # In the thread.

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
        """Begin a tick if programs wait for one, and end the oldest once the engine has as many as it takes."""
        if self.ticks and self.row_budget.on_trial(self.rows_now):
            self.end_tick()  # the times of a trial are those of ticks that run alone
            return
        if chosen := self.choose():
            self.ticks.begin(chosen)
        if self.ticks and (len(self.ticks) == self.ticks.depth or not chosen):
            self.end_tick()

    def end_tick(self) -> None:
        """Wait for the oldest tick, and send its outputs to its programs."""
        tick, outputs, seconds = self.ticks.end()
        if isinstance(outputs, Exception):
            if not self.row_budget.failed():
                self.engine_failed([job for job in tick.jobs if not job.future.done()], outputs)
            return
        self.note(tick.rows, seconds)
        results = iter(outputs)
        for job in tick.jobs:
            own = [next(results) for _ in job.rows]
            job.rows_left = max(0, job.rows_left - len(own))
            if job.future.done():
                continue  # it was cancelled, or was late, while the engine ran
            if all(np.isfinite(output).all() for output in own if output.dtype != np.uint8):
                self.advance(job, own)
            else:
                self.end(job, error=EngineError("the network gave values that are not finite for this image"))
        self.ticks.programs_advanced(len(tick.rows))

    def note(self, rows: Sequence[Row], seconds: float) -> None:
        """Update counts and averages."""
        self.observer.tick(count_rows(rows), seconds)
        self.times.note(len(rows), seconds, self.budget)
        self.row_budget.note(len(rows), seconds)
        self.failures, self.num_ticks, self.num_rows = 0, self.num_ticks + 1, self.num_rows + len(rows)

    def choose(self) -> list[ProgramJob]:
        """The jobs of this tick: encode and decode rows first, then first come, first served, within the budget."""
        self.drop_ended()
        rows = self.rows_now
        limit = self.row_budget.limit(rows)
        if not self.row_budget.plan:
            limit = self.ticks.share_of(rows, limit, self.row_budget, self.times)
        chosen: list[ProgramJob] = []
        used = 0
        ready = [job for job in self.running if not job.in_tick]
        for job in sorted(ready, key=lambda job: (not job.only_codes, job.number)):
            if not chosen or used + len(job.rows) <= limit:
                chosen.append(job)
                used += len(job.rows)
        while used < limit and (started := self.start_next()) is not None:
            if chosen and used + len(started.rows) > limit:
                break  # it runs, and has its turn in the next tick
            chosen.append(started)
            used += len(started.rows)
        return chosen

    @property
    def rows_now(self) -> int:
        """Rows that programs wait for, if each in the queue waits for one."""
        return sum(len(job.rows) for job in self.running) + len(self.waiting)

    def drop_ended(self) -> None:
        """End the jobs that were cancelled or have missed their deadlines."""
        now = time.monotonic()
        with self.condition:
            ended = [job for job in (*self.running, *self.waiting) if job.cancelled or job.deadline < now]
        for job in ended:
            if job.cancelled:
                self.end(job, error=CancelledError("the job was cancelled"))
            else:
                self.end(job, error=DeadlineError("the result was not ready in time and was dropped"))

    def start_next(self) -> ProgramJob | None:
        """Move the first waiting job to the running ones; jobs that end at once do not count."""
        while True:
            with self.condition:
                if not self.waiting:
                    return None
                job = self.waiting.popleft()
                self.running.append(job)
            job.started = time.monotonic()
            self.observer.started(job.started - job.submitted)
            self.advance(job, None)
            if job.rows:
                return job

    def advance(self, job: ProgramJob, outputs: list[Array] | None) -> None:
        """Send a program its outputs; note the rows that it yields next, or its end."""
        job.rows = []
        try:
            rows = next(job.program) if outputs is None else job.program.send(outputs)
            if not rows:
                raise EngineError("a program yielded no rows")
            job.rows = rows
        except StopIteration as stop:
            self.end(job, stop.value)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("a program failed")
            self.end(job, error=error)

    def end(self, job: ProgramJob, result: Any = None, *, error: Exception | None = None) -> None:
        """Remove a job and resolve its future."""
        with self.condition:
            if job in self.running:
                self.running.remove(job)
            elif job in self.waiting:
                self.waiting.remove(job)
        job.program.close()
        self.observer.finished(outcome_of(error))
        job.resolve(result, error)

    def engine_failed(self, chosen: list[ProgramJob], error: Exception) -> None:
        """Fail the programs of this tick. The engine counts as dead if it says so, or after several such ticks."""
        log.error("the engine failed", exc_info=error)
        self.failures += 1
        failed = error if isinstance(error, DSDError) else EngineError(f"the engine failed: {error}")
        for job in chosen:
            self.end(job, error=failed)
        if isinstance(failed, EngineError) and failed.fatal:
            self.die(str(failed))
        elif self.failures >= DEAD_AFTER:
            self.die(f"the engine failed {self.failures} times in a row; the last time: {error}")

    def die(self, reason: str) -> None:
        with self.condition:
            self.dead = reason
            jobs = [*self.running, *self.waiting]
        for job in jobs:
            self.end(job, error=ClosedError(reason))
