"""How busy a fast device is kept: python -m benchmarks.serving.device_busy.

An engine process whose engine is a simulated GPU (simulated_device.py: dsd-s on an H100, 64 rows in 5.4 ms) gets more
tasks than it can do: images of 9 guided steps, 18 rows and a decode each, and a mixture with other programs. Prints the
share of the time in which the device worked, and tasks per second, with one tick at a time and with two. Then dsd-serve
with this device sends JPEGs of 256 x 256 pixels to 64 clients, and the processor time of each process is printed too.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.device_process import BUDGET, BUSY, ONE_AT_A_TIME, write_model
from benchmarks.serving.overload import address, new_session
from benchmarks.serving.tables import cpu_seconds
from dsd_serve.backends.process import process_backend
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_backend import ProcessBackend
from dsd_serve.config import PRESETS
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Edit, Generate, Task

MODULE = "benchmarks.serving.device_process"
UNDER_WAY = 256  # tasks
CLIENTS = 64
WARM_UP = 2.0  # seconds
IMAGE = SamplingParams(num_steps=9, guidance_scale=2.0, sampler="euler")


def images() -> Iterator[Task]:
    """Images of 9 guided steps."""
    return itertools.repeat(Generate(207, IMAGE))


def mixture() -> Iterator[Task]:
    """Images of several step counts and samplers, with and without guidance, and edits."""
    pixels = np.zeros(PRESETS["dsd-s"].pixel_shape, np.uint8)
    return itertools.cycle(
        [
            Generate(207, IMAGE),
            Generate(1, SamplingParams(num_steps=25, sampler="euler")),
            Generate(2, SamplingParams(num_steps=8, guidance_scale=3.0, sampler="heun")),
            Edit(pixels, 3, IMAGE, 0.6),
        ]
    )


LOADS: dict[str, Callable[[], Iterator[Task]]] = {"images of 9 guided steps": images, "mixed programs": mixture}


class Window:
    """What the device did from the making of this object to `share`."""

    def __init__(self, model: Path) -> None:
        self.file = model / BUSY
        self.first = self.read()

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def share(self) -> str:
        last = self.read()
        busy, ticks, rows, seconds = (last[name] - self.first[name] for name in ("busy", "ticks", "rows", "at"))
        return f"busy {busy / seconds:5.1%}, {rows / ticks:.0f} rows a tick"


def through_process(tasks: Iterator[Task], engine: str, seconds: float) -> str:
    """The share and the rate of an engine process."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, IMAGE)
        process_backend.MODULE = MODULE
        backend = ProcessBackend(EngineSettings(str(model), engine, row_budget=BUDGET))
        jobs = deque(backend.submit_tasks(list(itertools.islice(tasks, UNDER_WAY))))

        def pump(until: float) -> int:
            done = 0
            while time.monotonic() < until:
                jobs.popleft().future.result()
                done += 1
                jobs.extend(backend.submit_tasks([next(tasks)]))
            return done

        pump(time.monotonic() + WARM_UP)
        window, began = Window(model), time.monotonic()
        done = pump(began + seconds)
        rate, share = done / (time.monotonic() - began), window.share()
        backend.close(0)
    return f"{share}, {rate:.0f} tasks/s"


def through_http(seconds: float) -> str:
    """The share and the rate of dsd-serve with JPEGs, and the processor time of each process for an image."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, IMAGE)
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(model)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        try:
            url = address(process)
            return asyncio.run(load(url, process.pid, model, seconds))
        finally:
            process.terminate()
            process.communicate(timeout=60)


async def load(url: str, server: int, model: Path, seconds: float) -> str:
    done = 0

    async def client() -> None:
        nonlocal done
        while True:
            async with session.get(url + "/generate?class=207&format=jpeg") as answer:
                if answer.status != 200:
                    sys.exit(f"device_busy: the server answered with {answer.status}: {await answer.text()}")
                await answer.read()
                done += 1

    async with new_session() as session:
        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        await asyncio.sleep(WARM_UP)
        children = [one for file in Path(f"/proc/{server}/task").glob("*/children") for one in file.read_text().split()]
        pids = {"server": str(server), "engine process": children[0], "clients": "self"}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        window, first, began = Window(model), done, time.monotonic()
        await asyncio.sleep(seconds)
        took, count = time.monotonic() - began, done - first
        spent = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
        share = window.share()
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    of_each = ", ".join(f"{name} {1000 * value / count:.2f} ms" for name, value in spent.items())
    cores = sum(spent.values()) / took
    return f"{share}, {count / took:.0f} images/s; processor time of an image: {of_each}; {cores:.1f} cores in all"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.device_busy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (8)")
    options = parser.parse_args()
    for name, tasks in LOADS.items():
        for engine, ticks in ((ONE_AT_A_TIME, "one tick at a time"), ("tensorrt", "two ticks at a time")):
            print(f"{name}, {ticks}: {through_process(tasks(), engine, options.seconds)}", flush=True)
    print(f"over HTTP, two ticks at a time: {through_http(options.seconds)}")


if __name__ == "__main__":
    main()
