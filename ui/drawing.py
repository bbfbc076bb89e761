"""Drawing over HTTP: several requests at a time, and after each event what all of their pictures look like."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_serve.calls import Call, Event
from dsd_serve.client import AsyncClient
from dsd_serve.errors import ServerError
from ui.pictures import SHOWN, enlarged

AT_A_TIME = 16  # pictures of all visitors that are with the server: enough to fill its batches, and others find room
PAUSE = 0.1  # seconds between two looks at a drawing: faster than this is not seen, and costs


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
    """Lets wishes go to the server in the order in which they came, at most AT_A_TIME pictures at a time, so that a
    crowd of visitors does not fill the server's queue for those who call its API themselves."""

    def __init__(self) -> None:
        self.door = asyncio.Lock()
        self.room = asyncio.Semaphore(AT_A_TIME)

    @contextlib.asynccontextmanager
    async def turn(self, n: int) -> AsyncIterator[None]:
        """The time in which a wish for n pictures is with the server."""
        taken = 0
        try:
            async with self.door:
                for _ in range(min(n, AT_A_TIME)):
                    await self.room.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self.room.release()


async def draw(client: AsyncClient, turns: Turns, wishes: Sequence[Wish]) -> AsyncGenerator[Drawing, None]:
    """Send all wishes, each in its turn, and yield the same Drawing whenever it has changed, last when all have ended.

    Closing the iterator closes the requests, which cancels what the server has not done yet, and leaves the Drawing
    stopped.
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

    tasks = [asyncio.create_task(follow(wish, group)) for wish, group in zip(wishes, groups, strict=True)]
    try:
        yield drawing
        while not all(task.done() for task in tasks):
            await changed.wait()
            changed.clear()
            yield drawing
            await asyncio.sleep(PAUSE)
        await asyncio.gather(*tasks)  # raises what only a bug of ours can have raised
        drawing.running = False
        yield drawing
    finally:
        drawing.stopped, drawing.running = drawing.running, False
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
