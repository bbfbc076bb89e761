"""Drawing over HTTP: several requests at a time, and the state of all their images after each event."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsd_serve import calls
from dsd_serve.calls import Call, Event
from dsd_serve.errors import ServerError
from ui.display import SHOWN, enlarged
from ui.fair_limit import LimitedClient, until_admitted
from ui.finished import Finished, FinishedImages

PAUSE = 0.1  # seconds between two updates of a drawing; more would be invisible and costly
WAITING_S = 1.0  # between two updates while nothing has begun


@dataclass
class DrawnImage:
    """An image from its first preview on. preview: a PNG. finished: set once it is done."""

    title: str
    steps: int
    step: int = 0
    preview: bytes = b""
    finished: Finished | None = None
    error: str = ""

    @property
    def done(self) -> bool:
        return self.finished is not None

    @property
    def caption(self) -> str:
        """Seed and index, once it is done."""
        if self.finished is None:
            return ""
        settings = self.finished.settings
        return (f"#{settings['index']}, " if settings["index"] else "") + f"seed {settings['seed']}"


@dataclass(frozen=True)
class DrawRequest:
    """A request for `n` images of `steps` steps each. call: streams their events. model: its name, empty for the
    server's first."""

    title: str
    call: Call[Event]
    n: int
    steps: int
    model: str = ""


@dataclass
class Drawing:
    """All images of some requests.

    link: the query string from which they can be drawn again. error: the first error of the server that ended one of
    the requests. retry_at: time at which a request that the server refused is sent again, 0 while none waits for that.
    ahead: images that the server and this page draw first, while nothing has begun; seconds_ahead: how long they take.
    """

    images: list[DrawnImage]
    link: str = ""
    started: float = field(default_factory=time.monotonic)
    first_event: float = 0.0  # time of the first event; 0 while all requests wait
    first_progress: float = 0.0  # after it
    seconds: float = 0.0  # from the start until all were done
    running: bool = True
    stopped: bool = False  # before all images were done
    error: str = ""
    retry_at: float = 0.0
    ahead: int = 0
    seconds_ahead: float = 0.0

    @property
    def first(self) -> int:
        """Number of the first image that is done, 0 if none is."""
        return next((number for number, image in enumerate(self.images) if image.done), 0)

    @property
    def empty(self) -> bool:
        """Whether it has nothing to show."""
        return not any(image.done or image.preview for image in self.images)

    @property
    def progress(self) -> float:
        """Fraction of the steps that are done, 0 to 1."""
        steps = sum(image.steps for image in self.images)
        return sum(image.steps if image.done else image.step for image in self.images) / max(steps, 1)

    @property
    def size(self) -> int:
        """Bytes of all previews; finished images are counted where they are kept."""
        return sum(len(image.preview) for image in self.images)

    def seconds_left(self, now: float) -> float | None:
        """Estimate from the progress since the first event, however long that had to wait; None before there is any."""
        progress = self.progress - self.first_progress
        return (now - self.first_event) / progress * (1 - self.progress) if progress > 0 else None

    def update(self, images: Sequence[DrawnImage], event: Event) -> None:
        """Apply a preview or an error of the request for these images."""
        if event.name not in ("preview", "error"):
            return
        image = images[event.data["image"]]
        if event.name == "error":
            image.error = str(event.data["detail"])
            self.error = self.error or image.error
            return
        image.preview = base64.b64decode(event.data["base64"])
        image.step = event.data["step"]


async def draw(
    client: LimitedClient, requests: Sequence[DrawRequest], kept: FinishedImages, link: str = ""
) -> AsyncGenerator[Drawing, None]:
    """Send all requests, each in its turn. Yields the same Drawing whenever it has changed, last when all have ended.

    Closing the iterator closes the requests, which cancels unfinished work on the server, and leaves the Drawing
    stopped. If these are more images than a visitor may request, the Drawing ends at once with an error. A request for
    which the server's queue has no room is sent again when the server says.
    """
    groups = [[DrawnImage(request.title, request.steps) for _ in range(request.n)] for request in requests]
    drawing = Drawing([image for group in groups for image in group], link)
    changed = asyncio.Event()

    async def finish(request: DrawRequest, images: list[DrawnImage], data: dict[str, Any]) -> None:
        image = images[data["image"]]
        settings = {name: value for name, value in data.items() if name not in ("image", "base64")}
        png = await asyncio.to_thread(enlarged, base64.b64decode(data["base64"]), SHOWN)
        image.finished = kept.keep(png, image.title, settings, model=request.model)
        image.preview = b""

    async def send(request: DrawRequest, images: list[DrawnImage]) -> None:
        async with (
            client.limit.turn(request.n),
            contextlib.aclosing(client.client.stream(client.chosen.apply(request.call))) as events,
        ):
            async for event in events:
                drawing.retry_at = 0.0
                drawing.update(images, event)
                if event.name == "image":
                    await finish(request, images, event.data)
                if not drawing.first_event:
                    drawing.first_event, drawing.first_progress = time.monotonic(), drawing.progress
                changed.set()

    async def follow(request: DrawRequest, images: list[DrawnImage]) -> None:
        try:
            async for refused in until_admitted(lambda: send(request, images)):
                if refused:
                    drawing.retry_at = time.monotonic() + refused.pause
                    changed.set()
        except ServerError as error:
            drawing.error = drawing.error or str(error)
            for image in images:
                image.error = "" if image.done else str(error)
        finally:
            changed.set()

    async def look_ahead() -> None:
        """What is ahead of the drawing, while nothing of it has begun."""
        with contextlib.suppress(ServerError):
            load = await client.client.do(calls.batcher())
            own = client.limit.in_flight()
            drawing.ahead = max(0, len(load["running"]) + len(load["waiting"]) - own) + client.limit.ahead()
            drawing.seconds_ahead = float(load["seconds_ahead"])

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
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WAITING_S if not drawing.first_event or drawing.retry_at else None):
                        await changed.wait()
                if not (changed.is_set() or drawing.first_event):
                    await look_ahead()
                changed.clear()
                yield drawing
                await asyncio.wait(tasks, timeout=PAUSE)
            await asyncio.gather(*tasks)  # raises only what a bug of ours can raise
            drawing.running, drawing.seconds = False, time.monotonic() - drawing.started
            yield drawing
        finally:
            drawing.stopped, drawing.running = drawing.running, False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def restored(link: str, images: Sequence[Finished]) -> Drawing:
    """A drawing that has ended, of images that are kept."""
    drawn = [DrawnImage(one.title, int(one.settings.get("steps", 0)), finished=one) for one in images]
    return Drawing(drawn, link, running=False)
