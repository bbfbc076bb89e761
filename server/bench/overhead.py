"""python -m server.bench.overhead: what HTTP and the batcher cost, beside the engine in a plain loop.

Takes turns in one run, each in a process of its own: the engine running programs in lockstep, as many at once as the
server has rows in a tick, and a dsd-serve process with as many clients. Then single requests: over HTTP, and the same
program and PNG in a loop.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time

import aiohttp
import numpy as np

from dsd_serve.batcher import measure_budget
from dsd_serve.engines import load_engine
from dsd_serve.images import write_image
from dsd_serve.programs import run, run_all
from server.bench.load import closed, single
from server.bench.overload import start
from server.bench.workload import Body, program, request, requests
from server.settings import demo_model

ROUNDS = 3


def plain(seconds: float, single_seconds: float) -> dict[str, float]:
    """Images a second of the engine in a loop, and the milliseconds of a single program and of its PNG."""
    engine = load_engine("onnx", demo_model(), flush_denormals=True)
    budget, _, _ = measure_budget(engine)
    classes = engine.config.trained_classes
    bodies = requests(classes)
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        # Sixty requests have the mix of steps and guidance exactly, so that no round is luckier than another.
        run_all(engine, [program(engine.config, body) for body in itertools.islice(bodies, 60)])
        count += 60
    one = request(classes[0], 0, 25, 1.0)
    runs, pngs = [], []
    deadline = time.perf_counter() + single_seconds
    while time.perf_counter() < deadline:
        began = time.perf_counter()
        pixels = run(engine, program(engine.config, one))
        middle = time.perf_counter()
        write_image(pixels)
        runs.append(middle - began)
        pngs.append(time.perf_counter() - middle)
    return {
        "rate": count / elapsed,
        "budget": budget,
        "network_ms": 1000 * float(np.median(runs)),
        "png_ms": 1000 * float(np.median(pngs)),
    }


async def served(url: str, seconds: float, single_seconds: float) -> dict[str, float]:
    """The same over HTTP."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(url + "/model") as answer:
            model = await answer.json()

        async def send(body: Body) -> int:
            async with session.post(url + "/generate", json=body) as answer:
                await answer.read()
                return answer.status

        bodies = list(itertools.islice(requests(model["classes"]), 6000))
        completions = await closed(send, bodies, clients=60, warmup=1.0, seconds=seconds)
        latencies = await single(send, request(model["classes"][0], 0, 25, 1.0), single_seconds)
        return {"rate": len(completions) / seconds, "single_ms": 1000 * float(np.median(latencies))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m server.bench.overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default 10)")
    parser.add_argument(
        "--plain", action="store_true", help=argparse.SUPPRESS
    )  # what this starts in a process of its own
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.seconds, options.seconds / 4)))
        return
    command = [sys.executable, "-m", "server.bench.overhead", "--plain", "--seconds", str(options.seconds)]
    shares, added = [], []
    for _ in range(ROUNDS):
        loop = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        process, url = start([])
        try:
            http = asyncio.run(served(url, options.seconds, options.seconds / 4))
        finally:
            process.terminate()
            process.wait(60)
        shares.append(http["rate"] / loop["rate"])
        added.append(http["single_ms"] - loop["network_ms"] - loop["png_ms"])
        print(
            f"engine {loop['rate']:.1f} images/s, HTTP {http['rate']:.1f}: {shares[-1]:.1%}; single request "
            f"{http['single_ms']:.2f} ms, network {loop['network_ms']:.2f} and PNG {loop['png_ms']:.2f}: "
            f"{added[-1]:.2f} ms added",
            flush=True,
        )
    print(f"median of {ROUNDS}: {np.median(shares):.1%} of the engine's rate, {np.median(added):.2f} ms added")


if __name__ == "__main__":
    main()
