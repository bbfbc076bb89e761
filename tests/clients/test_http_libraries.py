"""Many HTTP clients: a GET, JSON, an upload, and uploads that are rejected before they are read."""

import http.client
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.clients.conftest import in_a_loop, installed, tool

pytestmark = pytest.mark.clients

Answer = tuple[int, bytes]
JSON, PNG = {"Content-Type": "application/json"}, {"Content-Type": "image/png"}


def of_urllib(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    data, headers = raw(body, file)
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def of_http_client(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    data, headers = raw(body, file)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request(method, f"{parts.path}?{parts.query}", data, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def raw(body: object, file: Path | None) -> tuple[bytes | None, dict[str, str]]:
    if file is not None:
        return file.read_bytes(), PNG
    return (None, {}) if body is None else (json.dumps(body).encode(), JSON)


def of_requests(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    import requests

    files = None if file is None else {"image": file.open("rb")}
    answer = requests.request(method, url, json=body, files=files, timeout=60)
    return answer.status_code, answer.content


def of_urllib3(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    import urllib3

    sent = {} if body is None else {"json": body}
    if file is not None:
        sent = {"fields": {"image": (file.name, file.read_bytes(), "image/png")}}
    answer = urllib3.PoolManager().request(method, url, retries=False, timeout=60, **sent)
    return answer.status, answer.data


def of_httpx(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    files = None if file is None else {"image": file.open("rb")}
    answer = httpx.request(method, url, json=body, files=files, timeout=60)
    return answer.status_code, answer.content


def of_httpx_in_chunks(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    data, headers = raw(body, file)
    pieces = None if data is None else (data[at : at + 65536] for at in range(0, len(data), 65536))
    answer = httpx.request(method, url, content=pieces, headers=headers, timeout=60)
    return answer.status_code, answer.content


def of_aiohttp(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    import aiohttp

    async def ask() -> Answer:
        form = None
        if file is not None:
            form = aiohttp.FormData()
            form.add_field("image", file.open("rb"), filename=file.name, content_type="image/png")
        timeout = aiohttp.ClientTimeout(60)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, url, json=body, data=form) as answer,
        ):
            return answer.status, await answer.read()

    return in_a_loop(ask())


def of_wget(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    sent = []
    if body is not None:
        sent = ["--header", "Content-Type: application/json", "--post-data", json.dumps(body)]
    if file is not None:
        sent = ["--header", "Content-Type: image/png", "--post-file", str(file)]
    quiet = ["-q", "-O", "-", "-S", "--content-on-error", "--tries", "1", "--timeout", "60"]
    done = subprocess.run([tool("wget", "wget"), *quiet, *sent, url], capture_output=True, timeout=90)
    lines = [line.split() for line in done.stderr.decode().splitlines() if line.strip().startswith("HTTP/")]
    assert lines, done.stderr
    return int(lines[-1][1]), done.stdout


def of_httpie(method: str, url: str, body: object = None, file: Path | None = None) -> Answer:
    command = [installed("http"), "--ignore-stdin", "--timeout", "60", "--print", "hb", "--pretty", "none"]
    sent = [] if body is None else [f"{key}:={json.dumps(value)}" for key, value in body.items()]  # type: ignore[attr-defined]
    sent.append("accept:image/png")  # by default it asks for JSON where it sends JSON
    if file is not None:
        command, sent = [*command, "--form"], [f"image@{file};type=image/png"]
    done = subprocess.run([*command, method, url, *sent], capture_output=True, timeout=90)
    head, _, answer = done.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/"), done.stderr
    return int(head.split()[1]), answer


CLIENTS = {
    function.__name__.removeprefix("of_"): function
    for function in (
        *(of_urllib, of_http_client, of_requests, of_urllib3, of_httpx, of_httpx_in_chunks, of_aiohttp),
        *(of_wget, of_httpie),
    )
}


@pytest.fixture(params=CLIENTS)
def ask(request: pytest.FixtureRequest) -> Callable[..., Answer]:
    return CLIENTS[request.param]


def test_images_by_get_json_and_upload(ask, plain, photo, drawn, reconstructed):
    for _ in range(2):
        assert ask("GET", f"{plain}/generate?class=207&seed=7") == (200, drawn)
        assert ask("POST", f"{plain}/generate", {"class": 207, "seed": 7}) == (200, drawn)
        assert ask("POST", f"{plain}/reconstruct", file=photo) == (200, reconstructed)


def test_error_answers_are_read(ask, plain, guarded, big):
    for status, url in (
        (413, f"{plain}/reconstruct"),
        (401, f"{guarded}/reconstruct"),
        (401, f"{guarded}/v1/images/edits"),
        (404, f"{plain}/no-such-route"),
        (405, f"{plain}/health/live"),
    ):
        got, body = ask("POST", url, file=big)
        assert got == status, (url, body)
        if ask is of_wget and status == 401:
            continue  # it never shows the body of these
        error = json.loads(body)
        assert error.get("status") == status or "error" in error
    status, body = ask("POST", f"{plain}/generate", {"class": "no such thing"})
    assert (status, json.loads(body)["status"]) == (422, 422)
