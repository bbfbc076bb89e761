"""The models of a server by their names: which one a request uses, and their combined state."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from dsd_serve.backends import Backend, ModelInfo
from dsd_serve.errors import ClosedError, DSDError, InputError, QueueFullError, shown
from server.model_slot import ENDS, RETRY_AFTER, Served, Slot, in_threads

# The snapshot of a model that rests.
RESTS: dict[str, Any] = {
    **{"budget": 0, "ticks": 0, "rows": 0, "row_ms": 0.0, "tick_ms": 0.0, "seconds_ahead": 0.0, "not_ready": None},
    **{"running": [], "waiting": []},
}


class Models:
    """The slots of a server, the first of which serves requests that name no model.

    As a whole they have what a backend has: readiness, numbers, room in the queue, an end. max_waiting: tasks in the
    queue of each, and requests that may wait for one to be loaded. rest_after: seconds without a request after which a
    model rests; 0 is never.
    """

    def __init__(self, max_waiting: int = 1_000_000, rest_after: float = 0.0) -> None:
        self.max_waiting = max_waiting
        self.slots: dict[str, Slot] = {}
        self.closed = threading.Event()
        if rest_after:
            threading.Thread(target=self.rest, args=(rest_after,), name="rest", daemon=True).start()

    def add(self, slot: Slot) -> None:
        self.slots = {**self.slots, slot.name: slot}

    def rest(self, after: float) -> None:
        while not self.closed.wait(min(1.0, after / 4)):
            for slot in self.slots.values():
                slot.rest(after)

    @property
    def default(self) -> Slot:
        return next(iter(self.slots.values()))

    def find(self, name: str | None) -> Slot:
        """The slot of a name; the first for None. Raises InputError."""
        if name is None:
            return self.default
        if name not in self.slots:
            raise InputError(f"there is no model {shown(name)} here; this server has {', '.join(self.slots)}", "model")
        return self.slots[name]

    async def use(self, name: str | None, timeout: float) -> tuple[Served, Callable[[], None], float]:
        """The model of this name, loaded if it rests; the function that ends its use; and the seconds of loading.

        Raises InputError for an unknown name, ClosedError if it cannot be loaded within `timeout` seconds,
        QueueFullError if too many requests wait for that.
        """
        slot = self.find(name)
        served, waited = slot.use(), 0.0
        if served is None:
            began = time.monotonic()
            served = await self.load(slot, timeout)
            waited = time.monotonic() - began
        return served, partial(slot.release, served), waited

    async def info(self, name: str | None, timeout: float) -> ModelInfo:
        """The description of the model of this name; one that has never been loaded is loaded. Raises as `use`."""
        if (info := self.find(name).info) is not None:
            return info
        served, release, _ = await self.use(name, timeout)
        release()
        return served.info

    async def load(self, slot: Slot, timeout: float) -> Served:
        if slot.waiters >= self.max_waiting:
            raise QueueFullError(f"{slot.waiters} requests wait for the model {slot.name}", RETRY_AFTER)
        slot.waiters += 1
        try:
            async with asyncio.timeout(timeout):
                while (served := slot.use()) is None:
                    # Shielded, because a request that gives up must not cancel what others wait for.
                    await asyncio.shield(asyncio.wrap_future(slot.wake()))
            return served
        except TimeoutError:
            raise ClosedError(f"the model {slot.name} is still being loaded; try again soon") from None
        except DSDError as error:
            if isinstance(error, ClosedError | QueueFullError):
                raise
            raise ClosedError(f"the model {slot.name} cannot be loaded; the server's log says why") from None
        finally:
            slot.waiters -= 1

    # As a backend.

    @property
    def served(self) -> list[Served]:
        """The models that are loaded and take requests."""
        return [served for slot in self.slots.values() if (served := slot.served) is not None]

    @property
    def all_backends(self) -> list[Backend]:
        """Those of the models that are loaded, also of those that finish their last requests."""
        draining = [old for slot in self.slots.values() for old in list(slot.draining)]
        return [one.backend for one in (*self.served, *draining)]

    @property
    def not_ready(self) -> str | None:
        """The reason why no model can be used now, or None. A model that rests can."""
        if self.closed.is_set():
            return ENDS
        reasons = [slot.served.backend.not_ready if slot.served else None for slot in self.slots.values()]
        return None if None in reasons else next(iter(reasons))

    @property
    def ready(self) -> bool:
        return self.not_ready is None

    @property
    def given_up(self) -> str | None:
        """The reason why this process must be restarted because of one of the models, or None."""
        return next((reason for one in self.served if (reason := one.backend.given_up)), None)

    @property
    def budget(self) -> int:
        return sum(one.backend.budget for one in self.served)

    @property
    def num_running(self) -> int:
        return sum(backend.num_running for backend in self.all_backends)

    @property
    def num_waiting(self) -> int:
        return sum(backend.num_waiting for backend in self.all_backends)

    def seconds_ahead(self) -> float:
        """Of the model with the most work."""
        return max((backend.seconds_ahead() for backend in self.all_backends), default=0.0)

    def queue_full(self) -> QueueFullError | None:
        """The error if no model has room for another task, else None. With several models each says so itself."""
        one = self.default.served if len(self.slots) == 1 else None
        return one.backend.queue_full() if one else None

    def snapshot(self, name: str | None = None) -> dict[str, Any]:
        """The running and waiting tasks of a model, or of all of them: sums, and the values of each by its name."""
        if len(self.slots) == 1 and name is None:
            name = self.default.name
        if name is not None:
            served = self.find(name).served
            return served.backend.snapshot() if served else {**RESTS}
        each = {name: self.snapshot(name) for name in self.slots}
        values = list(each.values())
        loaded = [one for one in values if one["budget"]] or [RESTS]
        return {
            "budget": self.budget,
            **{key: sum(one[key] for one in values) for key in ("ticks", "rows")},
            **{key: max(one[key] for one in loaded) for key in ("row_ms", "tick_ms", "seconds_ahead")},
            "not_ready": self.not_ready,
            **{key: [job for one in values for job in one[key]] for key in ("running", "waiting")},
            "models": each,
        }

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was accepted, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        self.closed.set()
        return all(in_threads([partial(slot.close, timeout) for slot in self.slots.values()]))
