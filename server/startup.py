"""Startup that waits for a model: the server listens and answers 503 with the reason until the model is known."""

import asyncio
import logging
import signal
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server import error_responses

log = logging.getLogger(__name__)


class StartupApp:
    """ASGI application that is replaced by the result of `make`.

    make: called in a thread, where it may block. not_ready: the reason that clients get until then. give_up: makes
    `make` raise, if the server ends first. failed: the error of `make`, after which `end` ends the server.
    """

    def __init__(
        self,
        make: Callable[[], FastAPI],
        not_ready: Callable[[], str | None],
        give_up: Callable[[], object],
        end: Callable[[], object] = lambda: signal.raise_signal(signal.SIGTERM),
    ) -> None:
        self.make, self.not_ready, self.give_up, self.end = make, not_ready, give_up, end
        self.app: ASGIApp | None = None
        self.failed: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self.answer(scope)(scope, receive, send)

    def answer(self, scope: Scope) -> JSONResponse:
        if scope["path"] == "/health/live":
            return JSONResponse({"status": "live"})
        return error_responses.problem(
            503, self.not_ready() or "the server is starting; try again soon", {"Retry-After": "5"}
        )

    async def lifespan(self, receive: Receive, send: Send) -> None:
        await receive()  # lifespan.startup
        ended = asyncio.Event()
        holding = asyncio.create_task(self.hold(ended))
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        ended.set()
        if self.app is None:
            await asyncio.to_thread(self.give_up)
        await holding
        await send({"type": "lifespan.shutdown.complete"})

    async def hold(self, ended: asyncio.Event) -> None:
        """Make the application, and keep it open until the server ends."""
        try:
            app = await asyncio.to_thread(self.make)
            async with app.router.lifespan_context(app):
                self.app = app
                await ended.wait()
        except Exception as error:
            if not ended.is_set():
                self.failed = error
                self.end()
