"""Forms of several fields, and the memory that uploads may take, in a small application on a real server."""

import asyncio
import encodings
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.memory import Memory
from server import error_responses
from server.middleware.body_limits import Body, BodyLimits
from server.request_memory import RequestResources
from server.request_reader import read_uploads
from server.settings import Settings
from tests.support import hostile

SETTINGS = Settings(max_body_mb=1.0, max_uploads_mb=4.0, max_decode_mb=20.0, body_timeout=1.0)


def application() -> FastAPI:
    app = FastAPI()
    error_responses.install(app)
    app.add_middleware(BodyLimits, settings=SETTINGS, memory=Memory(int(SETTINGS.max_uploads_mb * 1e6)))
    hold = asyncio.Event()

    @app.post("/edit")
    async def edit(request: Request) -> dict[str, object]:
        form = await read_uploads(request, ("image", "mask"), ("strength", "note"), ("application/x-npy",))
        return {"files": {name: len(data) for name, data in form.files.items()}, "fields": form.fields}

    @app.post("/hold")
    async def hold_body(request: Request, until_released: bool = False) -> str:
        form = await read_uploads(request)
        if until_released:
            form.parse("image", len)
        await hold.wait()
        return "done"

    @app.post("/go")
    async def go() -> None:
        hold.set()

    @app.api_route("/any", methods=["GET", "DELETE", "OPTIONS"])
    async def any_method(request: Request) -> int:
        return len(await request.body())

    @app.post("/json")
    async def json(body: dict[str, int]) -> int:
        return len(body)

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(application(), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as made:
        yield made
    server.should_exit = True
    thread.join(10)


def detail(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["detail"]


def test_files_and_fields_of_a_form(client):
    answer = client.post("/edit", files={"image": b"x" * 5000, "mask": b"y"}, data={"strength": "0.5", "note": "é"})
    assert answer.json() == {"files": {"image": 5000, "mask": 1}, "fields": {"strength": "0.5", "note": "é"}}
    assert client.post("/edit", files={"image": b"x"}).json() == {"files": {"image": 1}, "fields": {}}


def test_texts_of_a_form_are_utf8_and_may_have_file_names(client):
    part = 'Content-Disposition: form-data; name="{}"; filename="a"'
    parts = (part.format("image"), b"x"), (part.format("note"), "é".encode())
    for charset in ("", "; charset=latin-1", "; charset=undefined", "; charset=punycode", "; charset=no such"):
        kind = f"multipart/form-data; boundary=B{charset}"
        sent = hostile.form(*parts, said=kind)
        answer = client.post("/edit", content=sent.body, headers=sent.headers)
        assert answer.json() == {"files": {"image": 1}, "fields": {"note": "é"}}


def test_python_keeps_no_charset_of_a_form(client):
    """It keeps the name of every unknown codec that is looked up, for ever."""
    known = set(encodings._cache)
    said = "multipart/form-data; boundary=B; charset=" + "x" * 50_000
    sent = hostile.form(('Content-Disposition: form-data; name="image"; filename="a"', b"x"), said=said)
    assert client.post("/edit", content=sent.body, headers=sent.headers).json()["files"] == {"image": 1}
    assert set(encodings._cache) == known


def test_files_of_a_form_are_never_written_to_disk(client, monkeypatch):
    """The limit of the system's temporary files would be reached, or a disk filled, by uploads of others."""
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", None)
    assert client.post("/edit", files={"image": bytes(900_000)}).json()["files"] == {"image": 900_000}


def test_a_body_is_the_first_file(client):
    for media in ("image/png", "application/octet-stream", "application/x-www-form-urlencoded", "application/x-npy"):
        answer = client.post("/edit", content=b"xyz", headers={"content-type": media})
        assert answer.json() == {"files": {"image": 3}, "fields": {}}


def test_forms_that_are_not_as_described(client):
    image = {"image": b"x"}
    assert "form has no file in the field image; curl -F image=@FILE" in detail(
        client.post("/edit", files={"mask": b"x"}), 422
    )
    assert "file in the form field image is empty" in detail(client.post("/edit", files={"image": b""}), 422)
    others = "unknown form field 'strenght'; this form takes image, mask, strength, note"
    assert others in detail(client.post("/edit", files=image, data={"strenght": "1"}), 422)
    assert "note has more than 10000 bytes" in detail(
        client.post("/edit", files=image, data={"note": "x" * 10_001}), 422
    )
    several = [("note[]", b"x" * 6000), ("note[]", b"x" * 6000)]
    assert "note[] has more than 10000 bytes" in detail(client.post("/edit", files=[("image", b"x"), *several]), 422)
    twice = [("image", b"x"), ("mask", b"1"), ("mask", b"2")]
    assert "field mask twice" in detail(client.post("/edit", files=twice), 422)
    assert "in UTF-8" in detail(client.post("/edit", files=image, data={"note": b"\xff\xfe"}), 422)
    sentence = detail(client.post("/edit", content=b"x", headers={"content-type": "text/csv"}), 415)
    assert "content-type application/x-npy, or as a form, not 'text/csv'" in sentence


@pytest.mark.parametrize(
    "said, body, words",
    [
        ("multipart/form-data", b"", "must name the boundary of the form"),
        ("multipart/form-data; boundary=", b"", "must name the boundary of the form"),
        ("multipart/form-data; boundary=B", b"--C\r\n\r\n", "must begin with the boundary that content-type names"),
        ("multipart/form-data; boundary=B", b"--B\n\n", "lines end in CR LF"),
        ("multipart/form-data; boundary=B", b"--B\r\n", "ends before its closing boundary; send the whole form"),
        ("multipart/form-data; boundary=B", b"--B\r\nX: a\r\n\r\n", "as curl -F and browsers send it"),
    ],
)
def test_forms_that_cannot_be_parsed(client, said, body, words):
    assert words in detail(client.post("/edit", content=body, headers={"content-type": said}), 422)


def test_the_limit_holds_for_all_files_together(client):
    assert client.post("/edit", files={"image": bytes(500_000), "mask": bytes(450_000)}).status_code == 200
    answer = client.post("/edit", files={"image": bytes(600_000), "mask": bytes(600_000)})
    assert "larger than 1 MB" in detail(answer, 413)


def test_a_body_in_many_chunks_counts_what_came(client):
    def chunks(size: int) -> Iterator[bytes]:
        for _ in range(size // 1000):
            yield bytes(1000)

    assert client.post("/edit", content=chunks(900_000)).json()["files"]["image"] == 900_000
    assert "larger than 1 MB" in detail(client.post("/edit", content=chunks(1_001_000)), 413)
    length = {"content-length": "900000"}  # announced and then sent in pieces: each byte counts once
    assert client.post("/edit", content=chunks(900_000), headers=length).json()["files"]["image"] == 900_000


def test_json_is_limited_too(client):
    assert client.post("/json", json={"a": 1}).json() == 1
    answer = client.post("/json", content=b" " * 1_000_001, headers={"content-type": "application/json"})
    assert "larger than 1 MB" in detail(answer, 413)
    assert client.post("/json", content=b"[" * 900_000, headers={"content-type": "application/json"}).status_code == 400


def test_bodies_of_all_requests_share_their_memory(client):
    """Each of these takes 1.8 of 4 MB: two fit, then none until they are released or answered."""
    body = bytes(900_000)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post("/hold", content=body).status_code))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    refused = client.post("/edit", content=body)
    assert "memory for uploads" in detail(refused, 429)
    assert refused.headers["retry-after"] == "1"
    assert client.post("/edit", content=bytes(100_000)).status_code == 200
    client.post("/go")
    for thread in threads:
        thread.join(10)
    assert answers == [200, 200]
    assert client.post("/edit", content=body).status_code == 200


def test_an_image_that_takes_too_much_memory_is_refused():
    data = codec.write_image(np.zeros((3, 1200, 1200), np.uint8), "webp")
    with pytest.raises(InputError, match=r"1200 x 1200 pixels takes 39 MB, this server allows 20 MB"):
        asyncio.run(Decoder(max_total=20_000_000).read(data, 16))


def test_images_wait_for_memory_in_their_order():
    memory = Memory(20_000_000)
    order: list[int] = []
    most = 0

    async def take(number: int, megabytes: int) -> None:
        nonlocal most
        claim = await memory.take(megabytes * 1_000_000)
        order.append(number)
        most = max(most, memory.total)
        await asyncio.sleep(0.01)
        claim.release()

    async def all_at_once() -> None:
        await asyncio.gather(*(take(number, megabytes) for number, megabytes in enumerate((15, 3, 20, 1, 8, 20, 2))))

    asyncio.run(all_at_once())
    assert order == list(range(7))
    assert most <= 20_000_000
    assert memory.total == 0


def test_a_client_waits_for_its_share_while_others_pass():
    memory = Memory(100)

    async def all_at_once() -> None:
        alone = await memory.take(90, "a")  # all that it has may be more than half
        waits = [asyncio.ensure_future(memory.take(20, "a")) for _ in range(2)]
        other = await asyncio.wait_for(memory.take(10, "b"), 5)
        assert not any(wait.done() for wait in waits)
        waits[0].cancel()
        alone.shrink(20)
        second = await asyncio.wait_for(waits[1], 5)
        assert memory.total == 50 and dict(memory.held) == {"a": 40, "b": 10}
        for claim in (alone, other, second, second):
            claim.release()
        assert memory.total == 0 and not memory.held and not memory.waiting

    asyncio.run(all_at_once())


def test_the_decoder_gives_what_read_image_gives():
    decoder = Decoder()
    for data in hostile.images().values():
        assert np.array_equal(asyncio.run(decoder.read(data, 16)), codec.read_image(data, size=16))


def connected(client: httpx.Client, head: bytes) -> socket.socket:
    line = socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)
    line.sendall(head)
    return line


def test_uploads_that_stall_give_way_to_others(client, monkeypatch):
    """Four of these have announced 0.95 MB, which with copies would be 7.6 of 4 MB, and sent 0.45 MB each."""
    monkeypatch.setattr("server.middleware.body_limits.IDLE", 0.1)
    head = b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 950000\r\n\r\n"
    lines = [connected(client, head + bytes(450_000)) for _ in range(4)]
    try:
        time.sleep(0.4)
        assert client.post("/edit", content=bytes(900_000)).status_code == 200
        lines[0].settimeout(5)
        answer = lines[0].recv(2000)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"arrived too slowly while the memory" in answer
        rest = []
        for line in lines[1:]:
            line.sendall(bytes(500_000))
            rest.append(line.recv(2000)[:12])
        assert b"HTTP/1.1 200" in rest  # those that were not in the way go on
    finally:
        for line in lines:
            line.close()


def test_a_body_must_keep_coming(client, monkeypatch):
    monkeypatch.setattr("server.middleware.body_limits.GRACE", 0.3)
    head = b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 950000\r\n\r\n"
    began = time.monotonic()
    with connected(client, head + bytes(100)) as line:
        answer = line.recv(2000)
    assert (
        answer.startswith(b"HTTP/1.1 408 ") and b"fewer than 5,000 bytes of the body arrived in 0.3 seconds" in answer
    )
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
def test_a_body_of_a_method_without_one_is_limited(client, method):
    """A route that reads on, as all do that watch for the client's end, reads 100 kB of it and no more."""
    answer = client.request(method, "/any", content=bytes(150_000))
    assert "larger than 0.1 MB" in detail(answer, 413)
    assert client.request(method, "/any", content=bytes(50_000)).json() == 50_000


def test_a_client_has_half_of_the_memory_for_uploads():
    async def two() -> None:
        limits = BodyLimits(application(), SETTINGS, Memory(4_000_000))
        bodies = []
        for who in ("the key a", "the key a", "the key b"):
            scope = {"type": "http", "method": "POST", "headers": [], "dsd.held": RequestResources(who)}

            async def source() -> dict[str, object]:
                return {"type": "http.request", "body": bytes(700_000), "more_body": True}

            bodies.append(Body(limits, scope, Headers(scope=scope), source))
        await bodies[0].receive()
        with pytest.raises(HTTPException, match="uploads of the key a take half of the memory") as refused:
            await bodies[1].receive()
        assert refused.value.status_code == 429
        await bodies[2].receive()

    asyncio.run(two())
