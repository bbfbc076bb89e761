"""Supervision of a child process: it is restarted whenever it ends, after increasing pauses."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from dsd_serve.backends.process.child_process import ChildProcess
from dsd_serve.backends.process.engine_messages import BrokenMessage
from dsd_serve.errors import DSDError, EngineUnavailableError
from dsd_serve.rows import Array

log = logging.getLogger(__name__)

CHECK_EVERY = 0.5  # seconds between two checks of what is late
SILENT_AFTER = 8.0  # seconds without a message, of which one comes each second, after which the process hangs
HANGS_FOR = 60.0  # seconds for which it may hang before it is killed
LOAD_SILENCE = 600.0  # seconds without a message while it loads; some libraries let no other thread run meanwhile
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds before it is started again; doubles each time
STOP_WITHIN = 3.0  # seconds for the process to end when asked to


class ProcessEnds(Exception):
    """The process has ended, or must be killed; the text is a clause that follows the name of the process."""


class Supervisor:
    """Owns a child process, and the thread that talks to it.

    name: of the process in sentences. changed: guards the child and the reason, and is notified when this is closed.
    A process that ends before the first one was ready is not started again: `first` then has the error.
    """

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self.name, self.changed = name, changed
        self.child: ChildProcess | None = None
        self.state = ""
        self.reason: str | None = f"{name} has not started"  # why it is not ready
        self.first: Future[Any] = Future()  # done when the first process is ready
        self.closed = False
        self.stop_at = math.inf  # when the process was asked to end
        self.loading = True
        self.heard = self.hanging_since = math.inf  # when the last message came, and since when it hangs
        self.restarts = 0
        self.ends = 0  # of the process, with nothing done in between
        self.last_end = ""
        self.thread = threading.Thread(target=self.loop, name=name.removeprefix("the ").replace(" ", "-"), daemon=True)

    # What differs.

    def open(self) -> ChildProcess:
        """Start the process. Raises EngineUnavailableError."""
        raise NotImplementedError

    def take(self, message: Any, arrays: Sequence[Array]) -> None:
        """Act on a message of the process. Raises ProcessEnds, DSDError."""
        raise NotImplementedError

    def lost(self) -> None:
        """The process has ended, with all that it had."""

    def own_trouble(self) -> str | None:
        """The reason why it is not ready, as the process itself says."""
        return None

    def due(self) -> float:
        """Send what is due. Returns the seconds until more is."""
        return CHECK_EVERY

    def late(self, now: float) -> None:
        """Called each CHECK_EVERY seconds."""

    def changes(self, state: str) -> None:
        """The process is now in this state, one of ENGINE_PROCESS_STATES."""

    def restarted(self) -> None:
        """The process has ended, and a new one is started."""

    # For callers.

    @property
    def pid(self) -> int | None:
        """The number of the process, if there is one."""
        child = self.child
        return None if child is None else child.process.pid

    def send(self, message: Any) -> None:
        """Send a message to the process, if there is one."""
        child = self.child
        if child is not None:
            child.mailbox.put(message)

    def stop(self, message: Any) -> None:
        """Tell the process to end, and wait until it has ended; it is killed if that takes longer than STOP_WITHIN."""
        self.stop_at = min(self.stop_at, time.monotonic())
        self.send(message)
        self.thread.join()

    # In the thread.

    def loop(self) -> None:
        failed: DSDError | None = None
        while not self.closed:
            self.change("starting", f"{self.name} is starting")
            try:
                self.run_process()
            except ProcessEnds as end:
                self.last_end = str(end)
            except DSDError as error:  # it could not be started, or could not load what it needs
                self.last_end, failed = f"cannot serve: {error}", error
            except Exception as error:  # a bug of ours: the process goes, and this thread stays
                log.exception("a message of %s cannot be processed", self.name)
                self.last_end = f"was killed because of {error!r}"
            if not self.first.done():
                break
            if not self.closed:
                self.restart_soon()
        self.change("down", f"{self.name} {self.last_end}")
        self.lost()
        if not self.first.done():
            sentence = f"{self.name} {self.last_end} while it was starting"
            self.first.set_exception(failed or EngineUnavailableError(sentence))

    def restart_soon(self) -> None:
        self.ends += 1
        pause = min(FIRST_PAUSE * 2 ** min(self.ends - 1, 30), LONGEST_PAUSE)
        log.error("%s %s; restarting it in %.1f s", self.name, self.last_end, pause)
        self.change("down", f"{self.name} {self.last_end}; restarting it in {pause:.1f} s")
        self.lost()
        with self.changed:
            self.changed.wait_for(lambda: self.closed, pause)
        self.restarts += 1
        self.restarted()

    def change(self, state: str, reason: str | None) -> None:
        """Change the reason for which the process is not ready; None when it is."""
        with self.changed:
            self.reason = reason
        if state != self.state:
            self.state = state
            self.changes(state)

    def is_ready(self, result: Any = None) -> None:
        """The process has loaded what it needs. result: of the future `first`."""
        self.loading = False
        log.info("%s (process %s) is ready", self.name, self.pid)
        self.change("ready", None)
        if not self.first.done():
            self.first.set_result(result)

    def run_process(self) -> None:
        """Start the process and talk to it until it ends. Raises ProcessEnds, DSDError."""
        self.loading, self.hanging_since, self.heard = True, math.inf, time.monotonic()
        child = self.open()
        with self.changed:
            self.child = child
        try:
            self.talk(child)
        finally:
            with self.changed:
                self.child = None
                self.reason = self.reason or f"{self.name} has ended and is being restarted"
            child.close()

    def talk(self, child: ChildProcess) -> None:
        """Raises ProcessEnds or DSDError when the process has ended or must be killed."""
        checked = time.monotonic()
        while True:
            try:
                received = child.mailbox.exchange(min(CHECK_EVERY, self.due()))
                now = time.monotonic()
                if received:
                    self.heard = now
                    child.has_connected()
                elif child.ended:
                    received = list(child.last_messages())
                for message, arrays in received:
                    self.take(message, arrays)
            except BrokenMessage as error:
                raise ProcessEnds(f"sent an invalid message ({error}), and was killed") from None
            if child.process.returncode is not None:
                raise ProcessEnds(child.how_it_ended())
            if now - checked > 10 * CHECK_EVERY:
                self.heard = now  # it was this process that was stopped
            if now - checked >= CHECK_EVERY:
                checked = now
                self.check(now)

    def check(self, now: float) -> None:
        """Look after what is late. Raises ProcessEnds."""
        silent = now - self.heard
        if now > self.stop_at + STOP_WITHIN:
            raise ProcessEnds("did not end in time, and was killed")
        if self.loading:
            if silent > LOAD_SILENCE:
                raise ProcessEnds(f"hung for {silent:.0f} s while it was starting, and was killed")
            return
        reason = self.own_trouble()
        if silent > SILENT_AFTER:
            reason = f"{self.name} has not answered for {silent:.0f} s"
        self.hanging_since = math.inf if reason is None else min(self.hanging_since, now)
        if now - self.hanging_since > HANGS_FOR:
            raise ProcessEnds(f"hung for more than {HANGS_FOR:.0f} s, and was killed")
        if reason != self.reason:
            self.change("ready" if reason is None else "hanging", reason)
        self.late(now)
