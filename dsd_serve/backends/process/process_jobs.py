"""The tasks in an engine process, for its server: the remaining work of each, and their results."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsd_serve.backends import Job, Observer, outcome_of
from dsd_serve.backends.process.engine_messages import BrokenMessage, RunningTask, Submit, TaskMessage, head_of
from dsd_serve.backends.task_messages import operation_of, output_shapes, to_wire
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CancelledError, DeadlineError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array

MARGIN = 5.0  # seconds after its deadline at which a task is dropped here if the process has not done so


@dataclass(eq=False)
class ProcessJob(Job):
    """A task in the engine process, without its pixels, which only the process needs.

    output: the name of its result. place: among the tasks of its request. kinds: of the rows that it waits for, as
    last reported.
    """

    output: str
    place: int
    on_preview: OnPreviews | None
    on_cancel: Callable[[int], None]
    kinds: Sequence[str] = ()

    @property
    def waits_for(self) -> Sequence[str]:
        return self.kinds

    def cancel(self) -> None:
        """Cancel it; takes effect at the next tick."""
        if not self.cancelled and not self.future.done():
            self.cancelled = True
            self.on_cancel(self.number)


def submission(jobs: Sequence[ProcessJob], tasks: Sequence[Task]) -> tuple[Submit, list[Array]]:
    """The message that submits tasks to the process, and its arrays."""
    sent: list[TaskMessage] = []
    arrays: list[Array] = []
    for job, task in zip(jobs, tasks, strict=True):
        inputs, parameters = to_wire(task)
        heads = {name: head_of(array) for name, array in inputs.items()}
        sent.append(TaskMessage(job.number, job.deadline, job.on_preview is not None, parameters, heads))
        arrays += inputs.values()
    return Submit(sent), arrays


def check_array(array: Array, name: str, config: ModelConfig) -> None:
    """Raises BrokenMessage for an output of one row that no process of this version sends."""
    dtype, shape = output_shapes(config)[name]
    if array.dtype != dtype or array.shape != tuple(1 if size < 0 else size for size in shape):
        raise BrokenMessage(f"{name} is {array.dtype.name} {list(array.shape)[:8]}")


class JobTable:
    """The jobs by their numbers. All methods may be called from any thread.

    changed: guards them, and is notified of each end.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.changed = threading.Condition()
        self.jobs: dict[int, ProcessJob] = {}
        self.numbers = itertools.count()

    def add(
        self,
        tasks: Sequence[Task],
        timeout: float | None,
        on_preview: OnPreviews | None,
        on_cancel: Callable[[int], None],
    ) -> list[ProcessJob]:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        jobs = [
            ProcessJob(
                next(self.numbers),
                deadline,
                operation_of(task).output,
                place,
                on_preview,
                on_cancel,
                rows_left=task.cost.rows,
            )
            for place, task in enumerate(tasks)
        ]
        with self.changed:
            self.jobs.update((job.number, job) for job in jobs)
        return jobs

    def get(self, number: int) -> ProcessJob | None:
        """A job that has not ended."""
        return self.jobs.get(number)

    def all(self) -> list[ProcessJob]:
        with self.changed:
            return list(self.jobs.values())

    def wait(self, timeout: float | None) -> bool:
        """Wait until all have ended; False if that takes longer."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.jobs, timeout)

    @property
    def num_running(self) -> int:
        return sum(bool(job.started) for job in self.all())

    @property
    def num_waiting(self) -> int:
        return sum(not job.started for job in self.all())

    @property
    def rows_left(self) -> int:
        return sum(job.rows_left for job in self.all())

    def note_running(self, running: Sequence[RunningTask]) -> None:
        """The process reports what is left of these."""
        with self.changed:
            for one in running:
                if (job := self.jobs.get(one.number)) is not None:
                    job.rows_left, job.kinds = one.rows_left, one.waits_for

    def note_start(self, number: int, at: float) -> None:
        """A job left the queue; `at` is 0 if it did not."""
        job = self.get(number)
        if job is not None and at and not job.started:
            job.started = max(at, job.submitted)
            self.observer.started(job.started - job.submitted)

    def end(self, number: int, result: Any = None, *, error: Exception | None = None) -> None:
        """Resolve the future of a job; nothing happens if it has ended already."""
        with self.changed:
            job = self.jobs.pop(number, None)
            self.changed.notify_all()
        if job is not None:
            self.observer.finished(outcome_of(error))
            job.resolve(result, error)

    def fail_all(self, make: Callable[[], Exception]) -> None:
        for job in self.all():
            self.end(job.number, error=make())

    def drop_late(self, now: float, hangs: bool) -> None:
        """End what the process should have ended. hangs: whether it ends nothing now."""
        for job in self.all():
            if now > job.deadline + (0 if hangs else MARGIN):
                self.end(job.number, error=DeadlineError("the result was not ready in time and was dropped"))
            elif job.cancelled and hangs:
                self.end(job.number, error=CancelledError("the job was cancelled"))

    def snapshot(self) -> dict[str, list[dict[str, Any]]]:
        """The running and the waiting ones, as plain values."""
        now = time.monotonic()
        shown: dict[str, list[dict[str, Any]]] = {"running": [], "waiting": []}
        for job in self.all():
            values = {"number": job.number, "rows_left": job.rows_left, "seconds": round(now - job.submitted, 3)}
            if job.started:
                shown["running"].append({**values, "waits_for": list(job.waits_for)})
            else:
                shown["waiting"].append(values)
        return shown
