"""Shutdown: a draining server goes on listening, finishes running requests and refuses new ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import ClosedError
from server import error_responses
from server.site import HEALTH

log = logging.getLogger(__name__)

ALWAYS_ANSWERED = ("/health/live", "/metrics")


class Drain:
    """The state of the shutdown: when it began, and the number of requests in flight."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.in_flight = 0
        self.uncounted: tuple[str, ...] = ()  # path prefixes of streams that stay open as long as a page does
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
        if (
            scope["type"] != "http"
            or scope["path"] in ALWAYS_ANSWERED
            or scope["path"].startswith(self.drain.uncounted)
        ):
            await self.app(scope, receive, send)
            return
        if self.drain.draining:
            if not scope["path"].startswith(HEALTH):
                self.rejected("draining")
            await error_responses.answer(
                ClosedError("the server is shutting down; try again later"), scope, receive, send
            )
            return
        self.drain.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.in_flight -= 1


def install(app: FastAPI, drain: Drain, rejected: Callable[[str], None]) -> None:
    app.add_middleware(DrainMiddleware, drain=drain, rejected=rejected)
