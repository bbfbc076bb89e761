"""The engine process: an engine and its batcher in a separate process, started by the server.

`backends/process/process_backend.py` is the other side, `backends/process/engine_messages.py` describes the messages.
The main thread exchanges them while another loads the model, and the batcher's thread runs it. The process ends when
the server tells it to or has ended, or when the engine fails for good.
"""

import contextlib
import logging
import os
import sys
import threading

import msgspec

from dsd_serve.backends import Observer
from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.process.engine_messages import (
    Dead,
    NotLoaded,
    Ready,
    StartEngine,
    Status,
    Stop,
    Tick,
    failure_of,
    from_server,
    line_of,
)
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.backends.process.parent_process import begin, parent_ended
from dsd_serve.backends.process.task_server import HEARTBEAT, TaskServer
from dsd_serve.errors import DSDError, EngineError
from dsd_serve.loading import load
from dsd_serve.rows import RowCounts

log = logging.getLogger(__name__)

LAST_MESSAGES = 2000  # milliseconds for what is unsent at the end


def main() -> None:
    EngineProcess(begin(StartEngine)).run()


class EngineProcess(Observer):
    """The model, the tasks of the server, and the mailbox to it."""

    def __init__(self, start: StartEngine) -> None:
        self.settings = start.settings
        self.mailbox = Mailbox(from_server, LAST_MESSAGES)
        self.mailbox.socket.connect(start.endpoint)
        self.mailbox.watch(sys.stdin.fileno())
        logging.basicConfig(level=start.log_level, handlers=[LogSender(self.mailbox)])
        logging.captureWarnings(True)
        self.batcher: Batcher | None = None
        self.tasks: EngineTasks | None = None
        self.ending = False

    def run(self) -> None:
        """Until the server ends this process, or the engine cannot be loaded or fails for good."""
        threading.Thread(target=self.load, name="load", daemon=True).start()
        while not self.ending:
            if parent_ended():
                os._exit(1)  # there is nobody to report to
            for message, arrays in self.mailbox.exchange(self.report()):
                if isinstance(message, Stop):
                    self.ending = True
                elif self.tasks is not None:  # the server has seen Ready before it sends tasks
                    self.tasks.take(message, arrays)
            if self.batcher is not None and self.batcher.dead and (self.tasks is None or not self.tasks.jobs):
                self.mailbox.put(Dead(self.batcher.dead))
                self.ending = True
        self.mailbox.exchange(0)
        self.mailbox.close()
        os._exit(0)  # without waiting for an engine that may hang

    def report(self) -> float:
        """Send what is due. Returns the seconds until more is."""
        if self.tasks is not None:
            return self.tasks.report()
        self.mailbox.put(Status("it is loading the model", 0.0, 0.0, []), wake=False)
        return HEARTBEAT

    def load(self) -> None:
        settings = self.settings
        try:
            model = load(**msgspec.structs.asdict(settings), observer=self)
            batcher = model.backend
            assert isinstance(batcher, Batcher)
        except Exception as error:
            if not isinstance(error, DSDError):
                log.exception("the model could not be loaded")
                error = EngineError(f"the model could not be loaded: {error!r}")
            self.mailbox.put(NotLoaded(failure_of(error)))
            self.ending = True
            self.mailbox.ring()
            return
        self.batcher = batcher
        self.tasks = EngineTasks(self.mailbox, batcher, model.info, batcher.put_tasks)
        self.mailbox.put(Ready(model.info.to_dict(), batcher.times.tick, batcher.times.row))

    # Of the batcher, in its thread.

    def tick(self, rows: RowCounts, seconds: float) -> None:
        self.mailbox.put(Tick(*rows, seconds), wake=False)

    def started(self, waited: float) -> None:
        self.mailbox.ring()


class EngineTasks(TaskServer):
    """The tasks of the server, which has admitted them."""

    backend: Batcher

    def status(self) -> Status:
        status = super().status()
        status.num_ticks, status.num_rows = self.backend.num_ticks, self.backend.num_rows
        return status


class LogSender(logging.Handler):
    """Sends the lines of the log to the server, which writes them."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a line that cannot be formatted must not end its thread
            self.mailbox.put(line_of(record))


if __name__ == "__main__":
    main()
