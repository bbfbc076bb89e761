"""Speed of the web page, in a browser against a server with the demo model.

python -m benchmarks.page_speed crowd        latency of page and API with twenty visitors
python -m benchmarks.page_speed paint        time to the first paint and until Generate is enabled
python -m benchmarks.page_speed sent         bytes that a browser receives for 160 images of ten classes
python -m benchmarks.page_speed clone        time from `git clone` to the first image in the browser

The first two exit with 1 if a limit is exceeded. Needs the `dev` extra and chromium.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
VISITORS = 20
Visitor = Callable[[httpx.AsyncClient, int, float], Coroutine[Any, Any, Any]]
IMAGES = 4  # of each click on Generate
STEPS = 25
PAINT_SECONDS = 2.0
PAGE_SECONDS = 2.0  # limit for opening the page while a crowd uses it
MAX_SHARE = 0.5  # latency of a client of the API with visitors of the page, relative to as many other clients
USABLE = """() => new Promise((done) => {
  const look = () => {
    const go = document.querySelector('#generate-go');
    if (go && !go.disabled && go.offsetParent && document.querySelector('#picker .class')) done(performance.now());
    else requestAnimationFrame(look);
  };
  look();
})"""


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The address of `dsd-serve --ui` with the demo model."""
    command = [sys.executable, "-m", "server.main", "--ui", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in process.stderr or ():
            if match := re.search(r"running on (http://\S+)", line):
                yield match[1]
                return
        raise SystemExit("page: the server did not start")
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("page: chromium is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


# The crowd.


async def visitor(http: httpx.AsyncClient, event: int, end: float) -> tuple[int, int]:
    """Press Generate repeatedly, as the page in a browser does. Returns the number of images and of preview updates."""
    drawn = previews = 0
    while time.monotonic() < end:
        session = uuid.uuid4().hex[:10]
        # The page's process keeps the first value, the chosen classes, and the last, what is shown.
        data = [None, 0, False, IMAGES, 0, STEPS, "heun", 3, 0, 1, None]
        body = {"data": data, "fn_index": event, "session_hash": session, "event_data": None}
        (await http.post("/gradio_api/queue/join", json=body)).raise_for_status()
        async with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answer:
            async for line in answer.aiter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                previews += message["msg"] == "process_generating"
                if message["msg"] == "process_completed":
                    assert message["success"], message
                    drawn += IMAGES
                    break
    return drawn, previews


async def api_client(http: httpx.AsyncClient, _: int, end: float) -> tuple[int, int]:
    """Send the same requests to the API."""
    drawn = previews = 0
    body = {"class": 207, "n": IMAGES, "steps": STEPS, "format": "events", "preview_every": 3}
    while time.monotonic() < end:
        async with http.stream("POST", "/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                drawn += line == "event: image"
                previews += line == "event: preview"
    return drawn, previews


async def timed(http: httpx.AsyncClient, path: str, pause: float, end: float, into: list[float]) -> None:
    """Send a request every `pause` seconds, however long the answers take."""

    async def get() -> None:
        began = time.monotonic()
        answer = await http.get(path)
        if answer.status_code != 429:  # the queue is full
            answer.raise_for_status()
        into.append(time.monotonic() - began if answer.is_success else math.inf)

    tasks = []
    while time.monotonic() < end:
        tasks.append(asyncio.create_task(get()))
        await asyncio.sleep(pause)
    await asyncio.gather(*tasks)


async def latencies(url: str, who: Visitor | None, seconds: float) -> dict[str, list[float]]:
    """Latencies in seconds of the API, the page and its state, while VISITORS copies of `who`, if any, are active."""
    times: dict[str, list[float]] = {"GET /generate": [], "GET /": [], "GET /studio/state": []}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        config = (await http.get("/config")).json()
        button = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "generate-go")
        event = next(one["id"] for one in config["dependencies"] if [button, "click"] in one["targets"])
        end = time.monotonic() + seconds
        crowd = [asyncio.create_task(who(http, event, end)) for _ in range(VISITORS)] if who else []
        await asyncio.sleep(2 if who else 0)  # until all have started
        await asyncio.gather(
            timed(http, "/generate?class=207", 1, end, times["GET /generate"]),
            timed(http, "/", 0.2, end, times["GET /"]),
            timed(http, "/studio/state", 0.2, end, times["GET /studio/state"]),
        )
        done = await asyncio.gather(*crowd)
    if who:
        drawn, previews = (sum(column) for column in zip(*done, strict=True))
        took = seconds + time.monotonic() - end
        print(f"  the crowd drew {drawn} images, {drawn / took:.1f} per second, and got {previews} previews")
    return times


def crowd(seconds: float) -> bool:
    """Print the latencies. Returns whether the page opened in time and the API stayed fast enough."""
    results = {}
    with server() as url:
        for name, who in (("alone", None), ("with 20 API clients", api_client), ("with 20 visitors", visitor)):
            print(name)
            results[name] = asyncio.run(latencies(url, who, seconds if who else 5))
            for path, values in results[name].items():
                ordered = sorted(values)
                late = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
                print(
                    f"  {path:18} {len(ordered):4} requests: median {1000 * statistics.median(ordered):6.0f} ms, "
                    f"p95 {1000 * late:6.0f} ms, worst {1000 * ordered[-1]:6.0f} ms (inf: rejected)"
                )
    busy, other = results["with 20 visitors"], results["with 20 API clients"]
    share = statistics.median(busy["GET /generate"]) / statistics.median(other["GET /generate"])
    print(f"median latency of /generate with visitors: {share:.2f} of that with API clients (limit {MAX_SHARE})")
    return share <= MAX_SHARE and max(busy["GET /generate"]) < math.inf and max(busy["GET /"]) <= PAGE_SECONDS


# First paint.


def paint(visits: int) -> bool:
    """Print the times until a browser with an empty cache paints and until Generate is enabled."""
    painted, usable = [], []
    with server() as url, chromium() as browser:
        for _ in range(visits):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            page.goto(url, wait_until="commit")
            usable.append(page.evaluate(USABLE) / 1000)
            entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            painted.append(page.evaluate(entry) / 1000)
            context.close()
    for name, values in (("first contentful paint", painted), ("Generate is enabled", usable)):
        later = statistics.median(values[1:])
        print(f"{name}: {values[0]:.2f} s for the first visitor, then {later:.2f} s, at worst {max(values):.2f} s")
    return max(painted) < PAINT_SECONDS


# Bytes.


def sent() -> bool:
    """Print the megabytes that a browser receives for 16 images of each of ten classes, the page itself not counted."""
    with server() as url, chromium() as browser:
        classes = [str(one["index"]) for one in httpx.get(f"{url}/classes").json()][:10]
        page, received = browser.new_page(), 0
        watching = page.context.new_cdp_session(page)
        watching.send("Network.enable")

        def count(event: dict[str, Any]) -> None:
            nonlocal received
            received += event["dataLength"]

        watching.on("Network.dataReceived", count)
        page.goto(f"{url}/?class={','.join(classes)}&n=16&seed=7")
        page.wait_for_selector("#told [data-classes]", state="attached", timeout=60_000)
        page_itself = received
        page.wait_for_selector("#details .details", timeout=600_000)
        page.wait_for_function("[...document.querySelectorAll('#board img')].every((one) => one.complete)")
        images = page.locator("#board button.card").count()
    print(f"{images} images: {(received - page_itself) / 1e6:.1f} MB")
    return images == 16 * len(classes)


# From a clone.


def clone() -> bool:
    """Follow the README's steps in an empty home directory, and print the seconds of each."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as home, chromium() as browser:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        began = time.monotonic()
        subprocess.run(["git", "clone", "-q", ROOT, f"{home}/dsd"], check=True)
        cloned = time.monotonic()
        command = ["env", "-i", f"HOME={home}", f"PATH={os.environ['PATH']}", "make", "ui", f"ARGS=--port {port}"]
        process = subprocess.Popen(
            command, cwd=f"{home}/dsd", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while process.poll() is None and not answers(port):
                time.sleep(0.05)
            assert process.poll() is None, "make ui exited"
            ready = time.monotonic()
            page = browser.new_page()
            page.goto(f"http://localhost:{port}")
            page.click("#generate-go")
            page.wait_for_selector("#details .details img", timeout=120_000)
            drawn = time.monotonic()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    print(f"git clone {cloned - began:.1f} s, make ui until it answers {ready - cloned:.1f} s, ", end="")
    print(f"open, press Generate and get four images {drawn - ready:.1f} s, all {drawn - began:.1f} s")
    return True


def answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["crowd", "paint", "sent", "clone"])
    parser.add_argument("--seconds", type=float, default=20, help="crowd: duration of each crowd")
    parser.add_argument("--visits", type=int, default=6, help="paint: number of visits")
    options = parser.parse_args()
    passed = {
        "crowd": lambda: crowd(options.seconds),
        "paint": lambda: paint(options.visits),
        "sent": sent,
        "clone": clone,
    }[options.what]()
    sys.exit(0 if passed else "page_speed: a limit is exceeded")


if __name__ == "__main__":
    main()
