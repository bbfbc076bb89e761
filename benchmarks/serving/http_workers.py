"""HTTP workers: /health and images/s at full load, in turns (python -m benchmarks.serving.http_workers).

Each turn starts dsd-serve, measures the latency of single requests, and then keeps 32 clients of another process busy,
while /health/live is requested ten times a second on new connections.
"""

import argparse
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from benchmarks.serving.overload import start
from dsd_serve.client import Client

CLIENTS = 32
WARMUP = 1.0  # seconds of load before anything is measured


@dataclass
class Measured:
    """The turns of one number of workers. Latencies in seconds, rates in images/s."""

    rates: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


def load(url: str, kind: str, classes: Sequence[int], seconds: float) -> subprocess.Popen[str]:
    order = {"url": url, "kind": kind, "classes": classes, "seconds": seconds, "warmup": WARMUP, "clients": CLIENTS}
    command = [sys.executable, "-m", "benchmarks.serving.load", json.dumps(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, float]:
    printed, _ = process.communicate()
    return json.loads(printed)


def health(url: str) -> float:
    """Seconds for one request on a connection of its own."""
    address = urlsplit(url)
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    connection.request("GET", "/health/live")
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"http_workers: /health/live answered {answer.status}")
    return time.perf_counter() - began


def turn(workers: int, seconds: float, arguments: Sequence[str], measured: Measured) -> None:
    process, url = start(["--http-workers", str(workers), *arguments])
    try:
        classes = list(Client(url).model()["classes"])
        measured.single.append(result_of(load(url, "single", classes, seconds / 2))["p50"])
        under_load = load(url, "closed", classes, seconds)
        began = time.perf_counter()
        while under_load.poll() is None and time.perf_counter() < began + WARMUP + seconds:
            time.sleep(0.1)
            if time.perf_counter() > began + 2 * WARMUP:  # its interpreter takes a while to start
                measured.health.append(health(url))
        measured.rates.append(result_of(under_load)["rate"])
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.http_workers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("arguments", nargs="*", help="further arguments of dsd-serve, after --")
    options = parser.parse_args()
    measured = {workers: Measured() for workers in options.workers}
    for _ in range(options.rounds):
        for workers, one in measured.items():
            turn(workers, options.seconds, options.arguments, one)
    print("| workers | images/s | a single request, ms | /health median, ms | p99 | slowest | requests |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for workers, one in measured.items():
        times = 1000 * np.array(one.health)
        print(
            f"| {workers} | {np.median(one.rates):.1f} | {1000 * np.median(one.single):.1f} | {np.median(times):.1f} | "
            f"{np.percentile(times, 99):.1f} | {times.max():.1f} | {len(times)} |"
        )


if __name__ == "__main__":
    main()
