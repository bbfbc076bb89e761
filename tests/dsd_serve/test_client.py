"""The Python client against servers that are not DSD's, answer wrongly, break off or redirect; and event streams."""

import asyncio
import contextlib
import io
import itertools
import json
import socket
import socketserver
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsd_serve import calls
from dsd_serve.calls import EventReader
from dsd_serve.client import AsyncClient, Client
from dsd_serve.errors import ConfigError, ServerError
from dsd_serve.local_hosts import is_this_machine

PNG = b"\x89PNG\r\n\x1a\n"
SIGN_IN = b"<html><head><title>Sign in to\n Example</title></head><body>Please</body></html>"


@contextlib.contextmanager
def answering(*replies: bytes, close: bool = True):
    """A server that answers its nth request with the nth of these replies, and further ones with the last.

    An empty reply closes the connection without an answer; `closed` lists these connections.
    """

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    if not (line := self.rfile.readline()):
                        return
                    head += line
                length = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
                if length:
                    self.rfile.read(int(length[0].split(b":")[1]))
                with lock:
                    server.asked.append(head)
                    reply = replies[min(len(server.asked), len(replies)) - 1]
                if not reply:
                    return
                self.wfile.write(reply)
                if close:
                    return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    lock = threading.Lock()
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def reply(body: bytes, media: str = "application/json", status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *([f"content-type: {media}"] if media else []), f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def stream(body: bytes, media: str = "text/event-stream") -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {media}\r\nconnection: close\r\n\r\n".encode() + body


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def through_both(url, call, **options):
    """The results of a call through both clients, or their ServerErrors."""

    async def ask():
        client = AsyncClient(url, timeout=10, **options)
        try:
            if call.media == calls.EVENTS:
                return [event async for event in client.stream(call)]
            return await client.do(call)
        finally:
            await client.close()

    def sync():
        with Client(url, timeout=10, **options) as client:
            return list(client.stream(call)) if call.media == calls.EVENTS else client.do(call)

    outcomes = []
    for attempt in (sync, lambda: asyncio.run(ask())):
        try:
            outcomes.append(attempt())
        except ServerError as error:
            outcomes.append(error)
    return outcomes


EVERY_CALL = (
    calls.generate(207),
    calls.generate(207, format="zip"),
    calls.generate_json(207),
    calls.generate_events(207),
    calls.edit_json(PNG),
    calls.edit_events(PNG),
    calls.reconstruct(PNG),
    calls.encode(PNG),
    calls.decode(np.zeros((4, 8), np.float32), format="jpeg"),
    calls.interpolate({"class": 1}, {"class": 2}),
    calls.interpolate_images(PNG, PNG),
    calls.classes(),
    calls.model(),
    calls.card(),
    calls.batcher(),
)


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (reply(SIGN_IN, "text/html; charset=utf-8"), 502, "answered 200 as text/html: 'Sign in to Example', and not"),
        (reply(b"<body><script>x()</script><h1>Welcome</h1>", "text/html"), 502, "'Welcome'"),
        (reply(b"hello", "text/plain"), 502, "text/plain: 'hello', and not"),
        (reply(b"", ""), 502, "answered 200 without a type, and not"),
        (reply(b"", "", "204 No Content"), 502, "answered 204"),
        (
            reply(SIGN_IN, "text/html", "301 Moved Permanently", Location="https://x.example/generate"),
            502,
            "https://x.ex",
        ),
        (
            reply(b"", "", "307 Temporary Redirect", Location="/login"),
            502,
            "a redirect to '/login', which is not followed",
        ),
        (reply(SIGN_IN, "text/html", "502 Bad Gateway"), 502, "answered 502: 'Sign in to Example'"),
        (reply(b'{"detail": "no such class"}', "application/problem+json", "422 X"), 422, "no such class"),
        (reply(b'{"error": {"message": "no key"}}', status="401 X"), 401, "no key"),
        (reply(b"[1]", status="500 X"), 500, "answered 500: '[1]'"),
        (reply(b'{"detail": "' + b"x" * 100_000 + b'"}', status="500 X"), 500, "xxx"),
        (reply(b"x" * 99, "text/html", "500 X", Content_Encoding="gzip"), 502, "cannot be read"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{", (502, 503), "server at"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 503, "cannot be reached"),
    ],
)
def test_an_unexpected_answer_is_an_error(sent, status, words):
    for call in EVERY_CALL if "Sign in" in words else (calls.model(), calls.generate_events(1)):
        with answering(sent) as server:
            for error in through_both(server.url, call):
                assert isinstance(error, ServerError), (call, error)
                assert error.status in (status if isinstance(status, tuple) else (status,))
                assert words in str(error) or isinstance(status, tuple), str(error)
                assert len(str(error)) < 1500


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (calls.model(), b"{"),
        (calls.model(), b"[]"),
        (calls.model(), b"[" * 200_000),
        (calls.model(), b"\xff\xfe"),
        (calls.classes(), b"{}"),
        (calls.classes(), b"[1]"),
        (calls.reconstruct(PNG), b'{"images": []}'),
        (calls.reconstruct(PNG), b"{}"),
        (calls.encode(PNG), SIGN_IN),
        (calls.encode(PNG), npy(np.array([{}], object))),
        (calls.encode(PNG), npy(np.zeros((4, 8), np.float32))[:-1]),
        (calls.encode(PNG), npy(np.zeros((2, 4, 8), np.float32))),
        (calls.encode(PNG), npy(np.full((4, 8), np.nan, np.float32))),
        (calls.encode(PNG), npy(np.zeros((4, 8), np.float32)).replace(b"(4, 8)", b"(9**9, 8)", 1)),
    ],
)
def test_an_unreadable_answer_gets_a_sentence(call, body):
    with answering(reply(body, call.media)) as server:
        for error in through_both(server.url, call):
            assert isinstance(error, ServerError) and error.status == 502
            assert "cannot be read" in str(error) and "pickle" not in str(error) and len(str(error)) < 500


def test_answers_are_bounded():
    with answering(reply(b"x" * 3_000_000, "image/png")) as server:
        for error in through_both(server.url, calls.generate(1), max_bytes=1_000_000):
            assert "larger than 1 MB" in str(error)
    with answering(stream(b"event: image\ndata: " + b"x" * 3_000_000)) as server:
        for error in through_both(server.url, calls.generate_events(1), max_bytes=1_000_000):
            assert "more than 1 MB" in str(error)
    with answering(reply(b"x" * 30_000_000, "text/html")) as server:  # not ours: the beginning is enough
        tracemalloc.start()
        assert all(isinstance(error, ServerError) for error in through_both(server.url, calls.model()))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


DONE = b'event: done\ndata: {"images": 1}\n\n'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "ended before the event `done`"),
        (DONE[:-1], "ended before the event `done`"),
        (b'event: preview\ndata: {"image": 0}\n\n', "ended before the event `done`"),
        (b"event: done\ndata: {\n\n", "its event stream cannot be read"),
        (b"event: done\ndata: [1]\n\n", "its event stream cannot be read"),
    ],
)
def test_an_incomplete_stream_is_an_error(body, words):
    with answering(stream(body)) as server:
        for error in through_both(server.url, calls.generate_events(1)):
            assert words in str(error) and error.status == 502
    with answering(stream(DONE)) as server:
        for found in through_both(server.url, calls.generate_events(1)):
            assert [event.name for event in found] == ["done"]


def test_a_get_lost_by_a_closing_connection_is_retried_and_a_post_is_not():
    for call, times, good in ((calls.model(), 2, True), (calls.interpolate({}, {}), 1, False)):
        with answering(b"", reply(b"{}")) as server:
            with (
                Client(server.url) as client,
                contextlib.suppress(ServerError) if not good else contextlib.nullcontext(),
            ):
                assert client.do(call) == {}
            assert len(server.asked) == times
    with answering(b"") as server:
        for error in through_both(server.url, calls.model()):
            assert (error.status, "cannot be reached" in str(error)) == (503, True)
        assert len(server.asked) == 4


def test_connections_are_reused():
    with answering(reply(b"{}"), close=False) as server, Client(server.url) as client:
        for _ in range(3):
            client.model()
        assert len(server.asked) == 3


def test_the_key_is_not_sent_to_other_servers():
    with answering(reply(b"{}")) as other, answering(reply(b"", "", "302 Found", Location=other.url)) as server:
        for error in through_both(server.url, calls.model(), api_key="secret"):
            assert other.url in str(error)
        assert not other.asked and all(b"Bearer secret" in head for head in server.asked)


LOCAL = (
    *("localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.8.9.10", "::1", "::", "0.0.0.0"),
    *("::ffff:127.0.0.1", socket.gethostname(), socket.gethostname().upper()),
)


def test_a_server_on_this_machine_is_never_reached_through_a_proxy(monkeypatch):
    assert all(map(is_this_machine, LOCAL))
    for name in ("example.com", "localhost.example.com", "128.0.0.1", "10.0.0.1", "::2", "", "xlocalhost"):
        assert not is_this_machine(name), name
    with answering(reply(b"{}")) as server, answering(reply(b'{"by": "proxy"}')) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        port = server.server_address[1]
        for url in (f"http://LocalHost:{port}", f"http://127.0.0.1:{port}/"):
            assert through_both(url, calls.model()) == [{}, {}]
        assert through_both("http://dsd.example", calls.model()) == [{"by": "proxy"}] * 2  # which is what it is for


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:99999", "http://x:y", "", "http://a b", "//x"],
)
def test_a_wrong_address_gets_a_sentence(url):
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match="must be like http://localhost:8000"):
            kind(url)


def test_a_wrong_key_gets_a_sentence():
    for key in ("schlüssel", "a\nb"):
        with pytest.raises(ConfigError, match="printable ASCII"):
            Client(api_key=key)


# Event streams.


def read(body: bytes, *cuts: int):
    reader, places = EventReader(), [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    found = [event for a, b in itertools.pairwise(places) for event in reader.feed(body[a:b])]
    return [(event.name, event.data) for event in found]


@given(
    st.lists(
        st.tuples(st.sampled_from(["preview", "image", "error"]), st.dictionaries(st.text(), st.text())), max_size=4
    ),
    st.sampled_from(["\n", "\r", "\r\n"]),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=6),
)
@example([("preview", {}), ("preview", {})], "\r\n", True, [205, 205])  # an empty chunk between CR and LF
def test_events_do_not_depend_on_chunks_and_line_endings(sent, end, bom, cuts):
    lines = ["\ufeff: a comment" if bom else ":", "retry: 10"]
    for number, (name, data) in enumerate(sent):
        text = json.dumps(data, indent=1, ensure_ascii=False)  # in several lines
        lines += [f"id: {number}", f"event:{name}", *(f"data: {part}" for part in text.split("\n")), "unknown", ""]
    body = (end.join(lines) + end).encode()
    assert read(body, *cuts) == sent


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'event: image\ndata: {"a":\ndata:1}\n\n', [("image", {"a": 1})]),
        (b"event:image\rdata:{}\r\r", [("image", {})]),
        (b"event: image\n\ndata: {}\n\n", []),  # the name is forgotten, and what has no name means nothing
        (b"event: image\n:data: {}\n\n", []),
        (b"data\nevent: image\n\n", []),
        (b"event: later\ndata: not JSON\n\n" + DONE, [("done", {"images": 1})]),
        (DONE + b"event: image\ndata: {}\n\n", [("done", {"images": 1})]),
        (
            'event: image\ndata: {"a": "\u2028\x85\x0b"}\n\n'.replace("\x0b", "\\u000b").encode(),
            [("image", {"a": "\u2028\x85\x0b"})],
        ),
    ],
)
def test_event_streams_are_read_as_in_the_standard(body, expected):
    for cut in range(len(body)):
        assert read(body, cut) == expected


def test_a_large_event_is_read_in_linear_time():
    reader, found = EventReader(), []
    body = b'event: image\ndata: {"base64": "' + b"x" * 20_000_000 + b'"}\n\n'
    for at in range(0, len(body), 16_384):
        found += reader.feed(body[at : at + 16_384])
    assert len(found[0].data["base64"]) == 20_000_000
