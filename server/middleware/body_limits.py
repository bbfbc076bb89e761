"""Limits on the bodies of requests, before anything reads them: size, time, encoding, and the memory of all."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsd_serve.errors import shown
from dsd_serve.memory import Memory
from server import error_responses
from server.http_heads import WITH_BODY
from server.request_memory import resources_of
from server.request_reader import media_type
from server.settings import Settings

MAX_JSON_BYTES = 1_000_000  # parsed, JSON takes many times its size
MAX_UNASKED_BYTES = 100_000  # of the body of a GET, which nothing reads
COPIES = 2  # the body, and the files that are read from it
LEAST_BYTES = 5_000  # that must come in each GRACE seconds
GRACE = 5.0  # seconds
IDLE = 1.0  # seconds without LEAST_BYTES after which a body is dropped for others when memory is short
PIECE = 262_144  # bytes of an answer that are handed over at once


class BodyLimits:
    """ASGI middleware. 413 for a body that is too large, 408 for one that comes too slowly, 415 for one that is
    compressed, 429 while the bodies of all requests take more memory than is set aside for them.

    The resources of a request, its body and the memory of its answer, are released when the answer has been sent.
    """

    def __init__(self, app: ASGIApp, settings: Settings, memory: Memory) -> None:
        self.app = app
        self.max_bytes = int(settings.max_body_mb * 1e6)
        self.memory = memory
        self.seconds = settings.body_timeout
        self.coming: set[Body] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity" and scope["method"] in WITH_BODY:
            detail = f"the body must be sent as it is, without content-encoding, got {shown(encoding)}"
            await error_responses.answer(HTTPException(415, detail), scope, receive, send)
            return
        held = resources_of(scope)
        body = Body(self, scope, headers, receive)
        held.put("body", body.release)
        try:
            await self.app(scope, body.receive, in_pieces(send))
        finally:
            body.came()
            held.release()

    def make_room(self, size: int) -> None:
        """Cut stalled bodies, the slowest first, until there is room for `size` bytes or none is left."""
        now = asyncio.get_running_loop().time()
        for body in sorted(self.coming, key=lambda body: body.since):
            if self.memory.total + size <= self.memory.limit:
                return
            if now - body.since > IDLE and body.claim.size:
                body.cut()


class Body:
    """The incoming body of one request."""

    def __init__(self, limits: BodyLimits, scope: Scope, headers: Headers, receive: Receive) -> None:
        self.limits, self.source = limits, receive
        json = media_type(scope).endswith("json")
        self.max_bytes = min(limits.max_bytes, MAX_JSON_BYTES) if json else limits.max_bytes
        self.method = scope["method"]
        if self.method not in WITH_BODY:
            self.max_bytes = min(self.max_bytes, MAX_UNASKED_BYTES)
        length = headers.get("content-length", "")
        self.announced = int(length[:20]) if length.isdecimal() else 0
        self.size = 0
        self.claim = limits.memory.claim(0, resources_of(scope).who)
        self.complete = False
        self.deadline = asyncio.get_running_loop().time() + limits.seconds
        self.since, self.recent = self.deadline - limits.seconds, 0  # LEAST_BYTES came last, and bytes after it
        self.wait: asyncio.Timeout | None = None
        self.slow = ""

    async def receive(self) -> Message:
        if self.complete:
            return await self.source()
        if not self.size:
            self.check_size(self.announced)
        if self.slow:
            raise HTTPException(408, self.slow, {"Connection": "close"})
        self.limits.coming.add(self)
        try:
            async with asyncio.timeout_at(min(self.deadline, self.since + GRACE)) as self.wait:
                message = await self.source()
        except TimeoutError:
            self.came()
            raise HTTPException(408, self.slow or self.why_late(), {"Connection": "close"}) from None
        finally:
            self.wait = None
        if message["type"] != "http.request":
            self.came()
            raise HTTPException(400, "the connection was closed before the whole body had arrived")
        added = len(message.get("body", b""))
        self.check_size(added)
        self.check_memory(COPIES * added)
        self.size += added
        self.limits.memory.add(self.claim, COPIES * added)
        self.recent += added
        if self.recent >= LEAST_BYTES:
            self.since, self.recent = asyncio.get_running_loop().time(), 0
        if not message.get("more_body", False):
            self.complete = True
            self.came()
        return message

    def why_late(self) -> str:
        if asyncio.get_running_loop().time() >= self.deadline:
            return (
                f"the body did not arrive within {self.limits.seconds:g} seconds; send a smaller one, or send it faster"
            )
        return f"fewer than {LEAST_BYTES:,} bytes of the body arrived in {GRACE:g} seconds; send it faster"

    def check_size(self, added: int) -> None:
        """Refuse bytes beyond what this body may have."""
        if self.size + added > self.max_bytes:
            self.came()
            limit = f"larger than {self.max_bytes / 1e6:g} MB"
            if self.method not in WITH_BODY:
                raise HTTPException(413, f"a {self.method} takes no body, and this one is {limit}; send it by POST")
            raise HTTPException(413, f"the body is {limit}, which is the limit of this server")

    def check_memory(self, added: int) -> None:
        """Refuse bytes beyond the memory for the bodies of this client, or of all. Stalled bodies are cut first."""
        memory, who = self.limits.memory, self.claim.who
        if memory.total + added > memory.limit:
            self.limits.make_room(added)
        if memory.total + added > memory.limit:
            detail = "the memory for uploads is full; try again soon"
        elif not memory.has_share(added, who) and memory.held[who or ""] > self.claim.size:
            detail = f"the uploads of {who} take half of the memory for uploads; send fewer at a time"
        else:
            return
        self.came()
        raise HTTPException(429, detail, {"Retry-After": "1"})

    def cut(self) -> None:
        """End this body now, because others need its memory."""
        self.slow = "the body arrived too slowly while the memory for uploads was full; send it faster"
        self.came()
        self.release()
        if self.wait is not None:
            self.wait.reschedule(0)

    def came(self) -> None:
        """Stop counting this body as incoming."""
        self.limits.coming.discard(self)

    def release(self) -> None:
        """Give back the memory of the bytes."""
        self.claim.release()


def in_pieces(send: Send) -> Send:
    """Sends a large body piece by piece, each when most of the last one is on its way.

    A body that is handed over whole lies in the connection's buffer after the request has ended.
    """

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] != "http.response.body" or len(body) <= PIECE:
            await send(message)
            return
        for start in range(0, len(body), PIECE):
            await send({"type": "http.response.body", "body": body[start : start + PIECE], "more_body": True})
        await send({**message, "body": b""})

    return send_pieces
