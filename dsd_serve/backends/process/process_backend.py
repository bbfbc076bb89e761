"""The backend with an engine process: tasks travel to it as messages, and it is started again whenever it ends.

HTTP and the batcher then do not share an interpreter, and an engine that fails takes nothing with it but the tasks
that it had. Tasks are admitted here, with the figures that the process reports, so that a caller never waits.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.admission import Admission
from dsd_serve.backends.process import engine_messages as messages
from dsd_serve.backends.process.child_process import ChildProcess
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_jobs import JobTable, ProcessJob, check_array, submission
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.errors import ClosedError, DSDError, EngineUnavailableError, QueueFullError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array, RowCounts

log = logging.getLogger(__name__)

CHECK_EVERY = 0.5  # seconds between two checks of what is late
SILENT_AFTER = 8.0  # seconds without a message, of which one comes each second, after which the process hangs
HANGS_FOR = 60.0  # seconds for which it may hang before it is killed
LOAD_SILENCE = 600.0  # seconds without a message while it loads; some libraries let no other thread run meanwhile
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds before it is started again; doubles each time
GIVE_UP_AFTER = 5  # ends of the process with no task done in between
STOP_WITHIN = 3.0  # seconds for cancelled tasks to end, and for the process to end when asked to


class ProcessEnds(Exception):
    """The process has ended, or must be killed; the text is a clause that follows "the engine process"."""


class ProcessBackend:
    """Owns the engine process, and one thread that talks to it. All methods may be called from any thread.

    max_waiting, max_seconds: limits of the queue, as of `Batcher`. info: the model. Returns when the model is loaded.
    Raises CheckpointError and EngineUnavailableError as `loading.load` does.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        max_waiting: int = 1_000_000,
        max_seconds: float = math.inf,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.observer = observer or Observer()
        self.admission = Admission(max_waiting, max_seconds, self.observer)
        self.jobs = JobTable(self.observer)
        self.changed = self.jobs.changed  # guards the child and the reason too
        self.child: ChildProcess | None = None
        self.state = ""
        self.reason: str | None = "the engine process has not started"  # why it is not ready
        self.first: Future[ModelInfo] = Future()  # the model of the first process
        self.closed = False
        self.stop_at = math.inf  # when the process was told to end
        self.status = messages.Status(None, 0.0, 0.0, 0, 0, [], 0)
        self.times = TickTimes()
        self.loading = True
        self.heard = self.hanging_since = math.inf  # when the last message came, and since when it hangs
        self.restarts = 0
        self.ends = 0  # of the process, with no task done in between
        self.last_end = ""
        self.thread = threading.Thread(target=self.loop, name="engine-process", daemon=True)
        self.thread.start()
        self.info = self.first.result()

    # For callers.

    def submit_tasks(
        self, tasks: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> list[ProcessJob]:
        """Send tasks to the process; see `Batcher.submit_tasks`. on_preview: called from the thread.

        Raises ClosedError while the process is not ready.
        """
        with self.changed:
            reason, child = self.not_ready, self.child
            if reason is not None or child is None:
                self.observer.rejected("draining" if self.closed else "dead")
                raise ClosedError(reason or "the engine process has ended")
            costs = [task.cost for task in tasks]
            self.admission.check(costs, timeout, self.num_waiting, self.seconds_ahead(), self.times)
            jobs = self.jobs.add(tasks, timeout, on_preview, lambda number: self.send(messages.Cancel(number)))
            child.mailbox.put(*submission(jobs, tasks))
        return jobs

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """The error if there is no room for `count` more tasks now, else None."""
        return self.admission.queue_full(count, self.num_waiting, self.seconds_ahead())

    def seconds_ahead(self) -> float:
        """Estimated seconds until the queued and running tasks are done."""
        return self.times.of_rows(self.jobs.rows_left)

    @property
    def budget(self) -> int:
        return self.status.budget

    @property
    def num_running(self) -> int:
        return self.jobs.num_running

    @property
    def num_waiting(self) -> int:
        return self.jobs.num_waiting

    @property
    def not_ready(self) -> str | None:
        """The reason why nothing is served now, or None."""
        return "the server is shutting down" if self.closed else self.reason

    @property
    def ready(self) -> bool:
        return self.not_ready is None

    @property
    def given_up(self) -> str | None:
        """A reason once the process has ended several times with no task done in between, else None."""
        if self.ends < GIVE_UP_AFTER:
            return None
        return f"the engine process ended {self.ends} times with nothing done in between; at last it {self.last_end}"

    @property
    def pid(self) -> int | None:
        """The number of the process, if there is one."""
        child = self.child
        return None if child is None else child.process.pid

    def snapshot(self) -> dict[str, Any]:
        """The running and waiting tasks, as plain values, and the process."""
        status, times = self.status, self.times
        return {
            "budget": self.budget,
            "ticks": status.num_ticks,
            "rows": status.num_rows,
            "row_ms": round(1000 * times.row, 3),
            "tick_ms": round(1000 * times.tick, 3),
            "seconds_ahead": round(self.seconds_ahead(), 3),
            "not_ready": self.not_ready,
            "process": {"pid": self.pid, "restarts": self.restarts},
            **self.jobs.snapshot(),
        }

    def drain(self) -> None:
        """Accept nothing more, and finish what was accepted."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        self.drain()
        finished = self.jobs.wait(timeout)
        for job in self.jobs.all():
            job.cancel()
        self.jobs.wait(STOP_WITHIN)
        self.stop_at = min(self.stop_at, time.monotonic())
        self.send(messages.Stop())
        self.thread.join()
        return finished

    def send(self, message: messages.FromServer) -> None:
        """Send a message to the process, if there is one."""
        child = self.child
        if child is not None:
            child.mailbox.put(message)

    # In the thread.

    def loop(self) -> None:
        failed: DSDError | None = None
        while not self.closed:
            self.change("starting", "the engine process is starting")
            try:
                self.run_process()
            except ProcessEnds as end:
                self.last_end = str(end)
            except DSDError as error:  # it could not be started, or could not load the model
                self.last_end, failed = f"cannot serve: {error}", error
            except Exception as error:  # a bug of ours: the process goes, and this thread stays
                log.exception("a message of the engine process cannot be processed")
                self.last_end = f"was killed because of {error!r}"
            if not self.first.done():
                break
            if not self.closed:
                self.restart_soon()
        self.change("down", f"the engine process {self.last_end}")
        self.fail_jobs()
        if not self.first.done():
            sentence = f"the engine process {self.last_end} while it loaded the model"
            self.first.set_exception(failed or EngineUnavailableError(sentence))

    def restart_soon(self) -> None:
        self.ends += 1
        pause = min(FIRST_PAUSE * 2 ** min(self.ends - 1, 30), LONGEST_PAUSE)
        log.error("the engine process %s; it is started again in %.1f s", self.last_end, pause)
        self.change("down", f"the engine process {self.last_end}; it is started again in {pause:.1f} s")
        self.fail_jobs()
        with self.changed:
            self.changed.wait_for(lambda: self.closed, pause)
        self.restarts += 1
        self.observer.engine_restarted()

    def change(self, state: str, reason: str | None) -> None:
        """Change the reason for which the process is not ready; None when it is."""
        with self.changed:
            self.reason = reason
        if state != self.state:
            self.state = state
            self.observer.engine_process(state)

    def fail_jobs(self) -> None:
        """Fail all tasks, because the process has ended."""
        self.jobs.fail_all(lambda: ClosedError(f"the engine process {self.last_end}; send the request again"))

    def run_process(self) -> None:
        """Start the process and talk to it until it ends. Raises ProcessEnds, DSDError."""
        self.loading, self.hanging_since, self.heard = True, math.inf, time.monotonic()
        child = ChildProcess(self.settings, logging.getLogger().getEffectiveLevel())
        with self.changed:
            self.child = child
        try:
            self.talk(child)
        finally:
            with self.changed:
                self.child = None
                self.reason = self.reason or "the engine process has ended, and is started again"
            child.close()

    def talk(self, child: ChildProcess) -> None:
        """Raises ProcessEnds or DSDError when the process has ended or must be killed."""
        checked = time.monotonic()
        while True:
            try:
                received = child.mailbox.exchange(CHECK_EVERY)
                now = time.monotonic()
                if received:
                    self.heard = now
                    child.has_connected()
                elif child.ended:
                    received = list(child.last_messages())
                for message, arrays in received:
                    self.take(message, arrays)
            except messages.BrokenMessage as error:
                raise ProcessEnds(f"sent a message that makes no sense ({error}), and was killed") from None
            if child.process.returncode is not None:
                raise ProcessEnds(child.how_it_ended())
            if now - checked > 10 * CHECK_EVERY:
                self.heard = now  # it was this process that was stopped
            if now - checked >= CHECK_EVERY:
                checked = now
                self.check(now)

    def check(self, now: float) -> None:
        """Look after what is late: the process, and tasks that it should have ended."""
        silent = now - self.heard
        if now > self.stop_at + STOP_WITHIN:
            raise ProcessEnds("did not end when it was told to, and was killed")
        if self.loading:
            if silent > LOAD_SILENCE:
                raise ProcessEnds(f"hung for {silent:.0f} s while it loaded the model, and was killed")
            return
        reason = self.status.not_ready
        if silent > SILENT_AFTER:
            reason = f"the engine process has not answered for {silent:.0f} s"
        self.hanging_since = math.inf if reason is None else min(self.hanging_since, now)
        if now - self.hanging_since > HANGS_FOR:
            raise ProcessEnds(f"hung for more than {HANGS_FOR:.0f} s, and was killed")
        if reason != self.reason:
            self.change("ready" if reason is None else "hanging", reason)
        self.jobs.drop_late(now, reason is not None)

    def take(self, message: messages.FromEngine, arrays: Sequence[Array]) -> None:
        """Act on a message of the process. Raises ProcessEnds, DSDError."""
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
                if not self.loading:
                    self.status, self.times = message, TickTimes(message.tick, message.row)
                    self.jobs.note_running(message.running)
            case messages.LogLine():
                messages.write_line(message)
            case messages.Ready():
                self.loaded(message)
            case messages.NotLoaded():
                raise messages.error_of(message.failure)
            case messages.Dead():
                raise ProcessEnds(f"ended because {message.reason}")

    def loaded(self, message: messages.Ready) -> None:
        """The process is ready, if it has the model that the one before had."""
        info = ModelInfo.from_dict(message.info)
        if self.first.done() and info.fingerprint != self.info.fingerprint:
            raise ProcessEnds(
                f"has loaded another model ({info.fingerprint[:12]}, not {self.info.fingerprint[:12]}), because its "
                "directory has changed since the server was started; restart the server to serve it"
            )
        self.status = messages.Status(None, 0.0, 0.0, 0, 0, [], info.budget)
        self.times = TickTimes(message.tick, message.row)
        self.loading = False
        log.info("the engine process %s is ready", self.pid)
        self.change("ready", None)
        if not self.first.done():
            self.first.set_result(info)

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
            self.ends = 0
            self.jobs.note_start(message.number, message.started)
            self.jobs.end(message.number, result)
