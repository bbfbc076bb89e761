"""Drawing over HTTP: several requests at a time, and the state of all their images after each event."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_serve.calls import Call, Event
from dsd_serve.errors import ServerError
from ui.display import SHOWN, enlarged
from ui.fair_limit import LimitedClient

PAUSE = 0.1  # seconds between two updates of a drawing; more would be invisible and costly
BYTES_PER_S = 2_000_000  # sent to a visitor by the updates of a drawing, each of which contains all its images


@dataclass
class DrawnImage:
    """An image from its first preview on. `png` is a preview until `settings` are set."""

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
        """Seed and index, once it is done."""
        if self.settings is None:
            return ""
        return f"seed {self.settings['seed']}" + (f" #{self.settings['index']}" if self.settings["index"] else "")


@dataclass(frozen=True)
class DrawRequest:
    """A request for `n` images of `steps` steps each. call: streams their events."""

    title: str
    call: Call[Event]
    n: int
    steps: int


@dataclass
class Drawing:
    """All images of some requests. error: the first error of the server that ended one of them."""

    images: list[DrawnImage]
    started: float = field(default_factory=time.monotonic)
    first_event: float = 0.0  # time of the first event; 0 while all requests wait
    seconds: float = 0.0  # from the start until all were done
    running: bool = True
    stopped: bool = False  # before all images were done
    error: str = ""

    @property
    def first(self) -> int:
        """Number of the first image that is done, 0 if none is."""
        return next((number for number, image in enumerate(self.images) if image.done), 0)

    @property
    def progress(self) -> float:
        """Fraction of the steps that are done, 0 to 1."""
        steps = sum(image.steps for image in self.images)
        return sum(image.steps if image.done else image.step for image in self.images) / max(steps, 1)

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(len(image.png) for image in self.images)

    def seconds_left(self, now: float) -> float | None:
        """Estimate from the progress so far; None before the first event."""
        if not self.first_event or not self.progress:
            return None
        return (now - self.started) * (1 / self.progress - 1)

    def update(self, images: Sequence[DrawnImage], event: Event) -> None:
        """Apply an event of the request for these images."""
        self.first_event = self.first_event or time.monotonic()
        if event.name == "done":
            return
        image = images[event.data["image"]]
        if event.name == "error":
            image.error = str(event.data["detail"])
            self.error = self.error or image.error
            return
        image.png = base64.b64decode(event.data["base64"])
        if event.name == "preview":
            image.step = event.data["step"]
        else:
            image.settings = {name: value for name, value in event.data.items() if name not in ("image", "base64")}


async def draw(client: LimitedClient, requests: Sequence[DrawRequest]) -> AsyncGenerator[Drawing, None]:
    """Send all requests, each in its turn. Yields the same Drawing whenever it has changed, last when all have ended.

    Closing the iterator closes the requests, which cancels unfinished work on the server, and leaves the Drawing
    stopped. If these are more images than a visitor may request, the Drawing ends at once with an error.
    """
    groups = [[DrawnImage(request.title, request.steps) for _ in range(request.n)] for request in requests]
    drawing = Drawing([image for group in groups for image in group])
    changed = asyncio.Event()

    async def follow(request: DrawRequest, images: list[DrawnImage]) -> None:
        try:
            async with (
                client.limit.turn(request.n),
                contextlib.aclosing(client.client.stream(client.chosen.apply(request.call))) as events,
            ):
                async for event in events:
                    drawing.update(images, event)
                    if event.name == "image":
                        image = images[event.data["image"]]
                        image.png = await asyncio.to_thread(enlarged, image.png, SHOWN)
                    changed.set()
        except ServerError as error:
            drawing.error = drawing.error or str(error)
            for image in images:
                image.error = "" if image.done else str(error)
        finally:
            changed.set()

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(client.limit.counting(len(drawing.images)))
        except ServerError as error:
            drawing.error, drawing.running = str(error), False
            yield drawing
            return
        tasks = [asyncio.create_task(follow(request, group)) for request, group in zip(requests, groups, strict=True)]
        try:
            yield drawing
            while not all(task.done() for task in tasks):
                await changed.wait()
                changed.clear()
                yield drawing
                await asyncio.wait(tasks, timeout=max(PAUSE, drawing.size / BYTES_PER_S))
            await asyncio.gather(*tasks)  # raises only what a bug of ours can raise
            drawing.running, drawing.seconds = False, time.monotonic() - drawing.started
            yield drawing
        finally:
            drawing.stopped, drawing.running = drawing.running, False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
