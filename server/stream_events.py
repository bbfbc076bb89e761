"""Events of a streamed answer, on their way from the backend's thread to the client."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dsd_serve.rows import Pixels
from server.request_memory import MAX_PREVIEWS

PING_SECONDS = 15  # proxies close streams that are silent for longer


@dataclass(frozen=True)
class Preview:
    """The decoded clean estimate of task `number` after `step`, uint8 [3, H, W]."""

    number: int
    step: int
    pixels: Pixels


@dataclass(frozen=True)
class Done:
    """Task `number` is done; `future` has its image or its error."""

    number: int
    future: "Future[Any]"


Event = Preview | Done | None  # None: nothing for PING_SECONDS


class PreviewMemory:
    """Bytes of previews that wait to be sent, of all streams."""

    total = 0


class EventQueue:
    """The events of one stream that wait to be sent. While the previews of all streams take more than MAX_PREVIEWS
    bytes, the older previews of a stream are dropped: a slow client sees fewer previews, and every image."""

    def __init__(self, memory: PreviewMemory) -> None:
        self.memory = memory
        self.events: deque[Preview | Done] = deque()
        self.arrived = asyncio.Event()

    def put(self, event: Preview | Done) -> None:
        if isinstance(event, Preview) and self.memory.total + event.pixels.nbytes > MAX_PREVIEWS:
            oldest = next((one for one in self.events if isinstance(one, Preview)), None)
            if oldest is not None:
                self.events.remove(oldest)
                self.count(oldest, -1)
        self.events.append(event)
        self.count(event, 1)
        self.arrived.set()

    async def get(self) -> Preview | Done:
        while not self.events:
            self.arrived.clear()
            await self.arrived.wait()
        event = self.events.popleft()
        self.count(event, -1)
        return event

    def count(self, event: Preview | Done, sign: int) -> None:
        if isinstance(event, Preview):
            self.memory.total += sign * event.pixels.nbytes

    def close(self) -> None:
        while self.events:
            self.count(self.events.popleft(), -1)


def soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call in the loop's thread, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(call)


async def within(seconds: float, awaitable: Awaitable[Event]) -> Event:
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError:
        return None
