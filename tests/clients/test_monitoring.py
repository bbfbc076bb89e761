"""Monitoring: promtool, wget --spider, nc, and clients that send requests just when a connection is about to close."""

import asyncio
import subprocess

import httpx
import pytest

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from tests.clients.conftest import in_a_loop, tool
from tests.support.servers import serving

pytestmark = pytest.mark.clients


def test_promtool_accepts_the_metrics(plain, guarded, drawn):
    for url in (plain, guarded):
        httpx.get(f"{url}/generate?class=no-such-class")  # so that errors are counted too
    text = httpx.get(f"{plain}/metrics").text
    done = subprocess.run(
        [tool("promtool", "prometheus"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/health/live", "/health/ready", "/metrics", "/classes", "/model", "/model/card", "/docs"),
        *("/openapi.json", "/v1/models", "/v1/models/dsd-demo", "/debug/batcher", "/generate?class=207&seed=7"),
    ],
)
def test_uptime_monitors_may_use_head(plain, path):
    asked = [tool("wget", "wget"), "--spider", "-nv", "--tries", "1", "--timeout", "30", plain + path]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    get, head = httpx.get(plain + path), httpx.head(plain + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", ["/model", "/generate?class=207&seed=7", "/generate?class=207&format=events"])
def test_a_half_closed_connection_gets_its_answer(plain, path, version):
    program = tool("nc", "netcat-openbsd")
    host, port = plain.removeprefix("http://").split(":")
    request = f"GET {path} HTTP/{version}\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    done = subprocess.run([program, "-N", host, port], input=request, capture_output=True, timeout=60)
    assert done.stdout.startswith(b"HTTP/1.1 200 ")
    if "seed=7" in path:
        assert done.stdout.endswith(httpx.get(plain + path).content)
    if "events" in path:
        assert b"event: done" in done.stdout


def test_no_request_is_lost_on_connections_that_are_about_to_close(plain):
    """Sixty of our clients and sixty posting httpx clients send a request every 5 s, when httpx drops idle connections.
    Thirty send one to another server every second, when that server drops them."""

    async def ours(url: str, seconds: float) -> None:
        client = AsyncClient(url)
        for number in range(rounds(seconds)):
            await asyncio.sleep(pause(seconds, number))
            assert "rows" in await client.do(calls.batcher())
        await client.close()

    async def posts(url: str, seconds: float) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for number in range(rounds(seconds)):
                await asyncio.sleep(pause(seconds, number))
                answer = await client.post("/generate", json={"class": "no such thing"})
                assert answer.status_code == 422

    def rounds(seconds: float) -> int:
        return round(10 / seconds) + 1

    def pause(seconds: float, number: int) -> float:
        return 0.1 if number == 0 else seconds + 0.004 * (number % 3 - 1)

    async def everything(short: str) -> None:
        await asyncio.gather(
            *(ours(plain, 5) for _ in range(60)),
            *(posts(plain, 5) for _ in range(60)),
            *(ours(short, 1) for _ in range(30)),
        )

    with serving("--keep-alive", "1") as short:
        in_a_loop(everything(short))
