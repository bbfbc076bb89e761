"""The overhead of Triton on the same machine: python -m benchmarks.serving.through_triton [--requests 10000].

1. In turns, in fresh processes: the embedded server, and the same front before Triton. Images/s with 60 clients and the
   mixed load of the other benchmarks, and the median latency of single requests.
2. Many short requests of all kinds through Triton: after a tenth of them, the memory of front, Triton and its backend
   must stay level within 5 %. The embedded server handles a fifth as many, to compare processor time.
Exits with 1 if memory grows. Everything runs on this machine, including the clients.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.serving.overhead import Single, rate_of, singles
from benchmarks.serving.overload import MEMORY_SLACK, resident_mb, start
from benchmarks.serving.tables import cpu_seconds
from dsd_serve.files import demo_model
from dsd_serve.imaging.codec import write_image
from tools.tritonserver import TritonMissing, TritonServer, write_repository

ROUNDS = 5
CLIENTS = 16
PNG = write_image(np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8))


async def until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(url + "/health/ready") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.1)


def rate_and_latency(arguments: list[str], seconds: float) -> tuple[float, Single]:
    """Images/s and latencies of a dsd-serve process with these arguments."""
    process, url = start(arguments)
    try:
        asyncio.run(until_ready(url))
        return asyncio.run(rate_of(url, seconds)), singles(url, seconds / 4)
    finally:
        process.terminate()
        process.wait(60)


def compare(repository: Path, seconds: float) -> None:
    shares, added = [], []
    for number in range(ROUNDS):
        embedded, here = rate_and_latency([], seconds)
        with TritonServer(repository, repository.with_name("log")) as triton:
            through, there = rate_and_latency(["--triton", triton.grpc], seconds)
        shares.append(through / embedded)
        added.append(there.without_png - here.without_png)
        print(
            f"round {number + 1}: embedded {embedded:.1f} images/s, through Triton {through:.1f}: {shares[-1]:.1%}; "
            f"single request {here.whole:.2f} ms, {there.whole:.2f} ms; without the network {added[-1]:.2f} ms more",
            flush=True,
        )
    print(f"median of {ROUNDS}: {np.median(shares):.1%} of the embedded rate, {np.median(added):.2f} ms added")


async def flood(url: str, count: int, pids: dict[str, int]) -> dict[str, list[float]]:
    """Send `count` requests; returns fifty samples of the memory of each process, in MB."""
    memory: dict[str, list[float]] = {name: [] for name in pids}
    numbers = iter(range(count))
    every = max(1, count // 50)

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            await send(session, url, number)
            if number % every == every - 1:
                for name, pid in pids.items():
                    memory[name].append(resident_mb(pid))

    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    seconds = time.perf_counter() - began
    print(f"{count} requests in {seconds:.0f} s, {count / seconds:.0f}/s, all answered with 200", flush=True)
    spent = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    per_request = ", ".join(f"{name} {1000 * spent[name] / count:.2f}" for name in pids)
    print(f"processor time per request in ms: {per_request}", flush=True)
    return memory


async def send(session: aiohttp.ClientSession, url: str, number: int) -> None:
    """Send one request, of four kinds in turn: generate, generate with previews, encode, reconstruct."""
    query = {"class": "207", "seed": str(number), "steps": "2", "sampler": "euler"}
    kind = number % 4
    if kind < 2:
        more = {"format": "events", "preview_every": "1"} if kind else {}
        answering = session.get(url + "/generate", params=query | more)
    else:
        answering = session.post(url + ("/encode", "/reconstruct")[kind - 2], data=PNG)
    async with answering as answer:
        body = await answer.read()
        if answer.status != 200 or (kind == 1 and b"event: image" not in body):
            raise SystemExit(f"through_triton: request {number} was answered with {answer.status}: {body[:300]!r}")


def embedded_for_comparison(count: int) -> None:
    """Print the processor time of the embedded server for the same kinds of requests."""
    process, url = start([])
    try:
        asyncio.run(flood(url, count, {"embedded server": process.pid}))
    finally:
        process.terminate()
        process.wait(60)


def endure(repository: Path, count: int) -> bool:
    """Whether memory stays level."""
    with TritonServer(repository, repository.with_name("log")) as triton:
        process, url = start(["--triton", triton.grpc])
        try:
            asyncio.run(until_ready(url))
            pids = {"front": process.pid, "Triton": triton.pid, "backend": triton.backends[0]}
            memory = asyncio.run(flood(url, count, pids))
        finally:
            process.terminate()
            process.wait(60)
    flat = True
    for name, values in memory.items():
        level, rest = float(np.median(values[5:10])), values[10:]  # after a tenth; the next tenth is the level
        holds = max(rest) <= MEMORY_SLACK * level
        flat = flat and holds
        print(
            f"{'ok   ' if holds else 'FAILS'} memory of {name}: first {values[0]:.0f} MB, level {level:.0f} MB, then "
            f"{max(rest):.0f} at most and {values[-1]:.0f} at the end ({values[-1] / level - 1:+.1%})"
        )
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.through_triton", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--requests", type=int, default=10_000, help="requests of the second part, 0 to skip it (default 10000)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="duration of each rate, 0 to skip the first part (default 10)"
    )
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            repository = Path(folder) / "repository"
            write_repository(demo_model(), repository)
            if options.seconds:
                compare(repository, options.seconds)
            if options.requests:
                embedded_for_comparison(options.requests // 5)
            flat = not options.requests or endure(repository, options.requests)
    except TritonMissing as error:
        sys.exit(f"through_triton: {error}")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
