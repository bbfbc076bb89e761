"""The backend with an engine process: tasks are sent to it as messages, and it is restarted whenever it ends.

HTTP and the batcher then do not share an interpreter, and an engine that fails takes nothing with it but the tasks
that it had.
"""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from msgspec import structs

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.admission import Admission
from dsd_serve.backends.process import engine_messages as messages
from dsd_serve.backends.process.child_process import ChildProcess
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.backends.process.message_backend import MessageBackend
from dsd_serve.backends.process.supervisor import STOP_WITHIN, ProcessEnds, Supervisor
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.errors import ClosedError
from dsd_serve.rows import Array

MODULE = "dsd_serve.engine_process"
GIVE_UP_AFTER = 5  # ends of the process with no task done in between


class ProcessBackend(MessageBackend, Supervisor):
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
        observer = observer or Observer()
        MessageBackend.__init__(self, Admission(max_waiting, max_seconds, observer), observer)
        Supervisor.__init__(self, "the engine process", self.jobs.changed)
        self.thread.start()
        self.info = self.first.result()

    # For callers.

    @property
    def mailbox(self) -> Mailbox | None:
        child = self.child
        return None if child is None else child.mailbox

    @property
    def given_up(self) -> str | None:
        """A reason once the process has ended several times with no task done in between, else None."""
        if self.ends < GIVE_UP_AFTER:
            return None
        return (
            f"the engine process ended {self.ends} times without an image in between; the last time it {self.last_end}"
        )

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

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        self.drain()
        finished = self.end_jobs(timeout, STOP_WITHIN)
        self.stop(messages.Stop())
        return finished

    # In the thread.

    def open(self) -> ChildProcess:
        level = logging.getLogger().getEffectiveLevel()
        return ChildProcess(
            MODULE,
            lambda endpoint: messages.StartEngine(endpoint, os.getpid(), self.settings, level),
            messages.from_engine,
            without="--engine-process off needs none",
        )

    def lost(self) -> None:
        self.jobs.fail_all(lambda: ClosedError(f"the engine process {self.last_end}; send the request again"))

    def changes(self, state: str) -> None:
        self.observer.engine_process(state)

    def restarted(self) -> None:
        self.observer.engine_restarted()

    def own_trouble(self) -> str | None:
        return self.status.not_ready

    def late(self, now: float) -> None:
        self.jobs.drop_late(now, self.reason is not None)

    def take(self, message: messages.FromEngine, arrays: Sequence[Array]) -> None:
        match message:
            case messages.LogLine():
                messages.write_line(message)
            case messages.Ready():
                self.loaded(message)
            case messages.NotLoaded():
                raise messages.error_of(message.failure)
            case messages.Dead():
                raise ProcessEnds(f"ended because {message.reason}")
            case messages.Status() if self.loading:
                pass
            case _:
                self.take_of_tasks(message, arrays)

    def loaded(self, message: messages.Ready) -> None:
        """The process is ready, if it has the model that the one before had."""
        info = ModelInfo.from_dict(message.info)
        if self.first.done() and info.fingerprint != self.info.fingerprint:
            raise ProcessEnds(
                f"has loaded another model ({info.fingerprint[:12]}, not {self.info.fingerprint[:12]}), because its "
                "directory has changed since the server was started; restart the server to serve it"
            )
        # A precision that is exported meanwhile must not make it another model.
        self.settings = structs.replace(self.settings, precision=info.described["precision"])
        self.status = messages.Status(None, 0.0, 0.0, [], info.budget)
        self.times = TickTimes(message.tick, message.row)
        self.is_ready(info)

    def succeeded(self) -> None:
        self.ends = 0
