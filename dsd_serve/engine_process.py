"""The code of the engine process: an engine and its batcher in a process of their own, for a server that starts it.

`backends/process/process_backend.py` is the other side, `backends/process/engine_messages.py` describes the messages.
The main thread exchanges them while another loads the model, and the batcher's thread runs it. The process ends when
the server tells it to or has ended, or when the engine fails for good.
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from dsd_serve.backends import Observer, task_messages
from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.process.engine_messages import (
    Cancel,
    Dead,
    Failed,
    Finished,
    NotLoaded,
    PreviewMade,
    Ready,
    RunningTask,
    Start,
    Started,
    Status,
    Stop,
    Submit,
    TaskMessage,
    Tick,
    failure_of,
    from_server,
    head_of,
    line_of,
)
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.backends.program_job import ProgramJob
from dsd_serve.errors import DSDError, EngineError
from dsd_serve.loading import load
from dsd_serve.model import Model
from dsd_serve.rows import Array, RowCounts

log = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds between two messages of status; the server waits for them
STATUS_EVERY = 0.1  # the same while there is work
LAST_MESSAGES = 2000  # milliseconds for what is unsent at the end
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP")  # for the whole group, as by Ctrl-C; the server drains and then ends this


def main() -> None:
    for name in IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    faulthandler.enable()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    die_with(start.parent)
    EngineProcess(start).run()


def die_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, also while it is stopped or hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class EngineProcess(Observer):
    """The model, its tasks by their numbers, and the mailbox to the server."""

    def __init__(self, start: Start) -> None:
        self.settings = start.settings
        self.mailbox = Mailbox(from_server, LAST_MESSAGES)
        self.mailbox.socket.connect(start.endpoint)
        self.mailbox.watch(sys.stdin.fileno())
        logging.basicConfig(level=start.log_level, handlers=[LogSender(self.mailbox)])
        logging.captureWarnings(True)
        self.model: Model | None = None
        self.batcher: Batcher | None = None
        self.jobs: dict[int, ProgramJob] = {}
        self.unstarted: deque[tuple[int, ProgramJob]] = deque()  # in the order in which the batcher starts them
        self.ending = False

    def run(self) -> None:
        """Until the server wants this process to end, or the engine cannot be loaded or fails for good."""
        threading.Thread(target=self.load, name="load", daemon=True).start()
        reported, ticks = 0.0, 0  # when the last status was sent, and its ticks
        while not self.ending:
            if server_ended():
                os._exit(1)  # there is nobody to report to
            period = STATUS_EVERY if self.jobs else HEARTBEAT
            news = self.batcher is not None and not self.jobs and self.batcher.num_ticks != ticks
            if news or time.monotonic() >= reported + period:
                status = self.status()
                self.mailbox.put(status, wake=False)
                reported, ticks = time.monotonic(), status.num_ticks
            for message, arrays in self.mailbox.exchange(reported + period - time.monotonic()):
                self.take(message, arrays)
            self.report_started()
            if self.batcher is not None and self.batcher.dead and not self.jobs:
                self.mailbox.put(Dead(self.batcher.dead))
                self.ending = True
        self.mailbox.exchange(0)
        self.mailbox.close()
        os._exit(0)  # without waiting for an engine that may hang

    def load(self) -> None:
        settings = self.settings
        try:
            model = load(**msgspec.structs.asdict(settings), observer=self)
            assert isinstance(model.backend, Batcher)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("the model could not be loaded")
                error = EngineError(f"the model could not be loaded: {error!r}")
            self.mailbox.put(NotLoaded(failure_of(error)))
            self.ending = True
            self.mailbox.ring()
            return
        self.model, self.batcher = model, model.backend
        times = self.batcher.times
        self.mailbox.put(Ready(model.info.to_dict(), times.tick, times.row))

    # Messages of the server.

    def take(self, message: Any, arrays: list[Array]) -> None:
        if isinstance(message, Submit):
            rest = iter(arrays)
            for task in message.tasks:
                self.submit(task, {name: next(rest) for name in task.arrays})
        elif isinstance(message, Cancel):
            if (job := self.jobs.get(message.number)) is not None:
                job.cancel()
        elif isinstance(message, Stop):
            self.ending = True

    def submit(self, message: TaskMessage, inputs: dict[str, Array]) -> None:
        number = message.number
        assert self.model is not None and self.batcher is not None  # the server has seen Ready
        info = self.model.info

        def on_preview(step: int, pixels: Array) -> None:
            self.mailbox.put(PreviewMade(number, step, head_of(pixels)), [pixels])

        try:
            (task,), _ = task_messages.from_wire(inputs, message.parameters, info.config, info.defaults)
            program = task.program(info.config, on_preview if message.previews else None)
            (job,) = self.batcher.put([(program, task.cost)], message.deadline)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("a task could not be read")
            self.mailbox.put(Failed(number, 0.0, failure_of(error)))
            return
        self.jobs[number] = job
        self.unstarted.append((number, job))
        job.future.add_done_callback(self.sender_of(number, job))

    def sender_of(self, number: int, job: ProgramJob) -> Callable[["Future[Any]"], None]:
        """Sends the end of a task, from the batcher's thread."""

        def send(future: "Future[Any]") -> None:
            self.jobs.pop(number, None)
            error = future.exception()
            if error is None:
                result = future.result()
                self.mailbox.put(Finished(number, job.started, head_of(result)), [result])
            else:
                self.mailbox.put(Failed(number, job.started, failure_of(error)))

        return send

    # Of the batcher, in its thread.

    def tick(self, rows: RowCounts, seconds: float) -> None:
        self.mailbox.put(Tick(*rows, seconds), wake=False)

    def started(self, waited: float) -> None:
        self.mailbox.ring()

    # In the main thread.

    def report_started(self) -> None:
        """Report the tasks that have left the queue."""
        while self.unstarted and (self.unstarted[0][1].started or self.unstarted[0][1].future.done()):
            number, job = self.unstarted.popleft()
            if job.started:
                self.mailbox.put(Started(number, job.started), wake=False)

    def status(self) -> Status:
        batcher = self.batcher
        if batcher is None:
            return Status("it is loading the model", 0.0, 0.0, 0, 0, [], 0)
        running = [
            RunningTask(number, job.rows_left, [type(row).__name__.lower() for row in job.rows])
            for number, job in list(self.jobs.items())
            if job.started
        ]
        times = batcher.times
        return Status(
            batcher.not_ready, times.tick, times.row, batcher.num_ticks, batcher.num_rows, running, batcher.budget
        )


class LogSender(logging.Handler):
    """Sends the lines of the log to the server, which writes them."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a line that cannot be formatted must not end its thread
            self.mailbox.put(line_of(record))


def server_ended() -> bool:
    """True once standard input, which the server holds open, is at its end."""
    import select

    return bool(select.select([sys.stdin], [], [], 0)[0]) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main()
