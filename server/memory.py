"""Budgets of memory that requests share, and what one request holds until its answer has been sent."""

import asyncio
import contextlib
import ipaddress
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from server.security import current_key
from server.settings import Settings

MAX_PREVIEWS = 32_000_000  # bytes of previews that wait to be sent
BESIDES = 118_000_000  # bytes: images drawn but not yet encoded, buffers of connections, what the allocator keeps


def memory_bound(settings: Settings) -> int:
    """Bytes that all requests together take at most, besides what the server has at rest."""
    budgets = settings.max_uploads_mb + settings.max_decode_mb + settings.max_encode_mb
    return int(budgets * 1e6) + MAX_PREVIEWS + BESIDES


class Claim:
    """Bytes of a budget. They may become fewer, and are given back once."""

    def __init__(self, memory: "Memory", size: int, who: str | None) -> None:
        self.memory, self.size, self.who = memory, size, who

    def shrink(self, size: int) -> None:
        self.memory.give_back(max(0, self.size - size), self.who)
        self.size = min(self.size, size)

    def release(self) -> None:
        self.shrink(0)


class Memory:
    """A budget of `limit` bytes; who asks for more than is left waits.

    First come, first served, but one client has at most half, unless what it asks for is all that it has: the others
    pass it meanwhile.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.held: Counter[str] = Counter()
        self.waiting: deque[tuple[int, str | None, asyncio.Future[Claim]]] = deque()

    async def take(self, size: int, who: str | None = None) -> Claim:
        """Wait for `size` bytes, at most `limit`, for a client; None is nobody in particular."""
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
        """Whether a client stays within its share with `size` bytes more."""
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
        """Take bytes that are known to be there."""
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
    """Call in the loop's thread when a thread is done with its work, even if nobody waits for that any more."""
    loop = asyncio.get_running_loop()

    def done(_: "Future[Any]") -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody counts any more
            loop.call_soon_threadsafe(call)

    future.add_done_callback(done)


@dataclass
class Held:
    """What one request holds; all of it is given back when its answer has been sent, or the client is gone."""

    who: str | None
    deadline: float | None = None  # of the event loop's clock: when the answer is of no use any more
    claims: set[Claim] = field(default_factory=set)
    calls: dict[str, Callable[[], None]] = field(default_factory=dict)

    def put(self, name: str, release: Callable[[], None]) -> None:
        """Call `release` at the end; what was put under this name before is released now."""
        self.drop(name)
        self.calls[name] = release

    def drop(self, name: str) -> None:
        if (release := self.calls.pop(name, None)) is not None:
            release()

    def release(self) -> None:
        for claim in self.claims:
            claim.release()
        self.claims.clear()
        for name in list(self.calls):
            self.drop(name)


def held_by(scope: Scope) -> Held:
    """What the request of this scope holds."""
    held: Held | None = scope.get("dsd.held")
    if held is None:
        held = scope["dsd.held"] = Held(client_of(scope))
    return held


def client_of(scope: Scope) -> str | None:
    """Whose share a request takes of, in words: its API key, else its address.

    None for this machine itself, where a proxy or the page asks for many.
    """
    if (key := current_key.get()) is not None:
        return f"the key {key.name}"
    address = (scope.get("client") or ("",))[0]
    try:
        local = ipaddress.ip_address(address).is_loopback
    except ValueError:
        local = True  # a Unix socket, or a test
    return None if local else f"the address {address}"
