"""HTTP on the wire: uvicorn's httptools protocol, with the bounds on connections that it does not have.

Who may connect and who gives way is the `Door`'s to decide; `BoundedProtocol` is one connection.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server import error_responses

if TYPE_CHECKING:
    import asyncio

    from server.settings import Settings

log = logging.getLogger(__name__)

MAX_HEAD = 65_536  # bytes of request line and headers; also of chunk extensions or trailers without any body between
MAX_IGNORED = 1_000_000  # bytes of a body where nobody reads one
BODILESS = ("GET", "HEAD", "OPTIONS")

# After an answer that came before the end of its request, what still comes is read and thrown away. A socket that is
# closed with unread data makes TCP reset the connection, which destroys the answer on its way (RFC 9112, 9.6).
LINGER_SECONDS = 30
LINGER_SILENCE = 5  # seconds without a byte
LINGER_BYTES = 256_000_000

LEAST_TAKEN = 65_536  # bytes of an answer that a client must take in --write-timeout seconds
LATE = 5  # seconds after --body-timeout; until then the application answers, which says more
RESERVE = 16  # connections above the limit: they get an answer, to /health what it asks for
QUIET = 60  # seconds between two log lines about the same shortage
PROBE_SECONDS = 0.05  # for a reset to come back from a near client; later ones are found at the next check

VERSION = b"HTTP/1.1 "  # what every answer begins with
TCP_CLOSE = 7  # state of a socket that was reset, from Linux's tcp_states.h

HEALTH = "/health/"
CUTS = ("refused", "slow_head", "slow_body", "unread", "crowded")  # why the server closes a connection


class Refused(Exception):
    """A request that is answered here and reaches no application: its status, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Door:
    """The connections of one server. When there are too many, the one that has been idle for the longest gives way.

    cut: called with one of CUTS for each connection that the server closes of its own accord.
    """

    def __init__(self, settings: Settings, cut: Callable[[str], None] = lambda reason: None) -> None:
        self.settings, self.cut = settings, cut
        self.open: set[BoundedProtocol] = set()
        self.by_address: Counter[str] = Counter()
        # Those between two requests, or before the end of a head: by address, the longest idle first.
        self.idle: defaultdict[str, dict[BoundedProtocol, None]] = defaultdict(dict)
        self.said: dict[str, float] = {}

    def enter(self, new: BoundedProtocol) -> Refused | None:
        """Let a connection in; why its requests are refused, where no other gave way to it."""
        address, most, most_each = (
            new.address,
            self.settings.max_connections,
            self.settings.max_connections_per_address,
        )
        self.open.add(new)
        self.by_address[address] += 1
        refused = None
        if most_each and self.by_address[address] > most_each and not self.drop_idle(address):
            refused = Refused(429, f"this address has {most_each} connections already, the most it may have")
        if len(self.open) > most:
            self.say("crowd", f"{most} connections are open, the most that --max-connections allows; idle ones go")
            busiest = max(self.idle, key=lambda one: len(self.idle[one]), default=None)
            if busiest is None or not self.drop_idle(busiest):
                refused = Refused(503, f"the server has {most} connections already, the most it takes; try again soon")
        if len(self.open) > most + RESERVE:
            self.cut("crowded")
            new.abort()
        else:
            self.rests(new)
        return refused

    def leave(self, connection: BoundedProtocol) -> None:
        self.works(connection)
        if connection in self.open:
            self.open.discard(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    def rests(self, connection: BoundedProtocol) -> None:
        """The connection may give way from now on."""
        self.works(connection)
        self.idle[connection.address][connection] = None

    def works(self, connection: BoundedProtocol) -> None:
        """The connection may not give way: a request is under way."""
        if (idle := self.idle.get(connection.address)) is not None:
            idle.pop(connection, None)
            if not idle:
                del self.idle[connection.address]

    def drop_idle(self, address: str) -> bool:
        longest = next(iter(self.idle.get(address, ())), None)
        if longest is not None:
            self.cut("crowded")
            longest.abort()
        return longest is not None

    def check(self, now: float) -> None:
        """End the connections whose clients let the server wait for too long. now: time of the loop, in seconds."""
        for connection in list(self.open):
            connection.check(now)

    @property
    def unsent(self) -> int:
        """Bytes of answers that their clients have not taken yet, besides what the system holds."""
        return sum(connection.line.unsent for connection in self.open)

    def say(self, about: str, sentence: str) -> None:
        """Log a shortage, once in a while."""
        now = time.monotonic()
        if now - self.said.get(about, -QUIET) >= QUIET:
            self.said[about] = now
            log.warning(sentence)


class Line:
    """A transport as uvicorn uses it. `close` goes to the protocol, which may have to read on for a while."""

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self.transport, self.on_close = transport, on_close
        self.written = 0  # bytes
        self.begun = False  # VERSION was sent ahead of the rest of the answer
        self.closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.closing:
            return
        if self.begun:
            self.begun = False
            data = data.removeprefix(VERSION)
        self.written += len(data)
        self.transport.write(data)

    def begin_answer(self) -> None:
        self.write(VERSION)
        self.begun = True

    @property
    def unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self.closing or self.transport.is_closing()

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.on_close()


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Its head has a size and a time, its answer must be taken, and an offer to upgrade is ignored.

    llhttp gathers a head of any size in memory. What arrives in one read is parsed whole, so a head of up to
    `MAX_HEAD` bytes and one read (256 KiB) may pass.
    """

    def __init__(self, door: Door, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.door = door
        self.served: ASGIApp = config.loaded_app
        self.app = self.run
        self.surplus: Refused | None = None  # why the requests of this connection are refused
        self.first = True  # no head has been complete yet
        self.in_head = True  # the next byte belongs to a head
        self.begun = False  # something of that head has come
        self.head = 0  # bytes that arrived since the last read with a body, or the end of a head or a message, in it
        self.fruitful = False  # this read had such a thing
        self.come = 0  # bytes of the body, or of what is thrown away
        self.ignored = False  # nobody reads this body
        self.unanswered = 0  # requests whose head is complete and whose answer is not
        self.refused = False  # nothing more is parsed
        self.refusal = b""  # an answer that waits for those before it
        self.half_closed = False  # the client has sent all that it will
        self.since = self.heard = self.stalled = 0.0  # loop times: state began, last byte in, answer last taken
        self.taken = 0  # bytes of answers that had been taken at `stalled`

    # What the loop calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.line = Line(transport, self.hang_up)
        super().connection_made(self.line)  # type: ignore[arg-type]
        self.address = network_of(self.client[0] if self.client else "")
        self.since = self.heard = self.stalled = self.loop.time()
        self.surplus = self.door.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.line.closing = True
        self.door.leave(self)
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
            refused = error.__context__ if isinstance(error.__context__, Refused) else malformed(error, data)
            self.refuse(refused)
            return
        self.head = 0 if self.fruitful else self.head + len(data)
        if self.head > MAX_HEAD:
            self.refuse(Refused(400, f"the request line and headers are over {MAX_HEAD} bytes; send less"))

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has closed, or sends nothing more but still reads. Only writing tells the two apart: the system of
        a client that has closed answers what comes with a reset. So the first bytes of the answer go out at once."""
        if self.line.closing or not self.unanswered or not hasattr(socket, "TCP_INFO"):
            return False
        if not self.in_head:
            self.half_closed = True
            self.refuse(Refused(400, "the connection was closed before the whole body had come"))
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

    # What the parser calls.

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
        check_head(version, self.parser.get_method(), self.headers)
        if self.parser.should_upgrade():
            return
        if version == "1.0":
            self.expect_100_continue = False  # it would not know the interim answer
        super().on_headers_complete()
        self.headers = []  # trailers do not become headers
        self.in_head = self.begun = self.first = False
        self.come = 0
        self.ignored = self.scope["method"] in BODILESS
        if not self.unanswered:
            self.since = self.loop.time()
        self.unanswered += 1
        self.door.works(self)
        if self.surplus is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self.fruitful = True
        self.come += len(body)
        if self.cycle.response_complete:
            if self.come > LINGER_BYTES:
                raise Refused(413, "the body goes on long after its answer")
        elif self.ignored and self.come > MAX_IGNORED:
            raise Refused(413, f"a {self.scope['method']} takes no body, and this one is over {MAX_IGNORED} bytes")
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
            self.door.cut("crowded")
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
        """Between two requests, or before the end of a head."""
        if not self.line.closing:
            self.door.rests(self)

    def refuse(self, refused: Refused, reason: str = "refused") -> None:
        """Answer what cannot be parsed any further, after the requests before it, and close."""
        self.refused = True
        self.door.cut(reason)
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
        self.door.rests(self)
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # the client was faster
            self.line.transport.write_eof()

    def abort(self) -> None:
        self.line.closing = True
        self.line.transport.abort()
        self.door.leave(self)

    # What the clock calls.

    def check(self, now: float) -> None:
        """End the connection when its client has let it wait for too long."""
        if self.half_closed:
            self.check_reset()
        settings = self.door.settings
        taken = self.line.written - self.line.unsent
        if taken == self.line.written or taken >= self.taken + LEAST_TAKEN:
            self.taken, self.stalled = taken, now
        elif now - self.stalled >= settings.write_timeout:
            self.door.cut("unread")
            log.info("%s did not take its answer within %g seconds", self.address, settings.write_timeout)
            self.abort()
            return
        if self.line.unsent:
            return
        if self.line.closing or (not self.unanswered and not self.in_head):
            if now - self.heard >= LINGER_SILENCE or now - self.since >= LINGER_SECONDS:
                self.abort()
        elif not self.unanswered and (self.begun or self.first) and now - self.since >= settings.head_timeout:
            if self.begun:
                sentence = f"the head of the request did not come within {settings.head_timeout:g} seconds"
                self.refuse(Refused(408, sentence), "slow_head")
            else:
                self.door.cut("slow_head")
                self.line.close()
        elif self.unanswered == 1 and not self.in_head and now - self.since >= settings.body_timeout + LATE:
            self.refuse(Refused(408, f"the body did not come within {settings.body_timeout:g} seconds"), "slow_body")

    def check_reset(self) -> None:
        """End the connection of a client that was not there any more."""
        if self.line.transport.is_closing():
            return
        found = self.line.get_extra_info("socket")
        if found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self.abort()


def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 bits of an IPv6 address that belong to one network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host


def check_head(version: str, method: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Raises Refused for what the parser lets pass and RFC 9110 and 9112 do not."""
    if version == "0.9":
        raise Refused(400, "the request line must end in HTTP/1.1 or HTTP/1.0")
    if version not in ("1.0", "1.1"):
        raise Refused(505, f"this server speaks HTTP/1.1, not HTTP/{version}")
    if method == b"CONNECT":
        raise Refused(400, "this server is not a proxy: it does not take CONNECT")
    hosts, codings, expectations = (
        [value for name, value in headers if name == wanted] for wanted in (b"host", b"transfer-encoding", b"expect")
    )
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise Refused(400, f"a request must have one Host header, got {len(hosts)}")
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise Refused(400, f"Transfer-Encoding must be chunked, got {shown(b', '.join(codings))}")
    if version == "1.1" and any(value.lower() != b"100-continue" for value in expectations):
        raise Refused(417, f"Expect must be 100-continue, got {shown(b', '.join(expectations))}")


def shown(value: bytes) -> str:
    return repr(value[:80].decode("latin-1"))


def malformed(error: httptools.HttpParserError, data: bytes) -> Refused:
    """What a client should change, where the parser's reason does not say it."""
    reason = str(error)
    if reason == "Pause on PRI/Upgrade":
        return Refused(505, "this server speaks HTTP/1.1, not HTTP/2")
    if data.startswith(b"\x16\x03"):
        return Refused(400, "this server speaks plain HTTP: use http:// and not https://")
    if isinstance(error, httptools.HttpParserInvalidURLError) and any(byte > 0x7F for byte in data[:MAX_HEAD]):
        return Refused(400, "the URL must be ASCII: percent-encode what is not, as gr%C3%B6%C3%9Fe")
    if isinstance(error, httptools.HttpParserCallbackError):
        return Refused(400, "the URL of the request is not valid")
    return Refused(400, f"this is not a valid HTTP/1.1 request: {reason}")


def answer_of(refused: Refused, headers: list[tuple[bytes, bytes]]) -> bytes:
    """A problem document with its head."""
    body = error_responses.problem(refused.status, refused.sentence).body
    lines = [name + b": " + value for name, value in headers]
    lines += [
        b"content-type: " + error_responses.MEDIA_TYPE.encode(),
        b"content-length: %d" % len(body),
        b"connection: close",
    ]
    return STATUS_LINE[refused.status] + b"\r\n".join([*lines, b"", body])
