"""A limit on the images that the page requests from its server at a time, shared fairly between visitors."""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsd_serve.calls import Call, Event
from dsd_serve.client import AsyncClient
from dsd_serve.errors import ServerError
from ui.chosen_model import VISITOR, ChosenModels

IN_FLIGHT = 16  # images of all visitors at the server: enough to fill its batches and leave room for its other clients
PER_CLICK = 160  # images of one click
PER_VISITOR = 2 * PER_CLICK  # unfinished images of one visitor, in all tabs
TOTAL = 1024  # unfinished images of all visitors

MAX_RETRY_S = 600.0  # for which a call that the server's queue has no room for is sent again
LEAST_PAUSE_S = 1.0

T = TypeVar("T")


class FairLimit:
    """Admits at most IN_FLIGHT images at a time, so that visitors do not fill the queue that API clients share.

    Visitors take turns, one request each; the requests of one visitor are admitted in order. The number of unfinished
    images is bounded for each visitor and for all.
    """

    def __init__(self) -> None:
        self.free = IN_FLIGHT
        # By visitor, the next one first.
        self.waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self.unfinished: Counter[str] = Counter()  # images, by visitor

    @contextlib.contextmanager
    def counting(self, n: int) -> Iterator[None]:
        """Count n images as unfinished while the context is open. Raises ServerError 429 when that is too many."""
        visitor = VISITOR.get()
        if self.unfinished[visitor] + n > PER_VISITOR:
            raise ServerError(
                f"at most {PER_VISITOR} of your images may be unfinished, {self.unfinished[visitor]} are: wait for "
                "them, or press Stop", 429,
            )  # fmt: skip
        if self.unfinished.total() + n > TOTAL:
            raise ServerError("too many visitors are drawing on this page now: try again soon", 429)
        self.unfinished[visitor] += n
        try:
            yield
        finally:
            self.unfinished[visitor] -= n
            if not self.unfinished[visitor]:
                del self.unfinished[visitor]

    @contextlib.asynccontextmanager
    async def turn(self, n: int) -> AsyncIterator[None]:
        """Wait until a request for n images may go to the server; the context is open while it is there."""
        visitor, n = VISITOR.get(), min(n, IN_FLIGHT)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(visitor, deque()).append((n, granted))
        self.grant()
        try:
            await granted
            yield
        finally:
            if granted.cancelled():
                self.waiting[visitor].remove((n, granted))
                if not self.waiting[visitor]:
                    del self.waiting[visitor]
            else:
                self.free += n
            self.grant()

    def in_flight(self) -> int:
        """Images of the visitor whose event is running that are at the server."""
        visitor = VISITOR.get()
        return self.unfinished[visitor] - sum(n for n, _ in self.waiting.get(visitor, ()))

    def ahead(self) -> int:
        """Images that are requested before the next one of the visitor whose event is running."""
        visitor, found = VISITOR.get(), 0
        for name, requests in self.waiting.items():
            if name == visitor:
                return found
            found += requests[0][0]
        return 0

    def grant(self) -> None:
        """Grant turns while there is room. Nobody overtakes: large requests would otherwise wait for ever."""
        while self.waiting:
            visitor, requests = next(iter(self.waiting.items()))
            n, granted = requests[0]
            if n > self.free or granted.cancelled():  # a cancelled request is about to leave and calls this again
                return
            self.free -= n
            granted.set_result(None)
            requests.popleft()
            self.waiting.move_to_end(visitor)
            if not requests:
                del self.waiting[visitor]


@dataclass(frozen=True)
class Refused:
    """The server's queue has no room for a call, which is sent again after a pause in seconds."""

    pause: float


async def until_admitted(send: Callable[[], Awaitable[T]]) -> AsyncGenerator[Refused | T, None]:
    """Call send again as long as the server's queue is full. Yields every refusal, before its pause, and at last what
    send returns. Raises ServerError for errors that waiting does not mend, and after MAX_RETRY_S."""
    began = time.monotonic()
    while True:
        try:
            answer = await send()
        except ServerError as error:
            if error.retry_after is None:
                raise
            pause = max(LEAST_PAUSE_S, error.retry_after)
            if time.monotonic() + pause - began > MAX_RETRY_S:
                raise
        else:
            yield answer
            return
        yield Refused(pause)
        await asyncio.sleep(pause)


@dataclass(frozen=True)
class LimitedClient:
    """A client whose calls go to the model that their visitor has chosen, and wait for their visitor's turn if they
    cost the server rows."""

    client: AsyncClient
    limit: FairLimit = field(default_factory=FairLimit)
    chosen: ChosenModels = field(default_factory=ChosenModels)

    async def do(self, call: Call[T]) -> T:
        """Send a call and read its answer. If the server's queue is full, it is sent again when the server says.

        Raises ServerError.
        """
        answers = self.attempts(call)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                if not isinstance(answer, Refused):
                    return answer
        raise AssertionError("attempts end with an answer or an error")

    async def attempts(self, call: Call[T]) -> AsyncGenerator[Refused | T, None]:
        """As `do`, for a caller that shows what it waits for: every refusal, and at last the answer."""
        call = self.chosen.apply(call)
        if call.method == "GET":
            found = await self.client.do(call)
            yield found
            return
        n = images_of(call)

        async def send() -> T:
            async with self.limit.turn(n):
                return await self.client.do(call)

        with self.limit.counting(n):
            answers = until_admitted(send)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    yield answer

    async def stream(self, call: Call[Event]) -> AsyncGenerator[Event, None]:
        """The events of a call as they arrive. Raises ServerError."""
        call = self.chosen.apply(call)
        n = images_of(call)
        with self.limit.counting(n):
            async with self.limit.turn(n), contextlib.aclosing(self.client.stream(call)) as events:
                async for event in events:
                    yield event


def images_of(call: Call[Any]) -> int:
    """Number of images that a call requests, from 1 to PER_CLICK. The server explains what is wrong with others."""
    n = {**call.arguments.get("json", {}), **call.arguments.get("params", {})}.get("n", 1)
    return min(max(n, 1), PER_CLICK) if isinstance(n, int) else 1
