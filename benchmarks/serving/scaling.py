"""The number of devices for N images/s: python -m benchmarks.serving.scaling [--step-ms 20] [--rows 32].

A simulation in virtual time of real Batchers on simulated accelerators: `tick` is called here instead of by the thread,
and each call advances the clock by the accelerator's time. Requests arrive at random, with the steps and guidance of
the other benchmarks; each goes to the batcher with the fewest requests in flight, as in the front before Triton. Prints
Markdown. Network, front and Triton take no time here; docs/scaling.md adds measurements of them.

With --batcher it measures instead the rows/s of one batcher's thread with an engine that takes no time.
"""

import argparse
import heapq
import itertools
import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.serving import tables
from benchmarks.serving.simulated_engine import FLAT_ROWS, STEP_SECONDS, SimulatedEngine
from benchmarks.serving.workload import GUIDANCE, SHORT, Body, arrivals, requests
from benchmarks.serving.workload import program as drawing
from dsd_serve.backends.batcher import Batcher
from dsd_serve.config import PRESETS
from dsd_serve.rows import Array, Decode, Denoise, Row

LOADS = (0.5, 0.8, 0.95)  # of the capacity
SECONDS = 120.0  # simulated time
WARMUP = 20.0  # seconds at the start that do not count
CONFIG = PRESETS["demo"]
Z = np.zeros(CONFIG.latent_shape, np.float32)
STEP, GUIDED_STEP, END = [Denoise(Z, 0.5, 0)], [Denoise(Z, 0.5, 0)] * 2, [Decode(Z)]


class Timed(SimulatedEngine):
    """Returns outputs at once, and records how long the call would have taken."""

    taken = 0.0

    def run(self, rows: Sequence[Row]) -> list[Array]:
        self.taken = self.seconds(len(rows))
        return [Z] * len(rows)


class Stepped(Batcher):
    """A batcher without a thread; `tick` is called from outside."""

    def loop(self) -> None:
        pass


def program(body: Body) -> Generator[list[Row], list[Array], None]:
    """The rows of a request, without the arithmetic."""
    rows: list[Row] = [*(GUIDED_STEP if body["guidance"] == GUIDANCE else STEP)]
    for _ in range(body["steps"]):
        yield rows
    yield [*END]


@dataclass
class Device:
    """One accelerator with its batcher. free_at: end of its current call. in_flight: its number of requests."""

    engine: Timed
    batcher: Stepped
    free_at: float = 0.0
    in_flight: int = 0
    ending: list[tuple[float, bool]] = field(default_factory=list)  # (due, short) of requests that end with this call


@dataclass(frozen=True)
class Outcome:
    """Latencies in seconds, of all requests and of short ones; rate: images/s; rows: mean per call."""

    latencies: Array
    short: Array
    rate: float
    rows: float


def simulate(devices: int, rate: float, step_seconds: float, rows: int, seconds: float = SECONDS) -> Outcome:
    """Simulate Poisson arrivals of `rate` requests/s at this number of devices."""
    pool = [new_device(step_seconds, rows) for _ in range(devices)]
    events: list[tuple[float, int, int]] = []  # time, order, the device whose call ends, or -1 for an arrival
    order = itertools.count()
    coming = iter(arrivals(rate, seconds, range(10)))
    arrival = next(coming, None)
    done: list[tuple[float, float, bool]] = []  # due, latency, short
    while arrival is not None or events:
        if arrival is not None and (not events or arrival.at <= events[0][0]):
            now, chosen = arrival.at, min(pool, key=lambda device: device.in_flight)
            submit(chosen, arrival.at, arrival.body)
            arrival = next(coming, None)
        else:
            now, _, number = heapq.heappop(events)
            chosen = pool[number]
            done += [(due, now - due, short) for due, short in chosen.ending]
            chosen.in_flight -= len(chosen.ending)
            chosen.ending.clear()
        if chosen.in_flight and chosen.free_at <= now:
            chosen.batcher.tick()
            chosen.free_at = now + chosen.engine.taken
            heapq.heappush(events, (chosen.free_at, next(order), pool.index(chosen)))
    for device in pool:
        device.batcher.close()
    counted = [(latency, short) for due, latency, short in done if due >= WARMUP]
    arrived = sum(WARMUP <= due + latency < seconds for due, latency, _ in done)
    return Outcome(
        np.array([latency for latency, _ in counted]),
        np.array([latency for latency, short in counted if short]),
        arrived / (seconds - WARMUP),
        sum(device.batcher.num_rows for device in pool) / sum(device.batcher.num_ticks for device in pool),
    )


def new_device(step_seconds: float, rows: int) -> Device:
    engine = Timed(CONFIG, step_seconds=step_seconds, flat_rows=rows)
    return Device(engine, Stepped(engine, budget=rows, max_waiting=1_000_000))


def submit(device: Device, due: float, body: Body) -> None:
    def ended(_: "Future[Any]") -> None:
        device.ending.append((due, body["steps"] == SHORT))

    device.in_flight += 1
    device.batcher.submit(program(body)).future.add_done_callback(ended)


def capacity(step_seconds: float, rows: int) -> float:
    """Images/s of one device that is never idle and whose calls are full."""
    bodies = [arrival.body for arrival in arrivals(60, 1, range(10))]
    mean = np.mean([sum(map(len, rows_of)) for rows_of in (list(program(body)) for body in bodies)])
    return rows / step_seconds / float(mean)


def table(step_seconds: float, rows: int, numbers: Sequence[int], seconds: float) -> str:
    one = capacity(step_seconds, rows)
    lines = [
        f"A call takes {1000 * step_seconds:g} ms for up to {rows} rows; full calls alone would give {one:.1f} "
        f"images/s per device; {seconds:g} s simulated, the first {WARMUP:g} s do not count.",
        "",
    ]
    measured = []
    for number in numbers:
        for load in LOADS:
            offered = load * one * number
            outcome = simulate(number, offered, step_seconds, rows, seconds)
            p50, p95 = np.percentile(outcome.latencies, [50, 95])
            times = [f"{value:.2f}" for value in (p50, p95, np.percentile(outcome.short, 95))]
            rates = [f"{offered:.0f}", f"{outcome.rate:.0f}"]
            measured.append([str(number), f"{load:.0%}", *rates, *times, f"{outcome.rows:.1f}"])
    header = ["devices", "load", "offered, images/s", "done, images/s", "p50, s", "p95, s", "10 steps: p95, s"]
    return "\n".join([*lines, *tables.table([*header, "rows per call"], measured)])


def needed(step_seconds: float, rows: int, rates: Sequence[float], limit: float, seconds: float) -> str:
    """For each rate, the fewest devices at which 95 % of the requests take at most `limit` seconds."""
    measured = []
    for rate in rates:
        for number in itertools.count(math.ceil(rate / capacity(step_seconds, rows))):
            outcome = simulate(number, rate, step_seconds, rows, seconds)
            p50, p95 = np.percentile(outcome.latencies, [50, 95])
            if p95 <= limit and outcome.rate >= 0.97 * rate:
                measured.append([f"{rate:g}", str(number), f"{p50:.2f}", f"{p95:.2f}"])
                break
            if number > 4 * rate:
                raise SystemExit(f"scaling: no number of devices keeps a p95 of {limit:g} s; raise --p95")
    return "\n".join(tables.table(["images/s", f"devices for a p95 of {limit:g} s", "p50, s", "p95, s"], measured))


class Instant(SimulatedEngine):
    """An engine that takes no time: constant outputs of the right shapes."""

    def run(self, rows: Sequence[Row]) -> list[Array]:
        return [self.pixels if isinstance(row, Decode) else self.latents for row in rows]

    @cached_property
    def latents(self) -> Array:
        return np.zeros(self.config.latent_shape, np.float32)

    @cached_property
    def pixels(self) -> Array:
        return np.zeros(self.config.pixel_shape, np.uint8)


def batcher_rate(preset: str, rows: int, seconds: float) -> float:
    """Rows/s of a real batcher with samplers and an engine that takes no time; twice `rows` programs run."""
    config = PRESETS[preset]
    batcher = Batcher(Instant(config), budget=rows, max_waiting=1000)
    bodies = requests(range(10))
    began, running = time.perf_counter(), [batcher.submit(drawing(config, next(bodies))) for _ in range(2 * rows)]
    while (elapsed := time.perf_counter() - began) < seconds:
        running.pop(0).future.result()
        running.append(batcher.submit(drawing(config, next(bodies))))
    rate = batcher.num_rows / elapsed
    for job in running:
        job.cancel()
    batcher.close()
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--step-ms", type=float, default=1000 * STEP_SECONDS, help="duration of a call (default 20)")
    parser.add_argument("--rows", type=int, default=FLAT_ROWS, help="rows per call of that duration (default 32)")
    parser.add_argument(
        "--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of devices (default 1 2 4 8)"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="simulated time (default 120)")
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 25, 50, 100, 200], help="images/s to plan for")
    parser.add_argument("--p95", type=float, help="limit in seconds for --rates (default: 65 calls; 50 steps take 51)")
    parser.add_argument("--batcher", action="store_true", help="measure the rate of one batcher")
    options = parser.parse_args()
    if options.batcher:
        for preset in ("demo", "dsd-b"):
            print(
                f"{preset}: {batcher_rate(preset, options.rows, 10):.0f} rows/s in ticks of {options.rows}", flush=True
            )
        return
    step, limit = options.step_ms / 1000, options.p95 or 65 * options.step_ms / 1000
    print(table(step, options.rows, options.devices, options.seconds), end="\n\n")
    print(needed(step, options.rows, options.rates, limit, options.seconds))


if __name__ == "__main__":
    main()
