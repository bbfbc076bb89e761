"""HTTP/1.1: uvicorn's httptools protocol, with bounds on heads, unread bodies and unread answers."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server import error_responses
from server.connections import ConnectionLimiter, network_of
from server.http_heads import MAX_HEAD, WITH_BODY, RejectedRequest, answer_of, check_head, malformed
from server.site import HEALTH
from server.transport import Line

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

MAX_IGNORED = 1_000_000  # bytes of a body that the application does not read

# After an answer that came before the end of its request, what still comes is read and thrown away. A socket that is
# closed with unread data makes TCP reset the connection, which destroys the answer on its way (RFC 9112, 9.6).
LINGER_SECONDS = 30
LINGER_SILENCE = 5  # seconds without a byte
LINGER_BYTES = 256_000_000

LEAST_TAKEN = 65_536  # bytes of an answer that a client must take in --write-timeout seconds
LATE = 5  # seconds after --body-timeout; until then the application answers, which says more
PROBE_SECONDS = 0.05  # for a reset to come back from a near client; later ones are found at the next check

TCP_CLOSE = 7  # state of a socket that was reset, from Linux's tcp_states.h


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Its head has a size and a time, its answer must be taken, and an offer to upgrade is ignored.

    llhttp gathers a head of any size in memory. What arrives in one read is parsed whole, so a head of up to
    `MAX_HEAD` bytes and one read (256 KiB) may pass.
    """

    def __init__(self, limiter: ConnectionLimiter, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.limiter = limiter
        self.served: ASGIApp = config.loaded_app
        self.app = self.run
        self.surplus: RejectedRequest | None = None  # why the requests of this connection are refused
        self.first = True  # no head has been complete yet
        self.in_head = True  # the next byte belongs to a head
        self.begun = False  # something of that head has come
        self.head = 0  # bytes that arrived since the last read with a body, or the end of a head or a message, in it
        self.fruitful = False  # this read had such a thing
        self.come = 0  # bytes of the body, or of what is thrown away
        self.ignored = False  # the application does not read this body
        self.unanswered = 0  # requests whose head is complete and whose answer is not
        self.refused = False  # nothing more is parsed
        self.refusal = b""  # an answer that waits for those before it
        self.half_closed = False  # the client has sent all that it will
        self.since = self.heard = self.stalled = 0.0  # loop times: state began, last byte in, answer last taken
        self.taken = 0  # bytes of answers that had been taken at `stalled`

    # Called by the event loop.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.line = Line(transport, self.hang_up)
        super().connection_made(self.line)  # type: ignore[arg-type]
        self.address = network_of(self.client[0] if self.client else "")
        self.since = self.heard = self.stalled = self.loop.time()
        self.surplus = self.limiter.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.line.closing = True
        self.limiter.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        if self.refused or self.line.closing:
            self.come += len(data)
            if self.come > LINGER_BYTES:
                self.abort()
            return
        self.fruitful = False
        try:
            self.parse(data)
        except httptools.HttpParserError as error:
            refused = error.__context__ if isinstance(error.__context__, RejectedRequest) else malformed(error, data)
            self.refuse(refused)
            return
        self.head = 0 if self.fruitful else self.head + len(data)
        if self.head > MAX_HEAD:
            self.refuse(RejectedRequest(400, f"the request line and headers are over {MAX_HEAD} bytes; send less"))

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed, or sends nothing more but still reads. Only writing tells the two apart: the system of
        a client that has closed answers what comes with a reset. So the first bytes of the answer go out at once."""
        if self.line.closing or not self.unanswered or not hasattr(socket, "TCP_INFO"):
            return False
        if not self.in_head:
            self.half_closed = True
            self.refuse(RejectedRequest(400, "the connection was closed before the whole body had arrived"))
            return self.unanswered > 0
        self.half_closed = True
        cycle = self.cycle
        cycle.keep_alive = False
        if self.unanswered == 1 and not cycle.response_started:
            self.line.begin_answer()
        elif self.unanswered == 1 and cycle.chunked_encoding:
            self.line.write(b"0")  # a leading zero of the next chunk's size
        self.loop.call_later(PROBE_SECONDS, self.check_reset)
        return True

    # Called by the parser.

    def parse(self, data: bytes | memoryview) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                end_of_head = offer.args[0]
            # The parser takes an offer of another protocol for the end of HTTP. We take none up, so the request is
            # parsed again without the offer, and its body after it.
            data = memoryview(data)[end_of_head:]
            head = self.head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            self.parser.feed_data(head)

    def head_without_offer(self) -> bytes:
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
            if name != b"upgrade" and (value or name != b"connection"):
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.begun = True
        if not self.unanswered:
            self._unset_keepalive_if_required()
            self.since = self.loop.time()

    def on_headers_complete(self) -> None:
        self.fruitful = True
        version = self.parser.get_http_version()
        method = self.parser.get_method()
        if self.url == b"*" and method == b"OPTIONS":
            self.url = b"/"  # it asks about the server as a whole (RFC 9110, 9.3.7)
        check_head(version, method, self.url, self.headers)
        if self.parser.should_upgrade():
            return
        if version == "1.0":
            self.expect_100_continue = False  # which has no interim answers
        super().on_headers_complete()
        self.headers = []  # trailers do not become headers
        self.in_head = self.begun = self.first = False
        self.come = 0
        self.ignored = self.scope["method"] not in WITH_BODY
        if not self.unanswered:
            self.since = self.loop.time()
        self.unanswered += 1
        self.limiter.works(self)
        if self.surplus is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self.fruitful = True
        self.come += len(body)
        if self.cycle.response_complete:
            if self.come > LINGER_BYTES:
                raise RejectedRequest(413, "the body continued long after the answer")
        elif self.ignored and self.come > MAX_IGNORED:
            raise RejectedRequest(
                413, f"a {self.scope['method']} takes no body, and this one is over {MAX_IGNORED} bytes"
            )
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.fruitful = True
        if self.parser.should_upgrade():
            return
        self.in_head = True  # of the next request
        super().on_message_complete()
        if not self.unanswered:
            self.rest()

    # The application, and what is answered without it.

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, whose last `send` returns when its client has taken almost all: until then the request
        is under way, and what it holds is accounted for."""

        async def send_and_wait(message: Message) -> None:
            if len(message.get("body", b"")) > HIGH_WATER_LIMIT and not message.get("more_body", False):
                await send({**message, "more_body": True})
                message = {"type": "http.response.body"}  # uvicorn sends it when there is room again
            await send(message)

        path = scope["path"].removeprefix(scope["root_path"])
        if self.surplus is not None and not path.startswith(HEALTH):
            self.limiter.cut("crowded")
            headers = {"Retry-After": "5", "Connection": "close"}
            await error_responses.problem(self.surplus.status, self.surplus.sentence, headers)(scope, receive, send)
            return
        await self.served(scope, receive, send_and_wait)

    def on_response_complete(self) -> None:
        self.unanswered -= 1
        self.since = self.heard = self.loop.time()
        self.come = 0
        super().on_response_complete()
        if self.unanswered:
            return
        if self.refusal:
            self.line.write(self.refusal)
            self.line.close()
        elif self.in_head:
            self.rest()

    def rest(self) -> None:
        """Mark the connection as idle, unless it is closing."""
        if not self.line.closing:
            self.limiter.rests(self)

    def refuse(self, refused: RejectedRequest, reason: str = "refused") -> None:
        """Answer a request that cannot be parsed, after the requests before it, and close the connection."""
        self.refused = True
        self.limiter.cut(reason)
        log.info("a request of %s is refused: %d %s", self.address, refused.status, refused.sentence)
        if not self.in_head:  # within a body
            if not self.unanswered:
                self.abort()  # its answer is out
                return
            self.unanswered -= 1
            if self.unanswered:
                self.pipeline.popleft()  # it has not begun
            else:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                if self.cycle.response_started:
                    self.line.close()
                    return
        answer = answer_of(refused, self.server_state.default_headers)
        if self.unanswered:
            self.refusal = answer
        else:
            self.line.write(answer)
            self.line.close()

    def hang_up(self) -> None:
        """Close, once the client has had time to read what was sent."""
        if self.half_closed or not (self.refused or not self.in_head):
            self.line.transport.close()
            return
        self.come = 0
        self.since = self.heard = self.loop.time()
        self.limiter.rests(self)
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # the client was faster
            self.line.transport.write_eof()

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken yet, in addition to what the system holds."""
        return self.line.unsent

    def abort(self) -> None:
        self.line.closing = True
        self.line.transport.abort()
        self.limiter.leave(self)

    # Called at intervals.

    def check(self, now: float) -> None:
        """End the connection if its client is too slow."""
        if self.half_closed:
            self.check_reset()
        settings = self.limiter.settings
        taken = self.line.written - self.line.unsent
        if taken == self.line.written or taken >= self.taken + LEAST_TAKEN:
            self.taken, self.stalled = taken, now
        elif now - self.stalled >= settings.write_timeout:
            self.limiter.cut("unread")
            log.info("%s did not read its answer within %g seconds", self.address, settings.write_timeout)
            self.abort()
            return
        if self.line.unsent:
            return
        if self.line.closing or (not self.unanswered and not self.in_head):
            if now - self.heard >= LINGER_SILENCE or now - self.since >= LINGER_SECONDS:
                self.abort()
        elif not self.unanswered and (self.begun or self.first) and now - self.since >= settings.head_timeout:
            if self.begun:
                sentence = f"the request line and headers did not arrive within {settings.head_timeout:g} seconds"
                self.refuse(RejectedRequest(408, sentence), "slow_head")
            else:
                self.limiter.cut("slow_head")
                self.line.close()
        elif self.unanswered == 1 and not self.in_head and now - self.since >= settings.body_timeout + LATE:
            self.refuse(
                RejectedRequest(408, f"the body did not arrive within {settings.body_timeout:g} seconds"), "slow_body"
            )

    def check_reset(self) -> None:
        """End the connection if its client has reset it."""
        if self.line.transport.is_closing():
            return
        found = self.line.get_extra_info("socket")
        if found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self.abort()
