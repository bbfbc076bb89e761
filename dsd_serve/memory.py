"""Shared memory budgets: a claim waits until enough is free. For one event loop."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Claim:
    """Bytes claimed of a budget. A claim may shrink, and is released once."""

    def __init__(self, memory: "Memory", size: int, who: str | None) -> None:
        self.memory, self.size, self.who = memory, size, who

    def shrink(self, size: int) -> None:
        self.memory.give_back(max(0, self.size - size), self.who)
        self.size = min(self.size, size)

    def release(self) -> None:
        self.shrink(0)


class Memory:
    """A budget of `limit` bytes. Claims wait until enough is free.

    First come, first served. A client holds at most half, unless by a single claim; while it waits for that, claims
    of other clients may pass.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.held: Counter[str] = Counter()
        self.waiting: deque[tuple[int, str | None, asyncio.Future[Claim]]] = deque()

    async def take(self, size: int, who: str | None = None) -> Claim:
        """Wait for `size` bytes, at most `limit`. who: the client; without one there is no limit of its share."""
        future: asyncio.Future[Claim] = asyncio.get_running_loop().create_future()
        entry = (size, who, future)
        self.waiting.append(entry)
        self.grant()
        try:
            return await future
        except asyncio.CancelledError:
            if entry in self.waiting:
                self.waiting.remove(entry)
                self.grant()
            elif future.done() and not future.cancelled():
                future.result().release()
            raise

    def has_share(self, size: int, who: str | None) -> bool:
        """Whether a client stays within its share with another `size` bytes."""
        return who is None or not self.held[who] or self.held[who] + size <= self.limit // 2

    def grant(self) -> None:
        for entry in list(self.waiting):
            size, who, future = entry
            if not self.has_share(size, who):
                continue
            if self.total + size > self.limit:
                return
            self.waiting.remove(entry)
            if not future.done():
                future.set_result(self.claim(size, who))

    def claim(self, size: int, who: str | None) -> Claim:
        """Claim bytes that are known to be free."""
        claim = Claim(self, 0, who)
        self.add(claim, size)
        return claim

    def add(self, claim: Claim, size: int) -> None:
        self.total += size
        claim.size += size
        if claim.who is not None:
            self.held[claim.who] += size

    def give_back(self, size: int, who: str | None) -> None:
        self.total -= size
        if who is not None and size:
            self.held[who] -= size
            if not self.held[who]:
                del self.held[who]
        if size:
            self.grant()


def after(future: "Future[Any]", call: Callable[[], None]) -> None:
    """Call in the loop's thread when a future is done, even if nothing awaits it any more."""
    loop = asyncio.get_running_loop()

    def done(_: "Future[Any]") -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the budget has gone with it
            loop.call_soon_threadsafe(call)

    future.add_done_callback(done)
