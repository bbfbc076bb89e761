"""Request ids, and a `RequestRecord` of each request for logs and metrics when it ends."""

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
class RequestRecord:
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
        """The path template of the route that took it, or would have; "none" without one, so that clients cannot create
        new values."""
        taken = getattr(self.scope.get("route"), "path", None)
        if taken is None and "app" in self.scope:
            taken = template(self.scope, self.scope["path"])
        return taken or "none"

    @property
    def error(self) -> Exception | None:
        """The DSDError that the answer reports, if any."""
        error: Exception | None = self.scope.get("state", {}).get("error")
        return error


Listener = Callable[[RequestRecord], None]


class RequestIds:
    """ASGI middleware, around everything that answers: request ids, and a record of each request at its end."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Listener]) -> None:
        self.app, self.listeners = UncaughtErrors(app), listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        number = choose_id(Headers(scope=scope).get(HEADER, ""))
        error_responses.request_id.set(number)
        record = RequestRecord(scope)

        async def observed_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not record.complete:
                record.disconnected = True
            return message

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[HEADER] = number
                record.status, record.headers = message["status"], headers
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                record.complete = True

        try:
            await self.app(scope, observed_receive, observed_send)
        finally:
            self.end(record)

    def end(self, record: RequestRecord) -> None:
        record.seconds = time.perf_counter() - record.began
        if record.disconnected:
            record.status = CLIENT_WENT_AWAY
        for listener in self.listeners:
            listener(record)


class UncaughtErrors:
    """ASGI middleware: answers 500 to uncaught errors."""

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


def choose_id(sent: str) -> str:
    """The client's own id where it is harmless, else a new one."""
    return sent if SANE_ID.fullmatch(sent) else uuid.uuid4().hex


def install(app: FastAPI, *listeners: Listener) -> None:
    app.add_middleware(RequestIds, listeners=listeners)
