"""curl: HTTP/2 upgrades, all ways to send a body, and uploads that are rejected before they are read."""

import json
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.clients.conftest import KEY, output, tool

pytestmark = pytest.mark.clients

JSON = ("-H", "content-type: application/json")
CHUNKED = ("-H", "transfer-encoding: chunked")
WALK = '{"from": {"class": 207, "seed": 1}, "to": {"class": 1, "seed": 1}, "n": 2, "steps": 2, "format": "json"}'
VERSIONS = ("--http1.0", "--http1.1", "--http2")  # the last offers an upgrade to h2c, and sends HTTP/1.1


@pytest.fixture(scope="module")
def curl():
    """Runs curl: curl("-d", "...", url) is the status and the body."""
    program = tool("curl", "curl")

    def run(*arguments: str) -> tuple[int, bytes]:
        done = subprocess.run(
            [program, "-sS", "-m", "60", "-w", "%{stderr}%{http_code}", *arguments], capture_output=True, timeout=90
        )
        assert done.returncode == 0, f"curl ended with {done.returncode}: {done.stderr.decode()}"
        return int(done.stderr), done.stdout

    return run


@pytest.fixture(scope="module")
def latents(plain: str, photo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("latents") / "z.npy"
    file.write_bytes(httpx.post(f"{plain}/encode", content=photo.read_bytes()).raise_for_status().content)
    assert np.load(file).ndim == 2
    return file


@pytest.mark.parametrize("version", VERSIONS[1:])
@pytest.mark.parametrize("sent", [(), CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", (*JSON, "-d", '{"class": 207, "seed": 7, "format": "json"}')),
        ("/interpolate", (*JSON, "-d", WALK)),
        ("/edit?class=1&seed=7&format=json", ("-F", "image=@PHOTO", "-F", "mask=@PHOTO")),
        ("/reconstruct?format=json", ("-F", "image=@PHOTO")),
        ("/reconstruct?format=json", ("-H", "content-type: image/png", "--data-binary", "@PHOTO")),
        ("/encode?format=json", ("-H", "content-type: image/png", "--data-binary", "@PHOTO")),
        ("/decode?format=json", ("-H", "content-type: application/x-npy", "--data-binary", "@LATENTS")),
        ("/v1/images/generations", (*JSON, "-d", '{"prompt": "207", "seed": 7}')),
        ("/v1/images/edits", ("-F", "image=@PHOTO", "-F", "prompt=207", "-F", "seed=7")),
        ("/v1/images/variations", ("-F", "image=@PHOTO", "-F", "seed=7")),
    ],
)
def test_every_body_arrives_even_with_an_http_2_upgrade(curl, plain, photo, latents, version, sent, path, body):
    body = [part.replace("@PHOTO", f"@{photo}").replace("@LATENTS", f"@{latents}") for part in body]
    status, answer = curl(version, *sent, *body, plain + path)
    assert status == 200, answer
    expected = json.loads(curl("--http1.1", *body, plain + path)[1])
    assert images(json.loads(answer)) == images(expected) != []


def images(answer) -> list:
    """The images or latents in a JSON answer of any route."""
    found = answer.get("images") or answer.get("data") or [answer]
    return [one.get("base64") or one.get("b64_json") or one.get("latents") for one in found]


def test_a_connection_with_http_2_upgrades_is_kept_alive(curl, plain, tmp_path, drawn):
    files = [tmp_path / f"{number}.png" for number in range(3)]
    asked = (*JSON, "-d", '{"class": 207, "seed": 7}', f"{plain}/generate")
    requests = [("-o", str(file), "-w", "%{http_code} %{num_connects}\n", "-s", "--http2", *asked) for file in files]
    first, *others = requests
    printed = output(tool("curl", "curl"), *first, *(part for request in others for part in ("--next", *request)))
    assert printed.split("\n") == ["200 1", "200 0", "200 0", ""]
    assert [file.read_bytes() for file in files] == [drawn] * 3


def test_http_2_with_prior_knowledge_fails_at_once(plain):
    asked = [tool("curl", "curl"), "-sS", "-m", "20", "--http2-prior-knowledge", f"{plain}/generate?class=207"]
    done = subprocess.run(asked, capture_output=True, timeout=30)
    assert done.returncode not in (0, 28)  # 28: still waiting
    assert httpx.get(f"{plain}/health/live").status_code == 200


REFUSED = {
    "too large": (413, ("-F", "image=@BIG"), "/reconstruct"),
    "too large, of no known length": (413, ("-X", "POST", *CHUNKED, "-T", "BIG"), "/reconstruct"),
    "too large for OpenAI's": (413, ("-F", "image=@BIG", "-F", "prompt=1"), "/v1/images/edits"),
    "compressed": (415, ("-H", "content-encoding: gzip", "--data-binary", "@BIG"), "/reconstruct"),
    "no such route": (404, ("-F", "image=@BIG"), "/no-such-route"),
    "no such method": (405, ("-F", "image=@BIG"), "/health/live"),
    "no key": (401, ("-F", "image=@BIG"), "/reconstruct"),
    "wrong key": (401, ("-H", "x-api-key: wrong", "-F", "image=@BIG"), "/v1/images/edits"),
    "too large with a key": (413, ("-H", f"x-api-key: {KEY}", "-F", "image=@BIG"), "/reconstruct"),
}


@pytest.mark.parametrize("front", ["itself", "default", "kept", "unbuffered"])
@pytest.mark.parametrize("why", REFUSED)
def test_the_answer_to_a_rejected_upload_is_read(curl, plain, guarded, big, request, front, why):
    status, body, path = REFUSED[why]
    body = [part.replace("BIG", str(big)) for part in body]
    keys = status == 401 or "with a key" in why
    url = guarded if keys else plain
    if front != "itself":
        nginx = request.getfixturevalue("nginx")
        url = (nginx.guarded if keys else nginx.plain)[front]
    for version in VERSIONS if front == "itself" else VERSIONS[1:2]:
        if version == "--http1.0" and "chunked" in str(body):
            continue  # HTTP/1.0 has no chunks
        for _ in range(2):
            got, answer = curl(version, "-H", "expect:", *body, url + path)
            assert (got, bool(answer)) == (status, True)
            assert "error" in json.loads(answer) or json.loads(answer)["status"] == status
