"""The overhead of HTTP and the batcher over the engine in a plain loop: python -m benchmarks.serving.overhead.

In turns in one run, each in its own process: the engine with sixty programs in lockstep, and a dsd-serve process with
as many clients. Then single requests over HTTP, whose time beyond the network and the PNG is the overhead. The
network's time is the server's own dsd_tick_duration_seconds of the same requests, because a shared machine may run one
process faster than the next.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from benchmarks.serving.load import closed
from benchmarks.serving.overload import start
from benchmarks.serving.workload import Body, program, request, requests
from dsd_serve.backends.row_budget import measure_budget
from dsd_serve.engines import load_engine
from dsd_serve.files import demo_model
from dsd_serve.imaging.codec import write_image
from dsd_serve.programs import run, run_all

ROUNDS = 5


def plain(seconds: float) -> dict[str, float]:
    """Images/s of the engine in a loop, and milliseconds to encode a PNG."""
    engine = load_engine("onnx", demo_model(), flush_denormals=True)
    measure_budget(engine)  # warms up, as the server does
    classes = engine.config.drawable_labels
    bodies = requests(classes)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        # Sixty requests have exactly the mix of steps and guidance, so that all rounds do the same work.
        run_all(engine, [program(engine.config, body) for body in itertools.islice(bodies, 60)])
        count += 60
    pixels = run(engine, program(engine.config, request(classes[0], 0, 25, 1.0)))
    pngs = []
    for _ in range(100):
        began = time.perf_counter()
        write_image(pixels)
        pngs.append(time.perf_counter() - began)
    return {"rate": count / elapsed, "png_ms": 1000 * float(np.median(pngs))}


async def rate_of(url: str, seconds: float) -> float:
    """Images/s over HTTP."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(url + "/model") as answer:
            model = await answer.json()

        async def send(body: Body) -> int:
            async with session.post(url + "/generate", json=body) as answer:
                await answer.read()
                return answer.status

        bodies = list(itertools.islice(requests(model["classes"]), 6000))
        completions = await closed(send, bodies, clients=60, warmup=1.0, seconds=seconds)
        return len(completions) / seconds


@dataclass(frozen=True)
class Single:
    """Median latencies of single requests, in milliseconds.

    whole: at the client. without_engine: less the calls of the engine. without_png: less the time from the first to the
    last tick, by Server-Timing, which also works with an engine in another process.
    """

    whole: float
    without_engine: float
    without_png: float


def singles(url: str, seconds: float) -> Single:
    """Measured with http.client, which has the least overhead of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)

    def send(method: str, path: str, body: Body | None = None) -> tuple[bytes, str]:
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} was answered with {answer.status}: {content[:300]!r}")
        return content, answer.headers.get("Server-Timing", "")

    def engine_ms() -> float:
        """Total time of the engine's calls so far."""
        lines = send("GET", "/metrics")[0].decode().splitlines()
        return 1000 * next(float(one.split()[-1]) for one in lines if one.startswith("dsd_tick_duration_seconds_sum"))

    one = request(json.loads(send("GET", "/model")[0])["classes"][0], 0, 25, 1.0)
    times: list[tuple[float, float, float]] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        before, began = engine_ms(), time.perf_counter()
        _, timing = send("POST", "/generate", one)
        whole = 1000 * (time.perf_counter() - began)
        image = float(timing.partition("network;dur=")[2])
        times.append((whole, whole - engine_ms() + before, whole - image))
    connection.close()
    return Single(*np.median(times, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="duration of each measurement (default 10)")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # the part that runs in its own process
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.seconds)))
        return
    command = [sys.executable, "-m", "benchmarks.serving.overhead", "--plain", "--seconds", str(options.seconds)]
    shares, added = [], []
    for _ in range(ROUNDS):
        loop = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        process, url = start([])
        try:
            rate = asyncio.run(rate_of(url, options.seconds))
            alone = singles(url, options.seconds / 4)
        finally:
            process.terminate()
            process.wait(60)
        shares.append(rate / loop["rate"])
        added.append(alone.without_engine - loop["png_ms"])
        print(
            f"engine {loop['rate']:.1f} images/s, HTTP {rate:.1f}: {shares[-1]:.1%}; single request "
            f"{alone.whole:.2f} ms, of which {added[-1]:.2f} ms are neither network nor PNG",
            flush=True,
        )
    print(f"median of {ROUNDS}: {np.median(shares):.1%} of the engine's rate, {np.median(added):.2f} ms added")


if __name__ == "__main__":
    main()
