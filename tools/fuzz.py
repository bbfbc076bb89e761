"""Fuzz a server with valid and hostile requests, and check its latency, memory and leaks.

    python tools/fuzz.py --minutes 10 --ui

Starts a server and sends requests to every route of its /openapi.json, and with --ui to every event of the page. Fails
if /health/live takes longer than 250 ms, if memory exceeds the documented bound, or if gauges, threads, file
descriptors or temporary files do not return to their initial values.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from server.request_memory import memory_bound
from server.settings import Settings

ROOT = Path(__file__).parents[1]
MAX_HEALTH = 0.25  # seconds
SETTLE = 60  # seconds in which all values must return
GAUGES = ("dsd_images_running", "dsd_images_waiting", "dsd_seconds_ahead", "dsd_memory_bytes")
TEXTS = ("", "207", "golden retriever", "x" * 5000, "\u202e", "'; --", "-1", "1e999", "NaN", "null", "金毛犬", "\0")
VALUES: tuple[Any, ...] = (*TEXTS, None, True, [], {}, [[[]]], -1, 0, 1, 2**53 + 1, 1e300, {"a": {"b": 1}})
SENSIBLE: dict[str, tuple[Any, ...]] = {
    "class": (1, 207, "golden retriever"),
    "prompt": ("207", "goldfish"),
    "n": (1, 2, 4, 16),
    "steps": (1, 2, 8, 250),
    "num_inference_steps": (1, 2, 8),
    "size": (8, 64, 256, 1024),
    "seed": (1, 2**32),
    "format": ("png", "jpeg", "webp", "json", "zip", "events", "npy", "safetensors"),
    "output_format": ("png", "jpeg", "webp"),
    "timeout": (0.01, 5, 60),
    "strength": (0.001, 0.5, 1),
    "stream": (True, False),
    "preview_every": (0, 1, 3),
    "guidance": (1, 2),
}


class Process:
    """A server process and its resources."""

    def __init__(self, arguments: list[str], temporary: Path) -> None:
        command = [sys.executable, "-m", "server.main", "--port", "0", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
        self.temporary = temporary
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.search(r"running on (http://\S+)", line):
                self.url = match[1]
                break
        else:
            raise SystemExit("the server did not start:\n" + "".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True).start()

    def memory(self, key: str) -> float:
        """VmRSS or VmHWM in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{key}:\s+(\d+)", status)
        assert match is not None
        return int(match[1]) * 1024 / 1e6

    def state(self) -> dict[str, float]:
        """Values that must return to the same level: gauges, threads, file descriptors, temporary files."""
        folder = Path(f"/proc/{self.process.pid}")
        metrics = httpx.get(f"{self.url}/metrics", timeout=30).text
        samples = re.findall(r"^(\w+(?:\{.*?\})?) (\S+)$", metrics, re.MULTILINE)
        gauges = {name: float(value) for name, value in samples if name.startswith(GAUGES)}
        return {
            **gauges,
            "threads": len(list((folder / "task").iterdir())),
            "file descriptors": len(list((folder / "fd").iterdir())),
            "temporary files": sum(path.is_file() for path in self.temporary.rglob("*")),
        }

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


class Pulse(threading.Thread):
    """Requests /health/live every 100 ms. times: latencies in seconds. failed: number of failures."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.ended = url, threading.Event()
        self.times: list[float] = []
        self.failed = 0

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.ended.wait(0.1):
                began = time.perf_counter()
                try:
                    client.get("/health/live").raise_for_status()
                except httpx.HTTPError:
                    self.failed += 1
                self.times.append(time.perf_counter() - began)


class Maker:
    """Random requests, determined by a seed."""

    def __init__(self, document: dict[str, Any], events: list[dict[str, Any]], seed: int) -> None:
        self.document, self.events = document, events
        self.random = random.Random(seed)
        self.routes = [
            (path, method, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if method in ("get", "post")
        ]
        self.images = [self.image(side, kind) for side in (16, 300, 2000) for kind in ("PNG", "JPEG", "WEBP")]

    def image(self, side: int, kind: str) -> bytes:
        pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        return buffer.getvalue()

    def value(self, name: str) -> Any:
        name = name.removesuffix("_")
        if name in SENSIBLE and self.random.random() < 0.85:
            return self.random.choice(SENSIBLE[name])
        return self.random.choice(VALUES)

    def upload(self) -> bytes:
        good = self.random.choice(self.images)
        return self.random.choices(
            (good, good[: len(good) // 2], self.random.randbytes(2000), bytes(19_000_000), b""), (12, 2, 2, 1, 1)
        )[0]

    def names(self, schema: dict[str, Any]) -> list[str]:
        """The properties of a schema of the document."""
        if reference := schema.get("$ref"):
            return self.names(self.document["components"]["schemas"][reference.rpartition("/")[2]])
        return list(schema.get("properties", ()))

    def one(self) -> tuple[str, Callable[[httpx.Client], int]]:
        """The name of a route, and a function that sends one random request to it and returns the status."""
        if self.events and self.random.random() < 0.2:
            return "page", self.event()
        path, method, operation = self.random.choice(self.routes)
        url = re.sub(r"\{.*?\}", lambda _: self.random.choice(("demo", "1", "x" * 300)), path)
        chosen = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        query = {name: str(self.value(name)) for name in chosen if name == "class" or self.random.random() < 0.4}
        sent: dict[str, Any] = {"params": {name: value for name, value in query.items() if value.isprintable()}}
        body = operation.get("requestBody", {}).get("content", {})
        if body:
            kind, described = self.random.choice(list(body.items()))
            names = self.names(described.get("schema", {}))
            if kind == "application/json":
                values = {name: self.value(name) for name in names if self.random.random() < 0.4}
                values |= {name: self.value(name) for name in ("class", "prompt") if name in names}
                if "from" in names:
                    values |= {"from": {"class": self.value("class")}, "to": {"class": self.value("class")}}
                    sent["params"] = {}
                sent |= {"content": json.dumps(values), "headers": {"content-type": kind}}
            elif kind == "multipart/form-data":
                files = [name for name in names if name in ("image", "mask", "from", "to")] or ["image"]
                sent["files"] = {name: ("a", self.upload()) for name in files}
                sent["data"] = {
                    name: str(self.value(name)) for name in names if name not in files and self.random.random() < 0.3
                }
                if "prompt" in names:
                    sent["data"]["prompt"] = "207"
            else:
                sent |= {"content": self.upload(), "headers": {"content-type": kind}}
        leave = self.random.random() < 0.1

        def send(client: httpx.Client) -> int:
            with client.stream(method.upper(), url, **sent) as answer:
                for _ in answer.iter_raw(65536):
                    if leave:  # disconnect midway
                        break
                return answer.status_code

        return f"{method.upper()} {path}", send

    def event(self) -> Callable[[httpx.Client], int]:
        """One event of the page, with values that the page itself never sends."""
        event = self.random.choice(self.events)
        data = [self.random.choice(VALUES) for _ in event.get("inputs", ())]
        if self.random.random() < 0.2:
            data = data[1:]
        body = {"data": data, "fn_index": event["id"], "session_hash": f"fuzz{self.random.randrange(20)}"}
        return lambda client: client.post("/gradio_api/queue/join", json=body).status_code


def run(server: Process, makers: list[Maker], seconds: float) -> tuple[Counter[tuple[str, int]], Counter[str]]:
    """Send requests, a thread per maker. Returns counts of statuses and of broken connections by route."""
    ended = time.monotonic() + seconds
    statuses: Counter[tuple[str, int]] = Counter()
    broken: Counter[str] = Counter()
    lock = threading.Lock()

    def work(maker: Maker) -> None:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            while time.monotonic() < ended:
                name, send = maker.one()
                try:
                    status = send(client)
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    with lock:
                        broken[f"{name}: {type(error).__name__}"] += 1
                    continue
                with lock:
                    statuses[name, status] += 1

    threads = [threading.Thread(target=work, args=(maker,)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, broken


def settled(server: Process, before: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Values that have not returned in SETTLE seconds: name -> (before, after). Threads of pools may stay."""
    deadline = time.monotonic() + SETTLE
    while True:
        after = server.state()
        allowed = {"threads": 48, "file descriptors": 4}
        differing = {
            name: (before.get(name, 0.0), value)
            for name, value in after.items()
            if value > before.get(name, 0.0) + allowed.get(name, 0)
        }
        if not differing or time.monotonic() > deadline:
            return differing
        time.sleep(1)


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[Process]:
    with tempfile.TemporaryDirectory() as folder:
        server = Process(arguments, Path(folder))
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ui", action="store_true", help="the page too")
    options = parser.parse_args()
    failures = []
    with started(["--ui"] if options.ui else []) as server:
        document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
        events = httpx.get(f"{server.url}/config", timeout=60).json()["dependencies"] if options.ui else []
        makers = [Maker(document, events, options.seed * 1000 + number) for number in range(options.clients)]
        run(server, makers[:4], 5)  # so that everything lazy is loaded
        time.sleep(5)  # until abandoned requests have ended
        before, rest = server.state(), server.memory("VmRSS")
        pulse = Pulse(server.url)
        pulse.start()
        statuses, broken = run(server, makers, 60 * options.minutes)
        pulse.ended.set()
        pulse.join()
        peak, differing = server.memory("VmHWM"), settled(server, before)
        code = server.stop()

    routes = sorted({name for name, _ in statuses})
    for name in routes:
        counts = " ".join(f"{status}: {count}" for (of, status), count in sorted(statuses.items()) if of == name)
        print(f"{name:32} {counts}")
    for name, count in sorted(broken.items()):
        print(f"{name:32} {count}")
    bound = rest + memory_bound(Settings()) / 1e6
    slowest = max(pulse.times, default=0.0)
    print(
        f"/health/live   {len(pulse.times)} times, at most {1000 * slowest:.0f} ms (bound {1000 * MAX_HEALTH:.0f} ms)"
    )
    print(f"memory         {rest:.0f} MB before, {peak:.0f} MB at most (bound {bound:.0f} MB)")
    if slowest > MAX_HEALTH or pulse.failed:
        failures.append(f"/health/live took up to {slowest:.3f} s and failed {pulse.failed} times")
    if peak > bound:
        failures.append(f"memory was {peak:.0f} MB")
    if wrong := {key: count for key, count in statuses.items() if key[1] == 500}:
        failures.append(f"500: {wrong}")
    if tracebacks := sum("Traceback" in line for line in server.lines):
        failures.append(f"{tracebacks} tracebacks in the log")
    if code:
        failures.append(f"the server ended with {code}")
    failures += [f"{name}: {old:g} before, {new:g} after" for name, (old, new) in differing.items()]
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
