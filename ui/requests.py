"""Drawing over HTTP: several requests at a time, and after each event what all of their pictures look like."""

import asyncio
import base64
import contextlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsd_serve.calls import Call, Event
from dsd_serve.client import AsyncClient
from dsd_serve.errors import ServerError
from ui.display import SHOWN, enlarged

AT_A_TIME = 16  # pictures of all visitors that are with the server: enough to fill its batches, and others find room
AT_ONCE = 160  # images of one press
OF_A_VISITOR = 2 * AT_ONCE  # images that one visitor may have asked for and not got, in all tabs
OF_ALL = 1024  # the same for all visitors
PAUSE = 0.1  # seconds between two looks at a drawing: faster than this is not seen, and costs
BYTES_PER_S = 2_000_000  # of images that looks at a drawing send to a visitor: each look sends all of them

T = TypeVar("T")

VISITOR = ContextVar("VISITOR", default="")  # whose event is at work: Gradio's session_hash


@dataclass
class Picture:
    """One picture, from its first preview to its end. `png` is a preview until `settings` are there."""

    title: str
    steps: int
    step: int = 0
    png: bytes = b""
    settings: dict[str, Any] | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        return self.settings is not None

    @property
    def caption(self) -> str:
        """Its seed and number, once it is done."""
        if self.settings is None:
            return ""
        return f"seed {self.settings['seed']}" + (f" #{self.settings['index']}" if self.settings["index"] else "")


@dataclass(frozen=True)
class Wish:
    """A request for `n` pictures of `steps` steps each, as a call that gives events."""

    title: str
    call: Call[Event]
    n: int
    steps: int


@dataclass
class Drawing:
    """All pictures of some wishes. `error`: the first sentence of the server's that ended a wish."""

    pictures: list[Picture]
    began: float = field(default_factory=time.monotonic)
    moved: float = 0.0  # when the first preview came: what was before is waiting
    running: bool = True
    stopped: bool = False  # before all of them had ended
    error: str = ""

    @property
    def first(self) -> int:
        """The number of the first picture that is done, 0 when none is."""
        return next((number for number, picture in enumerate(self.pictures) if picture.done), 0)

    @property
    def progress(self) -> float:
        """From 0 to 1, by steps."""
        steps = sum(picture.steps for picture in self.pictures)
        return sum(picture.steps if picture.done else picture.step for picture in self.pictures) / max(steps, 1)

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(len(picture.png) for picture in self.pictures)

    def seconds_left(self, now: float) -> float | None:
        """By the speed since the first preview; None before it."""
        if not self.moved or not self.progress:
            return None
        return (now - self.began) * (1 / self.progress - 1)

    def take(self, pictures: Sequence[Picture], event: Event) -> None:
        self.moved = self.moved or time.monotonic()
        if event.name == "done":
            return
        picture = pictures[event.data["image"]]
        if event.name == "error":
            picture.error = str(event.data["detail"])
            self.error = self.error or picture.error
            return
        picture.png = base64.b64decode(event.data["base64"])
        if event.name == "preview":
            picture.step = event.data["step"]
        else:
            picture.settings = {name: value for name, value in event.data.items() if name not in ("image", "base64")}


class Turns:
    """Lets what costs rows go to the server, at most AT_A_TIME images at a time, so that a crowd of visitors does not
    fill the server's queue for those who call its API themselves.

    Visitors take turns, one wish each; the wishes of one visitor go in the order in which they came. How much a visitor
    and all may have asked for is bounded.
    """

    def __init__(self) -> None:
        self.free = AT_A_TIME
        self.waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = (
            OrderedDict()
        )  # whose turn it is first
        self.asked: Counter[str] = Counter()  # images that a visitor has asked for and not got

    @contextlib.contextmanager
    def asking(self, n: int) -> Iterator[None]:
        """The time in which somebody has asked for n images. Raises ServerError 429 when that would be too many."""
        visitor = VISITOR.get()
        if self.asked[visitor] + n > OF_A_VISITOR:
            raise ServerError(
                f"{self.asked[visitor]} images that you asked for are not done yet, and at most {OF_A_VISITOR} may be: "
                "wait for them, or press Stop", 429,
            )  # fmt: skip
        if self.asked.total() + n > OF_ALL:
            raise ServerError("too many visitors draw on this page now: try again soon", 429)
        self.asked[visitor] += n
        try:
            yield
        finally:
            self.asked[visitor] -= n
            if not self.asked[visitor]:
                del self.asked[visitor]

    @contextlib.asynccontextmanager
    async def turn(self, n: int) -> AsyncIterator[None]:
        """The time in which a wish for n images is with the server."""
        visitor, n = VISITOR.get(), min(n, AT_A_TIME)
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

    def grant(self) -> None:
        """Give turns while there is room. Nobody overtakes, or large wishes would wait for ever."""
        while self.waiting:
            visitor, wishes = next(iter(self.waiting.items()))
            n, granted = wishes[0]
            if n > self.free or granted.cancelled():  # whoever was cancelled is about to leave, and calls here again
                return
            self.free -= n
            granted.set_result(None)
            wishes.popleft()
            self.waiting.move_to_end(visitor)
            if not wishes:
                del self.waiting[visitor]


class InTurn:
    """The client for everything but drawings: a call that costs rows waits for the turn of its visitor."""

    def __init__(self, client: AsyncClient, turns: Turns) -> None:
        self.client, self.turns = client, turns

    async def do(self, call: Call[T]) -> T:
        """Send a call and read its answer. Raises ServerError."""
        if call.method == "GET":
            return await self.client.do(call)
        n = images_of(call)
        with self.turns.asking(n):
            async with self.turns.turn(n):
                return await self.client.do(call)

    async def stream(self, call: Call[Event]) -> AsyncGenerator[Event, None]:
        """The events of a call as they come. Raises ServerError."""
        n = images_of(call)
        with self.turns.asking(n):
            async with self.turns.turn(n), contextlib.aclosing(self.client.stream(call)) as events:
                async for event in events:
                    yield event


def images_of(call: Call[Any]) -> int:
    """How many images a call asks for, AT_ONCE at most: the server says what is wrong with more."""
    asked = {**call.arguments.get("json", {}), **call.arguments.get("params", {})}.get("n", 1)
    return min(max(asked, 1), AT_ONCE) if isinstance(asked, int) else 1


async def draw(client: AsyncClient, turns: Turns, wishes: Sequence[Wish]) -> AsyncGenerator[Drawing, None]:
    """Send all wishes, each in its turn, and yield the same Drawing whenever it has changed, last when all have ended.

    Closing the iterator closes the requests, which cancels what the server has not done yet, and leaves the Drawing
    stopped. More wishes than a visitor may have end at once, with the sentence that says so.
    """
    groups = [[Picture(wish.title, wish.steps) for _ in range(wish.n)] for wish in wishes]
    drawing = Drawing([picture for group in groups for picture in group])
    changed = asyncio.Event()

    async def follow(wish: Wish, pictures: list[Picture]) -> None:
        try:
            async with turns.turn(wish.n), contextlib.aclosing(client.stream(wish.call)) as events:
                async for event in events:
                    drawing.take(pictures, event)
                    if event.name == "image":
                        picture = pictures[event.data["image"]]
                        picture.png = await asyncio.to_thread(enlarged, picture.png, SHOWN)
                    changed.set()
        except ServerError as error:
            drawing.error = drawing.error or str(error)
            for picture in pictures:
                picture.error = "" if picture.done else str(error)
        finally:
            changed.set()

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(turns.asking(len(drawing.pictures)))
        except ServerError as error:
            drawing.error, drawing.running = str(error), False
            yield drawing
            return
        tasks = [asyncio.create_task(follow(wish, group)) for wish, group in zip(wishes, groups, strict=True)]
        try:
            yield drawing
            while not all(task.done() for task in tasks):
                await changed.wait()
                changed.clear()
                yield drawing
                await asyncio.wait(tasks, timeout=max(PAUSE, drawing.size / BYTES_PER_S))
            await asyncio.gather(*tasks)  # raises what only a bug of ours can have raised
            drawing.running = False
            yield drawing
        finally:
            drawing.stopped, drawing.running = drawing.running, False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
