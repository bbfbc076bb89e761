"""Tasks of another process, carried out by a backend of this one: the other end is a `MessageBackend`."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from dsd_serve.backends import Backend, Job, ModelInfo, task_messages
from dsd_serve.backends.process.engine_messages import (
    Cancel,
    Failed,
    Finished,
    PreviewMade,
    RunningTask,
    Started,
    Status,
    Submit,
    failure_of,
    head_of,
)
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.errors import DSDError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array

log = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds between two messages of status; the other end waits for them
STATUS_EVERY = 0.1  # the same while there is work

Accept = Callable[[Sequence[Task], float, OnPreviews | None], Sequence[Job]]


class TaskServer:
    """The tasks by their numbers there, and the mailbox to the other process. Used by the thread of the mailbox only.

    accept: gives tasks with their deadline, of `time.monotonic`, to the backend. Its errors fail them.
    """

    def __init__(self, mailbox: Mailbox, backend: Backend, info: ModelInfo, accept: Accept) -> None:
        self.mailbox, self.backend, self.info, self.accept = mailbox, backend, info, accept
        self.lock = threading.Lock()
        self.jobs: dict[int, Job] = {}
        self.unstarted: deque[tuple[int, Job]] = deque()  # in the order in which they are likely to start
        self.reported = 0.0  # when the last status was sent
        self.worked = False  # whether there was work then

    def take(self, message: Any, arrays: Sequence[Array]) -> None:
        """Act on a message of the other process; those that are not about tasks have no effect."""
        if isinstance(message, Submit):
            self.submit(message, arrays)
        elif isinstance(message, Cancel) and (job := self.jobs.get(message.number)) is not None:
            job.cancel()

    def submit(self, message: Submit, arrays: Sequence[Array]) -> None:
        """Accept the tasks of one request, or fail them all."""
        sent, rest = message.tasks, iter(arrays)
        numbers = [task.number for task in sent]

        def on_preview(place: int, step: int, pixels: Array) -> None:
            self.mailbox.put(PreviewMade(numbers[place], step, head_of(pixels)), [pixels])

        try:
            tasks: list[Task] = []
            for task in sent:
                inputs = {name: next(rest) for name in task.arrays}
                tasks += task_messages.from_wire(inputs, task.parameters, self.info.config, self.info.defaults)[0]
            previews = any(task.previews for task in sent)
            jobs = self.accept(tasks, min(task.deadline for task in sent), on_preview if previews else None)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("a task could not be accepted")
            for number in numbers:
                self.mailbox.put(Failed(number, 0.0, failure_of(error)))
            return
        for number, job in zip(numbers, jobs, strict=True):
            with self.lock:
                self.jobs[number] = job
            self.unstarted.append((number, job))
            job.future.add_done_callback(self.sender_of(number, job))

    def sender_of(self, number: int, job: Job) -> Callable[["Future[Any]"], None]:
        """Sends the end of a task, from the thread of the backend."""

        def send(future: "Future[Any]") -> None:
            with self.lock:
                self.jobs.pop(number, None)
            error = future.exception()
            if error is None:
                result = future.result()
                self.mailbox.put(Finished(number, job.started, head_of(result)), [result])
            else:
                self.mailbox.put(Failed(number, job.started, failure_of(error)))

        return send

    def all(self) -> list[tuple[int, Job]]:
        """The tasks that have not ended."""
        with self.lock:
            return list(self.jobs.items())

    def cancel_all(self) -> None:
        """Cancel the unfinished tasks, because their results are no longer needed."""
        for _, job in self.all():
            job.cancel()

    def report(self) -> float:
        """Send what is due: starts and the status. Returns the seconds until more is due."""
        self.report_started()
        now, busy = time.monotonic(), self.busy()
        period = STATUS_EVERY if busy else HEARTBEAT
        if now >= self.reported + period or (self.worked and not busy):
            self.mailbox.put(self.status(), wake=False)
            self.reported, self.worked = now, busy
        return self.reported + period - now

    def report_started(self) -> None:
        """Report the tasks that have left the queue."""
        while self.unstarted and (self.unstarted[0][1].started or self.unstarted[0][1].future.done()):
            number, job = self.unstarted.popleft()
            if job.started:
                self.mailbox.put(Started(number, job.started), wake=False)

    def busy(self) -> bool:
        """Whether the figures of the status change soon."""
        return bool(self.jobs)

    def status(self) -> Status:
        backend = self.backend
        return Status(backend.not_ready, backend.times.tick, backend.times.row, self.running(), backend.budget)

    def running(self) -> list[RunningTask]:
        """The tasks of the other process that have started."""
        return [RunningTask(number, job.rows_left, list(job.waits_for)) for number, job in self.all() if job.started]
