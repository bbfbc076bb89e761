"""A backend whose tasks travel as messages to another process, which carries them out with a `TaskServer`.

Tasks are admitted here, with the figures that the other process reports, so that a caller never waits.
"""

import logging
import threading
from collections.abc import Sequence
from typing import Any

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.admission import Admission
from dsd_serve.backends.process import engine_messages as messages
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.backends.process.process_jobs import JobTable, ProcessJob, check_array, submission
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.errors import ClosedError, QueueFullError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array, RowCounts

log = logging.getLogger(__name__)


class MessageBackend:
    """The tasks in another process, as of its messages. Its methods for callers may be called from any thread.

    observer: of the other process's work. admission: with an observer of its refusals.
    """

    info: ModelInfo

    def __init__(self, admission: Admission, observer: Observer) -> None:
        self.admission, self.observer = admission, observer
        self.jobs = JobTable(observer)
        self.changed: threading.Condition = self.jobs.changed
        self.closed = False
        self.reason: str | None = None  # why it is not ready
        self.status = messages.Status(None, 0.0, 0.0, [])
        self.times = TickTimes()

    @property
    def mailbox(self) -> Mailbox | None:
        """To the other process, if there is one."""
        raise NotImplementedError

    # For callers.

    def submit_tasks(
        self, tasks: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> list[ProcessJob]:
        """Send tasks to the process; see `Batcher.submit_tasks`. on_preview: called from the thread of the mailbox.

        Raises ClosedError while the process is not ready.
        """
        with self.changed:
            reason, mailbox = self.not_ready, self.mailbox
            if reason is not None or mailbox is None:
                self.admission.observer.rejected("draining" if self.closed else "dead")
                raise ClosedError(reason or "the process that draws has ended")
            costs = [task.cost for task in tasks]
            self.admission.check(costs, timeout, self.num_waiting, self.seconds_ahead(), self.times)
            jobs = self.jobs.add(tasks, timeout, on_preview, lambda number: self.send(messages.Cancel(number)))
            mailbox.put(*submission(jobs, tasks))
        return jobs

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """The error if there is no room for `count` more tasks now, else None."""
        return self.admission.queue_full(count, self.num_waiting, self.seconds_ahead())

    def seconds_ahead(self) -> float:
        """Estimated seconds until the queued and running tasks are done."""
        return self.times.of_rows(self.jobs.rows_left) + self.status.others_seconds

    @property
    def budget(self) -> int:
        return self.status.budget

    @property
    def num_running(self) -> int:
        return self.jobs.num_running + self.status.others_running

    @property
    def num_waiting(self) -> int:
        return self.jobs.num_waiting + self.status.others_waiting

    @property
    def not_ready(self) -> str | None:
        """The reason why nothing is served now, or None."""
        return "the server is shutting down" if self.closed else self.reason

    @property
    def ready(self) -> bool:
        return self.not_ready is None

    def drain(self) -> None:
        """Accept nothing more, and finish what was accepted."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def end_jobs(self, timeout: float | None, last: float) -> bool:
        """Wait until all tasks have ended; after `timeout` seconds cancel the rest, which then have `last` seconds.

        True if all finished.
        """
        finished = self.jobs.wait(timeout)
        for job in self.jobs.all():
            job.cancel()
        self.jobs.wait(last)
        return finished

    def send(self, message: Any) -> None:
        """Send a message to the process, if there is one."""
        mailbox = self.mailbox
        if mailbox is not None:
            mailbox.put(message)

    # In the thread of the mailbox.

    def take_of_tasks(self, message: Any, arrays: Sequence[Array]) -> None:
        """Act on a message about tasks; others have no effect."""
        match message:
            case messages.Tick():
                rows = RowCounts(message.encode, message.denoise, message.decode)
                self.observer.tick(rows, message.seconds)
            case messages.Started():
                self.jobs.note_start(message.number, message.at)
            case messages.PreviewMade():
                self.preview(message, arrays[0])
            case messages.Finished():
                self.finish(message, arrays[0])
            case messages.Failed():
                self.jobs.note_start(message.number, message.started)
                self.jobs.end(message.number, error=messages.error_of(message.failure))
            case messages.Status():
                self.status, self.times = message, TickTimes(message.tick, message.row)
                self.jobs.note_running(message.running)

    def preview(self, message: messages.PreviewMade, pixels: Array) -> None:
        job = self.jobs.get(message.number)
        if job is not None and job.on_preview is not None:
            check_array(pixels, "preview", self.info.config)
            try:
                job.on_preview(job.place, message.step, pixels)
            except Exception as error:  # of the caller's own code
                log.exception("a preview could not be passed on")
                job.cancel()
                self.jobs.end(job.number, error=error)

    def finish(self, message: messages.Finished, result: Array) -> None:
        job = self.jobs.get(message.number)
        if job is not None:
            check_array(result[None], job.output, self.info.config)
            self.succeeded()
            self.jobs.note_start(message.number, message.started)
            self.jobs.end(message.number, result)

    def succeeded(self) -> None:
        """A task is done."""
