"""The layers between socket and application, on raw sockets: odd requests, slow clients, many clients."""

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from server import connections, http_protocol, lifecycle
from server.connections import ConnectionLimiter
from server.front import close, configure, listen
from server.lifecycle import BoundedServer
from server.settings import Settings
from tests.support.servers import until
from tests.support.sockets import OFFERS, read_all, read_answer

HOST = b"Host: localhost\r\n"
WORK = 1.2  # seconds
BIG = 30_000_000  # bytes; more than the buffers of both systems hold


class App:
    """An application whose paths say what it does. It keeps what it received and how its requests ended."""

    def __init__(self):
        self.bodies, self.ended = [], []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        path = scope["path"]
        try:
            await getattr(self, path.strip("/").replace("/", "_"))(scope, receive, send)
        finally:
            self.ended.append(path)

    async def echo(self, scope, receive, send):
        """The received request, as JSON, after its last byte."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.append("disconnect")
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        headers = [[name.decode(), value.decode("latin-1")] for name, value in scope["headers"]]
        received = {"method": scope["method"], "headers": headers, "body": body.decode("latin-1")}
        await answer(send, 200, json.dumps(received).encode())

    async def early(self, scope, receive, send):
        await answer(send, 413, b"too large")

    async def early_close(self, scope, receive, send):
        await answer(send, 401, b"who are you", [(b"connection", b"close")])

    async def health_live(self, scope, receive, send):
        await answer(send, 200, b"live")

    async def big(self, scope, receive, send):
        await answer(send, 200, b"x" * BIG)

    async def work(self, scope, receive, send):
        """Some work, given up when the client goes away."""
        watcher = asyncio.ensure_future(gone(receive))
        done, _ = await asyncio.wait([watcher], timeout=WORK)
        watcher.cancel()
        if done:
            self.ended.append("given up")
        else:
            await answer(send, 200, b"worked")

    async def stream(self, scope, receive, send):
        """An event, and another one after some work."""
        watcher = asyncio.ensure_future(gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        done, _ = await asyncio.wait([watcher], timeout=WORK)
        watcher.cancel()
        if done:
            self.ended.append("given up")
            return
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def flood(self, scope, receive, send):
        """Events without an end."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        watcher = asyncio.ensure_future(gone(receive))
        while not watcher.done():
            await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
            await asyncio.sleep(0)
        self.ended.append("given up")


async def answer(send, status, body, headers=()):
    headers = [(b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.contextmanager
def served(**limits):
    """A server of the application above, in a thread, on a port of its own."""
    settings = Settings(**{"head_timeout": 1.0, "write_timeout": 1.0, **limits})
    sockets = listen("127.0.0.1", 0)
    cuts = []
    limiter, app = ConnectionLimiter(settings, cuts.append), App()
    server = BoundedServer(configure(app, limiter), limiter)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()

    def stop():
        server.should_exit = True
        thread.join(30)

    try:
        until(lambda: server.started)
        yield SimpleNamespace(address=sockets[0].getsockname(), limiter=limiter, app=app, cuts=cuts, stop=stop)
    finally:
        stop()
        close(sockets)
    assert not thread.is_alive()
    assert not limiter.open and not limiter.idle and not limiter.by_address


@pytest.fixture(scope="module")
def common():
    with served() as server:
        yield server


def connect(server):
    return socket.create_connection(server.address, timeout=30)


def talk(server, data, shut=False):
    """Send everything before reading anything, as simple clients do."""
    with connect(server) as opened:
        opened.sendall(data)
        if shut:
            opened.shutdown(socket.SHUT_WR)
        return read_all(opened)


def refused(received, status):
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received[:300]
    assert b"content-type: application/problem+json" in head and b"connection: close" in head
    document = json.loads(body)
    assert document["status"] == status
    return document["detail"]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_offer_to_upgrade_is_ignored_and_the_body_read(common, offer, chunked, pieces):
    body = b"POST /early HTTP/1.1\r\n\r\n" * 3  # bytes that look like requests are a body nevertheless
    if chunked:
        framing, sent = b"Transfer-Encoding: chunked\r\n", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        framing, sent = b"Content-Length: %d\r\n" % len(body), body
    message = b"POST /echo HTTP/1.1\r\n" + HOST + offer + framing + b"X-Mine: 1\r\n\r\n" + sent
    with connect(common) as opened:
        for i in range(pieces):
            opened.sendall(message[len(message) * i // pieces : len(message) * (i + 1) // pieces])
            time.sleep(0.02)
        status, answered = read_answer(opened)
        received = json.loads(answered)
        assert (status, received["method"], received["body"]) == (200, "POST", body.decode())
        assert ["x-mine", "1"] in received["headers"]
        assert "upgrade" not in [name for name, _ in received["headers"]]
        if b"close" in offer:
            assert opened.recv(1) == b""
        else:  # the connection goes on
            opened.sendall(b"GET /echo HTTP/1.1\r\n" + HOST + b"\r\n")
            assert read_answer(opened)[0] == 200


def test_offers_of_many_pipelined_requests(common):
    one = b"POST /echo HTTP/1.1\r\n" + HOST + OFFERS[0] + b"Content-Length: 2\r\n\r\nab"
    last = b"GET /echo HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n"
    assert talk(common, one * 300 + last).count(b"HTTP/1.1 200 OK") == 301


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ("GET /classes?q=größe HTTP/1.1\r\nHost: a\r\n\r\n".encode(), 400, "percent-encode"),
        (b"GET /caf\xe9 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "percent-encode"),
        (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400, "not a valid HTTP/1.1 request"),
        (b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "URL"),
        (b"GET / HTTP/1.1\r\nHo st: a\r\n\r\n", 400, "Invalid header token"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "not a valid HTTP/1.1 request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400, "not a valid HTTP/1.1 request"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "not a valid HTTP/1.1 request"),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 400, "Invalid method"),
        (b"GET /echo\r\n\r\n", 400, "must end in HTTP/1.1"),
        (b"GET /echo HTTP/0.9\r\nHost: a\r\n\r\n", 400, "must end in HTTP/1.1"),
        (b"GET /echo HTTP/1.1\r\n\r\n", 400, "one Host header, got 0"),
        (b"GET /echo HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "one Host header, got 2"),
        (b"GET /echo HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400, "one Host header, got 2"),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "must begin with /, got '*'"),
        (b"POST *x HTTP/1.1\r\nHost: a\r\n\r\n", 400, "must begin with /, got '*x'"),
        (b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "must be a path such as /generate?class=207"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "not a proxy"),
        (b"GET /echo HTTP/2.0\r\nHost: a\r\n\r\n", 505, "HTTP/1.1, not HTTP/2"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\4\0\0\0\0\0", 505, "HTTP/1.1, not HTTP/2"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "http:// and not https://"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na", 400, "Content-Length"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\na", 400, "Content-Length"),
        (
            b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "",
        ),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n", 400, "Transfer-Encoding"),
        (
            b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            400,
            "'gzip, chunked'",
        ),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "chunk size"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 0\r\n\r\n", 417, "'200-ok'"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 400_000 + b"\r\n\r\n", 400, "over 65536 bytes"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 400_000, 400, "65536"),
        (
            b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 400_000,
            400,
            "65536",
        ),
    ],
)
def test_what_is_not_http_is_a_problem_document_and_the_end(common, request_, status, words):
    assert words in refused(talk(common, request_), status)


def test_a_refusal_waits_for_the_answers_before_it(common):
    received = talk(common, b"GET /work HTTP/1.1\r\n" + HOST + b"\r\nnonsense\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK") and b"workedHTTP/1.1 400 Bad Request" in received
    broken = b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    received = talk(common, b"GET /work HTTP/1.1\r\n" + HOST + b"\r\n" + broken)
    assert received.startswith(b"HTTP/1.1 200 OK") and b"workedHTTP/1.1 400 Bad Request" in received


def test_an_answer_that_has_begun_is_not_mixed_with_a_refusal(common):
    start = b"POST /stream HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    with connect(common) as opened:
        opened.sendall(start)
        received = opened.recv(65536)
        opened.sendall(b"zz\r\n")
        received += read_all(opened)
    assert received.count(b"HTTP/1.1 ") == 1 and not received.endswith(b"0\r\n\r\n")


def test_trailers_do_not_become_headers(common):
    head = b"POST /echo HTTP/1.1\r\n" + HOST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = talk(common, head + b"1\r\na\r\n0\r\nX-API-Key: mine\r\n\r\n")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["body"] == "a"
    assert b"mine" not in received


@pytest.mark.parametrize("path", [b"/early", b"/early/close"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_early_answer_reaches_a_client_that_writes_first(common, path, version, chunked):
    """Thirty megabytes are more than the buffers between the two hold: closing at once would reset the connection."""
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % BIG
    head = b"POST %b HTTP/%b\r\nConnection: close\r\n" % (path, version)
    chunk = b"%x\r\n" % 1_000_000 + b"x" * 1_000_000 + b"\r\n" if chunked else b"x" * 1_000_000
    sent = chunk * (BIG // 1_000_000) + (b"0\r\n\r\n" if chunked else b"")
    received = talk(common, head + HOST + framing + b"\r\n" + sent)
    assert received.endswith((b"too large", b"who are you"))


def test_after_an_early_answer_the_connection_goes_on(common):
    with connect(common) as opened:
        opened.sendall(b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: 3000000\r\n\r\n")
        assert read_answer(opened) == (413, b"too large")
        opened.sendall(b"x" * 3_000_000 + b"GET /health/live HTTP/1.1\r\n" + HOST + b"\r\n")
        assert read_answer(opened) == (200, b"live")


@pytest.mark.parametrize("path", [b"/early", b"/early/close"])
@pytest.mark.parametrize("limit", ["LINGER_SILENCE", "LINGER_SECONDS", "LINGER_BYTES"])
def test_what_comes_after_an_early_answer_is_bounded(monkeypatch, path, limit):
    monkeypatch.setattr(http_protocol, limit, 2_000_000 if limit == "LINGER_BYTES" else 1)
    with served() as server, connect(server) as opened:
        opened.sendall(b"POST %b HTTP/1.1\r\n" % path + HOST + b"Content-Length: 999999999999\r\n\r\n")
        assert read_answer(opened)[0] in (413, 401)
        with pytest.raises(OSError):
            for _ in range(300):
                if limit == "LINGER_BYTES":
                    opened.sendall(b"x" * 100_000)
                elif limit == "LINGER_SECONDS":
                    opened.sendall(b"x")
                elif not server.limiter.open:
                    opened.sendall(b"x")
                    opened.sendall(b"x")
                time.sleep(0.05)
        until(lambda: not server.limiter.open)


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS"])
def test_an_unread_body_is_cut(common, method):
    with connect(common) as opened:
        opened.sendall(method + b" /work HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        opened.sendall(b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000) * 30)
        assert "takes no body" in refused(read_all(opened), 413)
    until(lambda: "given up" in common.app.ended)
    common.app.ended.clear()


def test_a_small_body_of_a_get_is_harmless(common):
    received = talk(common, b"GET /echo HTTP/1.1\r\n" + HOST + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
    assert received.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET / HT", b"GET / HTTP/1.1\r\nX-A: b\r\n"])
def test_a_head_has_its_time(common, begun):
    with connect(common) as opened:
        opened.sendall(begun)
        began = time.monotonic()
        received = read_all(opened)
        assert 0.8 < time.monotonic() - began < 10
    if begun.strip():
        assert "within 1 seconds" in refused(received, 408)
    else:
        assert received == b""


def test_a_head_has_its_time_when_its_bytes_keep_coming_and_after_an_answer(common):
    with connect(common) as opened:
        opened.sendall(b"GET /health/live HTTP/1.1\r\n" + HOST + b"\r\n")
        assert read_answer(opened)[0] == 200
        time.sleep(1.5)  # an idle connection has longer
        opened.sendall(b"GET /health/live HTTP/1.1\r\n" + HOST + b"\r\nGET / HTTP/1.1\r\nX: ")
        assert read_answer(opened)[0] == 200
        opened.settimeout(0.1)
        received, deadline = b"", time.monotonic() + 10
        while b"408" not in received:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                opened.sendall(b"X")
                received += opened.recv(1000)


def test_a_body_has_its_time_whatever_the_application_does(monkeypatch):
    monkeypatch.setattr(http_protocol, "LATE", 0)
    with served(body_timeout=1.0) as server, connect(server) as opened:
        opened.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n")
        opened.settimeout(0.2)
        received, deadline = b"", time.monotonic() + 20
        while b"408" not in received:
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                opened.sendall(b"x")
                received += opened.recv(1000)
        assert "body did not arrive within 1 seconds" in refused(received, 408)
        assert server.cuts == ["slow_body"]
        until(lambda: "disconnect" in server.app.ended)


def test_an_idle_connection_is_kept_as_long_as_it_was_said():
    with served(keep_alive=1.5) as server, connect(server) as opened:
        began = time.monotonic()
        for _ in range(3):
            opened.sendall(b"GET /health/live HTTP/1.1\r\n" + HOST + b"\r\n")
            assert read_answer(opened)[0] == 200
            time.sleep(0.8)
        opened.sendall(b"\r\n" * 5)  # nothing that would be a request
        assert read_all(opened) == b""
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("path", [b"/big", b"/flood"])
@pytest.mark.parametrize("connection", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_read_its_answer_is_cut(path, connection):
    with served() as server, connect(server) as opened:
        opened.sendall(b"GET %b HTTP/1.1\r\n" % path + HOST + connection + b"\r\n")
        until(lambda: server.limiter.unsent)
        assert path.decode() not in server.app.ended  # until its answer is taken, a request is under way
        until(lambda: server.cuts == ["unread"])
        until(lambda: path.decode() in server.app.ended)
        assert not server.limiter.open and not server.limiter.unsent


def test_a_client_that_reads_a_trickle_is_cut_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(http_protocol, "LEAST_TAKEN", 4_000_000)
    with served() as server:
        with connect(server) as opened:
            opened.sendall(b"GET /big HTTP/1.1\r\n" + HOST + b"\r\n")
            with contextlib.suppress(OSError):
                while not server.cuts and opened.recv(1000):
                    time.sleep(0.01)
        assert server.cuts == ["unread"]
        with connect(server) as opened:
            opened.sendall(b"GET /big HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
            received = 0
            while part := opened.recv(500_000):
                received += len(part)
                time.sleep(0.05)  # three times as long as the limit in all
        assert received > BIG and server.cuts == ["unread"]


def test_the_server_ends_although_an_answer_is_not_taken(monkeypatch, caplog):
    monkeypatch.setattr(lifecycle, "LAST_ANSWERS", 1)
    with served(write_timeout=60.0) as server, connect(server) as opened:
        opened.sendall(b"GET /big HTTP/1.1\r\n" + HOST + b"\r\n")
        until(lambda: server.limiter.unsent)
        server.stop()
        assert server.app.ended == ["/big"]
    assert "1 connections are closed in the middle of their answers" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("path", [b"/work", b"/stream", b"/echo", b"/big"])
def test_a_client_that_shuts_its_side_gets_its_answer(common, path, version):
    received = talk(common, b"GET %b HTTP/%b\r\n" % (path, version) + HOST + b"\r\n", shut=True)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and received.count(b"HTTP/1.1") == 1
    if path == b"/stream":
        sizes = [int(line, 16) for line in body.split(b"\r\n")[::2] if line]
        assert sizes == [9, 9, 0] and body.endswith(b"\r\n\r\n")
    else:
        assert body == b"worked" or path != b"/work"
        assert b"content-length: %d" % len(body) in head


def test_pipelined_requests_of_a_client_that_shuts_its_side(common):
    received = talk(common, (b"GET /work HTTP/1.1\r\n" + HOST + b"\r\n") * 2, shut=True)
    assert received.count(b"HTTP/1.1 200 OK") == received.count(b"worked") == 2


def test_a_body_that_ends_early_is_answered(common):
    head = b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n"
    assert "before the whole body" in refused(talk(common, head + b"abc", shut=True), 400)


@pytest.mark.parametrize("path", [b"/work", b"/stream"])
def test_a_client_that_closes_is_given_up_although_it_looks_the_same(common, path):
    common.app.ended.clear()
    with connect(common) as opened:
        opened.sendall(b"GET %b HTTP/1.1\r\n" % path + HOST + b"\r\n")
        time.sleep(0.2)
    until(lambda: common.app.ended)
    assert common.app.ended[0] == "given up"  # and not the end of the work


def health(server):
    received = talk(server, b"GET /health/live HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
    return received.endswith(b"live")


def test_idle_connections_give_way():
    with served(max_connections=20, head_timeout=60.0) as server, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(server)).sendall(b"GET / HTTP/1.1\r\nX-A: ")
        assert health(server)
        until(lambda: len(server.limiter.open) <= 20)
        assert set(server.cuts) == {"crowded"}


def test_busy_connections_do_not_give_way_and_health_answers():
    with served(max_connections=10) as server, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(server)) for _ in range(10)]
        for one in busy:
            one.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n")
        until(lambda: not server.limiter.idle)
        for _ in range(30):
            assert health(server)
        late = talk(server, b"GET /echo HTTP/1.1\r\n" + HOST + b"\r\n")
        assert "already has 10 connections" in refused(late, 503) and b"retry-after: 5" in late.lower()
        for _ in range(100):
            stack.enter_context(connect(server))
        assert health(server)
        for one in busy:
            one.sendall(b"{}")
            assert read_answer(one)[0] == 200
        until(lambda: talk(server, b"GET /echo HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"))


def test_connections_of_one_address():
    with served(max_connections_per_address=3) as server, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(server)) for _ in range(3)]
        for one in busy:
            one.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n")
        until(lambda: not server.limiter.idle)
        assert "this address already has 3" in refused(talk(server, b"GET /echo HTTP/1.1\r\n" + HOST + b"\r\n"), 429)
        assert health(server)


def test_one_address_is_one_ipv4_address_or_one_network_of_ipv6():
    network_of = connections.network_of
    assert network_of("10.0.0.1") == network_of("::ffff:10.0.0.1") != network_of("10.0.0.2")
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")
    assert network_of("") == ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("sent", [["-d", "abc"], ["-d", "abc", "-H", "Transfer-Encoding: chunked"], ["-F", "a=abc"]])
def test_curl_that_offers_http2(common, sent):
    features = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    if "HTTP2" not in features:
        pytest.skip("this curl speaks no HTTP/2")
    url = "http://{}:{}/echo".format(*common.address)
    done = subprocess.run(
        ["curl", "-sS", "--http2", *sent, url], capture_output=True, text=True, check=True, timeout=30
    )
    assert "abc" in json.loads(done.stdout)["body"]
