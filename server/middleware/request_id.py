"""What every request has: an id, an answer, and one `Exchange` that logs and metrics are told of at its end."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastapi import FastAPI
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import error_responses
from server.router import template

log = logging.getLogger(__name__)

HEADER = "X-Request-ID"
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_WENT_AWAY = 499  # as nginx writes it; no such answer is sent


@dataclass
class Exchange:
    """A request and its answer. status 0: no answer was begun; 499: the client went away before the answer's end."""

    scope: Scope
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    status: int = 0
    headers: Headers = field(default_factory=Headers)  # of the answer
    complete: bool = False
    disconnected: bool = False

    @property
    def route(self) -> str:
        """The path template of the route that took it, or would have; "none" without one: clients cannot make up new
        values."""
        taken = getattr(self.scope.get("route"), "path", None)
        if taken is None and "app" in self.scope:
            taken = template(self.scope, self.scope["path"])
        return taken or "none"

    @property
    def error(self) -> Exception | None:
        """The error of ours that the answer tells of."""
        error: Exception | None = self.scope.get("state", {}).get("error")
        return error


Listener = Callable[[Exchange], None]


class Watch:
    """ASGI middleware around all that answers: request ids, and the end of each exchange."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Listener]) -> None:
        self.app, self.listeners = Mistakes(app), listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number = choose_id(Headers(scope=scope).get(HEADER, ""))
        error_responses.request_id.set(number)
        exchange = Exchange(scope)

        async def observed_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not exchange.complete:
                exchange.disconnected = True
            return message

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[HEADER] = number
                exchange.status, exchange.headers = message["status"], headers
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                exchange.complete = True

        try:
            await self.app(scope, observed_receive, observed_send)
        finally:
            self.end(exchange)

    def end(self, exchange: Exchange) -> None:
        exchange.seconds = time.perf_counter() - exchange.began
        if exchange.disconnected:
            exchange.status = CLIENT_WENT_AWAY
        for listener in self.listeners:
            listener(exchange)


class Mistakes:
    """ASGI middleware: the answer to what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def observed_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, observed_send)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise  # too late for an answer: uvicorn logs it and closes the connection
            log.exception("a request failed")
            trace.get_current_span().record_exception(error)
            await error_responses.answer(error, scope, receive, send)


def choose_id(asked: str) -> str:
    """The client's own id where it is harmless, else a new one."""
    return asked if SANE_ID.fullmatch(asked) else uuid.uuid4().hex


def install(app: FastAPI, *listeners: Listener) -> None:
    app.add_middleware(Watch, listeners=listeners)
