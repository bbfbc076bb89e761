"""The load generator, a separate process: python -m benchmarks.serving.load '{"url": ..., "kind": ...}' prints JSON.

Three kinds of load: `poisson` is open-loop, requests are sent at their due times whatever the answers; `closed` keeps a
number of clients busy, for the highest throughput; `single` is one client with one kind of request.

Latency is measured from the due time of a request. A request without a good answer has infinite latency, so that
dropped requests do not improve percentiles.
"""

import asyncio
import itertools
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np

from benchmarks.serving.workload import SHORT, Arrival, Body, arrivals, request, requests

DRAIN = 5.0  # seconds after the last arrival in which answers still count
PNG = b"\x89PNG\r\n\x1a\n"

Send = Callable[[Body], Awaitable[int]]


@dataclass(frozen=True)
class Outcome:
    """One request. at: due time, s. status: HTTP status, 0 without an answer. latency: s, or infinity."""

    at: float
    steps: int
    status: int
    latency: float


@dataclass(frozen=True)
class Summary:
    """Results of the requests that were due after the warm-up; latencies in seconds.

    throughput: images/s received in the measured seconds. refused: answers other than 200. unfinished: not answered
    `DRAIN` seconds after the last arrival. short: the requests of 10 steps. thirds: median latencies of the first and
    the last third.
    """

    offered: int
    completed: int
    refused: int
    unfinished: int
    throughput: float
    p50: float
    p95: float
    p99: float
    short_p50: float
    short_p95: float
    short_p99: float
    thirds: tuple[float, float]

    @property
    def sustained(self) -> bool:
        """Whether the server kept up: 97 % answered, and latency hardly rose from the first to the last third."""
        first, last = self.thirds
        return self.completed >= 0.97 * self.offered and last <= 1.5 * first + 0.1

    @property
    def lost(self) -> int:
        return self.offered - self.completed


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; NaN if there are none. Values may be infinite."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if len(values) else math.nan


def summarise(outcomes: Sequence[Outcome], warmup: float, seconds: float) -> Summary:
    due = sorted((o for o in outcomes if o.at >= warmup), key=lambda o: o.at)
    everything = [o.latency for o in due]
    short = [o.latency for o in due if o.steps == SHORT]
    third = len(due) // 3
    arrived = sum(warmup <= o.at + o.latency < warmup + seconds for o in outcomes)
    return Summary(
        offered=len(due),
        completed=sum(o.status == 200 for o in due),
        refused=sum(o.status not in (0, 200) for o in due),
        unfinished=sum(o.status == 0 for o in due),
        throughput=arrived / seconds,
        p50=percentile(everything, 50),
        p95=percentile(everything, 95),
        p99=percentile(everything, 99),
        short_p50=percentile(short, 50),
        short_p95=percentile(short, 95),
        short_p99=percentile(short, 99),
        thirds=(percentile(everything[:third], 50), percentile(everything[-third:], 50)),
    )


def rate_of(completions: Sequence[float], seconds: float) -> float:
    """Completions per second in a window of `seconds`. completions: their times since its start.

    The mean count over the last third of the window minus that over the first third, divided by the time between them.
    A plain count would be off by up to one batch where answers come in batches.
    """
    times, third = np.array(completions), seconds / 3

    def mean_number(begin: float, end: float) -> float:
        return float(np.clip(end - times, 0, end - begin).sum()) / (end - begin)

    return (mean_number(2 * third, seconds) - mean_number(0, third)) / (2 * third)


async def poisson(send: Send, due: Sequence[Arrival]) -> list[Outcome]:
    """Send every request at its due time; requests without an answer DRAIN seconds after the last are given up."""
    began = time.perf_counter()
    outcomes: dict[int, Outcome] = {}

    async def one(number: int, arrival: Arrival) -> None:
        status = await send(arrival.body)
        latency = time.perf_counter() - began - arrival.at if status == 200 else math.inf
        outcomes[number] = Outcome(arrival.at, arrival.body["steps"], status, latency)

    tasks = []
    for number, arrival in enumerate(due):
        await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number, arrival)))
    _, late = await asyncio.wait(tasks, timeout=DRAIN)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    unfinished = [Outcome(a.at, a.body["steps"], 0, math.inf) for n, a in enumerate(due) if n not in outcomes]
    return [*outcomes.values(), *unfinished]


async def closed(send: Send, bodies: Sequence[Body], clients: int, warmup: float, seconds: float) -> list[float]:
    """Keep `clients` requests in flight; returns the times after the warm-up at which images arrived.

    Returns after the last answers, so that the server is idle again.
    """
    began = time.perf_counter()
    completions = []
    queue = itertools.cycle(bodies)

    async def client() -> None:
        while time.perf_counter() - began < warmup + seconds:
            status = await send(next(queue))
            now = time.perf_counter() - began
            if status == 200 and warmup <= now < warmup + seconds:
                completions.append(now - warmup)

    await asyncio.gather(*(client() for _ in range(clients)))
    return completions


async def single(send: Send, body: Body, seconds: float) -> list[float]:
    """Latencies of one request at a time, without the first, which warms up."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(latencies) < 3:
        began = time.perf_counter()
        if await send(body) != 200:
            raise RuntimeError("a single request was not answered with an image")
        latencies.append(time.perf_counter() - began)
    return latencies[1:]


async def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out an order. Keys: url, kind, classes, seconds, warmup, and rate (poisson) or clients (closed)."""
    kind, classes, seconds, warmup = order["kind"], order["classes"], order["seconds"], order["warmup"]
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def send(body: Body) -> int:
            try:
                async with session.post(order["url"] + "/generate", json=body) as answer:
                    content = await answer.read()
            except aiohttp.ClientError:
                return 503  # a broken connection counts as a refusal
            return answer.status if answer.status != 200 or content.startswith(PNG) else 500

        if kind == "poisson":
            due = arrivals(order["rate"], warmup + seconds, classes)
            return asdict(summarise(await poisson(send, due), warmup, seconds))
        if kind == "closed":
            bodies = list(itertools.islice(requests(classes), 6000))
            completions = await closed(send, bodies, order["clients"], warmup, seconds)
            return {"rate": rate_of(completions, seconds), "completed": len(completions)}
        latencies = await single(send, request(classes[0], 0, 25, 1.0), seconds)
        return {"p50": percentile(latencies, 50), "p95": percentile(latencies, 95), "count": len(latencies)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(json.loads(sys.argv[1])))))
