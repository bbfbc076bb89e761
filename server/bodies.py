"""Limits on the bodies of requests, before anything reads them: size, time, encoding, and the memory of all."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsd_serve.errors import shown
from server import errors
from server.reading import media_type
from server.settings import Settings

MAX_JSON_BYTES = 1_000_000  # parsed, JSON takes many times its size
COPIES = 2  # a body, and what is read out of it


class BodyLimits:
    """ASGI middleware. 413 for a body that is too large, 408 for one that comes too slowly, 415 for one that is
    compressed, 429 while the bodies of all requests take more memory than is set aside for them."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_bytes = int(settings.max_body_mb * 1e6)
        self.max_total = int(settings.max_uploads_mb * 1e6)
        self.seconds = settings.body_timeout
        self.total = 0  # bytes that bodies take now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            detail = f"the body must be sent as it is, without content-encoding, got {shown(encoding)}"
            await errors.answer(HTTPException(415, detail), scope, receive, send)
            return
        body = Body(self, headers, receive)
        scope["dsd.body"] = body
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.release()


class Body:
    """The body of one request while it comes in."""

    def __init__(self, limits: BodyLimits, headers: Headers, receive: Receive) -> None:
        self.limits, self.source = limits, receive
        json = media_type(headers).endswith("json")
        self.max_bytes = min(limits.max_bytes, MAX_JSON_BYTES) if json else limits.max_bytes
        length = headers.get("content-length", "")
        self.announced = int(length[:20]) if length.isdecimal() else 0
        self.size = self.held = 0
        self.complete = False
        self.deadline = asyncio.get_running_loop().time() + limits.seconds

    async def receive(self) -> Message:
        if self.complete:
            return await self.source()
        if not self.size:
            self.check(self.announced)
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.source()
        except TimeoutError:
            raise HTTPException(
                408,
                f"the body did not come within {self.limits.seconds:g} seconds; send a smaller one, or send it faster",
                {"Connection": "close"},
            ) from None
        if message["type"] != "http.request":
            raise HTTPException(400, "the connection was closed before the whole body had come")
        added = len(message.get("body", b""))
        self.check(added)
        self.size += added
        self.held += COPIES * added
        self.limits.total += COPIES * added
        self.complete = not message.get("more_body", False)
        return message

    def check(self, added: int) -> None:
        """Refuse bytes beyond what this body, or all bodies together, may have."""
        if self.size + added > self.max_bytes:
            raise HTTPException(
                413, f"the body is larger than {self.max_bytes / 1e6:g} MB, which is the limit of this server"
            )
        if self.limits.total + COPIES * added > self.limits.max_total:
            raise HTTPException(
                429, "the uploads of others fill the memory set aside for them; try again soon", {"Retry-After": "1"}
            )

    def release(self) -> None:
        """The bytes are no longer held."""
        self.limits.total -= self.held
        self.held = 0
