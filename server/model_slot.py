"""A name under which a model is served: how the model is loaded, used, replaced and unloaded."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial

from dsd_serve.backends import Backend, ModelInfo
from dsd_serve.config import ModelConfig
from dsd_serve.errors import ClosedError, DSDError, QueueFullError
from dsd_serve.labels import ClassTable, table_of

log = logging.getLogger(__name__)

MAX_PENDING = 8  # loads of one model, of which one runs
MAX_DRAINING = 2  # replaced models that still finish their requests; each has a process and the memory of its weights
RETRY_AFTER = 5.0  # seconds after a load that failed, in which the next request does not start another
LAST_LOAD = 3.0  # seconds that the end of the server waits for a load
ENDS = "the server is shutting down"


class Served:
    """A model on its backend, and the number of requests that use it. `place`: where it was loaded from.

    at_end: called when the backend is closed.
    """

    def __init__(self, info: ModelInfo, backend: Backend, place: str = "", at_end: Sequence[Callable[[], None]] = ()):
        self.info, self.backend, self.place, self.at_end = info, backend, place, list(at_end)
        self.uses = 0
        self.last_used = time.monotonic()

    def close(self, timeout: float | None) -> bool:
        """Close the backend; True if all its tasks finished."""
        finished = self.backend.close(timeout)
        for call in self.at_end:
            call()
        return finished


@dataclass(frozen=True)
class Unloaded:
    """The facts about a model before it is loaded. created: modification time of config.json, Unix seconds."""

    name: str
    config: ModelConfig
    created: int

    @cached_property
    def table(self) -> ClassTable:
        """The classes of the model."""
        return table_of(self.config)


Open = Callable[[str, str], Served]  # (name, place) -> a model that has passed its self-test; raises DSDError


class Slot:
    """A name, and the model that is served under it; None while it rests.

    about: that model, or of one that has not been loaded yet what its directory says. place: what to load when a
    request needs it. open: loads a model. drain_seconds: for which a replaced model is kept at most, although requests
    still use it. The methods may be called from any thread.
    """

    def __init__(self, about: Served | Unloaded, place: str, open_: Open, drain_seconds: float) -> None:
        self.place, self.open, self.drain_seconds = place, open_, drain_seconds
        self.served = about if isinstance(about, Served) else None
        self.info = about.info if isinstance(about, Served) else None  # the last one, also while it rests
        self.about: ModelInfo | Unloaded = about.info if isinstance(about, Served) else about
        self.name = self.about.name
        self.draining: list[Served] = []
        self.changed = threading.Condition()  # guards the fields above and below
        self.turn = threading.Lock()  # one load at a time
        self.pending = 0  # loads that run or wait for their turn
        self.waking: Future[Served] | None = None
        self.failed_at = -RETRY_AFTER
        self.loads = {"done": 0, "failed": 0}
        self.waiters = 0  # requests that wait for the model to be loaded; of the event loop
        self.ended = threading.Event()

    def use(self) -> Served | None:
        """The model that is served now, counted as in use until `release`; None while it rests."""
        with self.changed:
            if self.served is not None:
                self.served.uses += 1
            return self.served

    def release(self, served: Served) -> None:
        with self.changed:
            served.uses -= 1
            served.last_used = time.monotonic()
            self.changed.notify_all()

    def replace(self, place: str, at_end: Callable[[], None] = lambda: None) -> "Future[Served]":
        """Load another model, and switch to it when it has passed its self-test; the old one ends with its requests.

        at_end: called when the new model is closed, or could not be loaded. The future gets the errors of `open`, and
        ClosedError at the end of the server; then nothing has changed. Raises QueueFullError if too many loads wait.
        """
        with self.changed:
            return self.begin(place, at_end)

    def wake(self) -> "Future[Served]":
        """Load the model that rests; calls meanwhile get the same future. Raises ClosedError soon after a failure."""
        with self.changed:
            if self.waking is None:
                if time.monotonic() - self.failed_at < RETRY_AFTER:
                    raise ClosedError(f"the model {self.name} cannot be loaded; the server's log says why")
                self.waking = self.begin(None, lambda: None)
            return self.waking

    def begin(self, place: str | None, at_end: Callable[[], None]) -> "Future[Served]":
        if self.ended.is_set():
            raise ClosedError(ENDS)
        if self.pending >= MAX_PENDING:
            raise QueueFullError(f"{self.pending} loads of the model {self.name} wait; try again later", RETRY_AFTER)
        self.pending += 1
        future: Future[Served] = Future()
        threading.Thread(target=self.load, args=(place, at_end, future), name="load", daemon=True).start()
        return future

    def load(self, place: str | None, at_end: Callable[[], None], future: "Future[Served]") -> None:
        """Carry out one load in its turn, in a thread of its own. place: None to wake the model."""
        served, error = None, None
        try:
            with self.turn:
                served = self.served if place is None else None
                served = served or self.switch(self.place if place is None else place, at_end)
        except Exception as caught:
            if not isinstance(caught, DSDError):
                log.exception("a model could not be loaded")
            error = caught
            at_end()
        with self.changed:
            self.pending -= 1
            if place is None:
                self.waking = None
            if error is not None:
                self.failed_at = time.monotonic()
            self.loads["done" if error is None else "failed"] += 1
            self.changed.notify_all()
        if served is not None:
            future.set_result(served)
        else:
            if not self.ended.is_set():
                log.error("the model %s could not be loaded: %s", self.name, error)
            future.set_exception(error or ClosedError(ENDS))

    def switch(self, place: str, at_end: Callable[[], None]) -> Served:
        with self.changed:
            self.changed.wait_for(lambda: len(self.draining) < MAX_DRAINING or self.ended.is_set())
            if self.ended.is_set():
                raise ClosedError(ENDS)
        served = self.open(self.name, place)
        served.at_end.append(at_end)
        with self.changed:
            old, closed = self.served, self.ended.is_set()
            if not closed:
                self.served, self.place = served, place
                self.info = self.about = served.info
                if old is not None:
                    self.draining.append(old)
        if closed:
            served.at_end.remove(at_end)  # the caller does it
            served.close(0)
            raise ClosedError(ENDS)
        if old is not None:
            log.info("%s: %.12s replaces %.12s", self.name, served.info.fingerprint, old.info.fingerprint)
            self.retire(old)
        return served

    def rest(self, after: float) -> None:
        """Put the model to rest if nothing has used it for `after` seconds."""
        with self.changed:
            served = self.served
            if served is None or served.uses or self.pending or time.monotonic() - served.last_used < after:
                return
            self.served = None
            self.draining.append(served)
        log.info("%s is unloaded after %g s without a request", self.name, after)
        self.retire(served)

    def retire(self, old: Served) -> None:
        """Close a model when the last request that uses it has ended, in a thread of its own."""
        threading.Thread(target=self.drain, args=(old,), name="drain", daemon=True).start()

    def drain(self, old: Served) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not old.uses or self.ended.is_set(), self.drain_seconds)
            if self.ended.is_set():
                return  # `close` ends it
        old.close(0)
        with self.changed:
            self.draining.remove(old)
            self.changed.notify_all()

    def close(self, timeout: float | None) -> bool:
        """Close what is served and what drains, and wait a little for a load. True if all tasks finished."""
        with self.changed:
            self.ended.set()
            served, self.served = self.served, None
            ending = [*self.draining, *([served] if served else [])]
            self.changed.notify_all()
        finished = all(in_threads([partial(one.close, timeout) for one in ending]))
        with self.changed:
            self.changed.wait_for(lambda: not self.pending, LAST_LOAD)
        return finished


def in_threads(calls: Sequence[Callable[[], bool]]) -> list[bool]:
    """The results of calls that run at the same time; a single one runs in this thread."""
    if len(calls) == 1:
        return [calls[0]()]
    results = [False] * len(calls)

    def run(number: int) -> None:
        with contextlib.suppress(Exception):
            results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
