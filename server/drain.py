"""The end of a server: at SIGTERM or SIGINT it goes on listening, finishes what runs and refuses what is new."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.batcher import Batcher
from dsd_serve.errors import ClosedError
from dsd_serve.triton import RemoteBatcher
from server import errors

log = logging.getLogger(__name__)

ALWAYS_ANSWERED = ("/health/live", "/metrics")
PAGE = ("/gradio_api/", "/studio/")  # streams that stay open as long as a page does; what it asks of the API counts
LAST_ANSWERS = 5  # seconds for answers on their way once everything else is over


class Drain:
    """Whether the server is shutting down, and the number of requests in flight."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.in_flight = 0
        self.at_end: list[Callable[[], None]] = []  # called once nothing is in flight any more

    def begin(self) -> None:
        self.began = time.monotonic()

    @property
    def draining(self) -> bool:
        return self.began is not None


class DrainMiddleware:
    """ASGI middleware that counts requests in flight, and answers new ones with 503 once the server drains."""

    def __init__(self, app: ASGIApp, drain: Drain, rejected: Callable[[str], None]) -> None:
        self.app, self.drain, self.rejected = app, drain, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED or scope["path"].startswith(PAGE):
            await self.app(scope, receive, send)
            return
        if self.drain.draining:
            if not scope["path"].startswith("/health/"):
                self.rejected("draining")
            await errors.answer(ClosedError("the server is shutting down; try again later"), scope, receive, send)
            return
        self.drain.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.in_flight -= 1


class DrainingServer(uvicorn.Server):
    """Uvicorn closes its socket at SIGTERM, so that clients find nobody; this one answers until the last request ends.

    After `grace` seconds what still runs is cancelled. A second signal ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, batcher: Batcher | RemoteBatcher, grace: float) -> None:
        super().__init__(config)
        self.drain, self.batcher, self.grace = drain, batcher, grace
        self.told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain.draining:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.drain.begin()  # no more here: a signal handler must not log, and may have interrupted anything

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s; True ends the server."""
        if self.drain.began is not None and not self.should_exit:
            self.tell(f"shutting down; {self.drain.in_flight} requests in flight have {self.grace:g} s to finish")
            over = time.monotonic() - self.drain.began >= self.grace
            if over and self.drain.in_flight:
                log.warning("%d requests did not finish in time and are cancelled", self.drain.in_flight)
                await asyncio.to_thread(self.batcher.close, 0)  # their clients get 503
            self.should_exit = over or not self.drain.in_flight
            if self.should_exit:
                for call in self.drain.at_end:
                    call()
        return await super().on_tick(counter)

    def tell(self, sentence: str) -> None:
        if not self.told:
            log.info(sentence)
        self.told = True


def install(app: FastAPI, drain: Drain, rejected: Callable[[str], None]) -> None:
    app.add_middleware(DrainMiddleware, drain=drain, rejected=rejected)
