"""The backend of an HTTP worker: its tasks are sent to the main process, whose queue all workers share."""

import logging
import os
import sys
import threading
import time
from collections import deque
from typing import Any

from dsd_serve.backends import ModelInfo, Observer
from dsd_serve.backends.admission import Admission
from dsd_serve.backends.process.engine_messages import BrokenMessage, NotLoaded, Ready, Status, failure_of
from dsd_serve.backends.process.mailbox import Mailbox
from dsd_serve.backends.process.message_backend import MessageBackend
from dsd_serve.backends.process.parent_process import parent_ended
from dsd_serve.backends.process.supervisor import CHECK_EVERY, SILENT_AFTER, STOP_WITHIN
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.errors import ClosedError, DSDError
from server.workers.worker_messages import Counts, Drain, ReloadKeys, Workers, from_main

log = logging.getLogger(__name__)

LAST_MESSAGES = 2000  # milliseconds for what is unsent at the end


class WorkerBackend(MessageBackend):
    """Owns the thread that talks to the main process. Tasks must be admitted here and then there.

    refusals: is notified of what is refused here; the main process counts the rest. orders: what the worker is to do
    beside its tasks, for the worker's own loop. Whatever goes wrong with the messages ends this process, which is then
    started again.
    """

    def __init__(self, endpoint: str, *, max_waiting: int, max_seconds: float, refusals: Observer) -> None:
        super().__init__(Admission(max_waiting, max_seconds, refusals), Observer())
        self.reason = "the server is starting; try again soon"
        self.orders: deque[Counts | Drain | ReloadKeys | Workers] = deque()
        self.pids: list[int] = []
        self.heard = time.monotonic()
        self.known = threading.Event()  # set when the model is known, or this is closed before
        self.answered = threading.Event()  # set when the main process has said anything
        self.ended = False
        self.box = Mailbox(from_main, LAST_MESSAGES)
        self.box.socket.connect(endpoint)
        self.box.watch(sys.stdin.fileno())
        self.thread = threading.Thread(target=self.loop, name="main-process", daemon=True)
        self.thread.start()

    # For callers.

    @property
    def mailbox(self) -> Mailbox:
        return self.box

    def wait(self) -> ModelInfo:
        """The model, as soon as the main process has it. Raises ClosedError if this is closed before."""
        self.known.wait()
        if self.closed:
            raise ClosedError("the server is shutting down")
        return self.info

    @property
    def given_up(self) -> str | None:
        """The reason why the whole server must be restarted, or None."""
        return self.status.given_up

    @property
    def engine_pid(self) -> int | None:
        """The number of the engine process, if there is one."""
        process = (self.status.snapshot or {}).get("process")
        return process.get("pid") if isinstance(process, dict) else None

    def snapshot(self) -> dict[str, Any]:
        """The running and waiting tasks of all workers, as plain values; up to a second old."""
        return {**(self.status.snapshot or {}), "not_ready": self.not_ready}

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        self.drain()
        self.known.set()
        finished = self.end_jobs(timeout, STOP_WITHIN)
        self.ended = True
        self.box.ring()
        self.thread.join()
        return finished

    def cannot_serve(self, error: DSDError) -> None:
        """Report why this worker cannot start."""
        self.box.put(NotLoaded(failure_of(error)))
        self.close(0)

    # In the thread.

    def loop(self) -> None:
        try:
            checked = time.monotonic()
            while not self.ended:
                received = self.box.exchange(CHECK_EVERY)
                if parent_ended():
                    os._exit(1)
                now = time.monotonic()
                for message, arrays in received:
                    self.heard = now
                    self.take(message, arrays)
                if now - checked > 10 * CHECK_EVERY:
                    self.heard = now  # it was this process that was stopped
                if now - checked >= CHECK_EVERY:
                    checked = now
                    self.check(now)
            self.box.exchange(0)
            self.box.close()
        except BaseException:  # a bug of ours: never leave callers waiting
            log.exception("a message of the main process cannot be processed; this worker ends")
            logging.shutdown()
            os._exit(1)

    def check(self, now: float) -> None:
        silent = now - self.heard
        if self.known.is_set() and silent > SILENT_AFTER:
            self.reason = f"the main process has not answered for {silent:.0f} s"
        self.jobs.drop_late(now, self.reason is not None)

    def take(self, message: Any, arrays: Any) -> None:
        match message:
            case Ready():
                self.loaded(message)
            case Status():
                self.reason = message.not_ready
                if self.known.is_set():
                    self.take_of_tasks(message, arrays)
            case Counts() | Drain() | ReloadKeys() | Workers():
                self.orders.append(message)
                if isinstance(message, Workers):
                    self.pids = message.pids
            case _:
                self.take_of_tasks(message, arrays)
        self.answered.set()

    def loaded(self, message: Ready) -> None:
        """The main process serves this model, now and for as long as this worker runs."""
        info = ModelInfo.from_dict(message.info)
        if self.known.is_set() and not self.closed and info.fingerprint != self.info.fingerprint:
            raise BrokenMessage("it serves another model")
        self.info, self.times, self.reason = info, TickTimes(message.tick, message.row), None
        self.status.budget = info.budget
        self.known.set()
