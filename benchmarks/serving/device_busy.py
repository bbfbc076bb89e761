"""How busy a fast device is kept: python -m benchmarks.serving.device_busy.

An engine process whose engine is a simulated GPU (simulated_device.py: dsd-s on an H100, 64 rows in 5.4 ms) gets more
tasks than it can do: images of 9 guided steps (18 rows and a decode), alone and mixed with other programs. Prints the
share of the time in which the device worked, and images per second, with one tick at a time and with two.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.simulated_device import SimulatedDevice, SimulatedStream
from dsd_serve import engine_process, loading
from dsd_serve.backends.process import child_process
from dsd_serve.backends.process.engine_messages import EngineSettings, Status
from dsd_serve.backends.process.process_backend import ProcessBackend
from dsd_serve.checkpoint import config_json, read_model_dir
from dsd_serve.config import PRESETS
from dsd_serve.model import Model
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Edit, Generate, Task

BUDGET = 64
UNDER_WAY = 256  # tasks
WARM_UP = 2.0  # seconds
DEPTH, BUSY = "DSD_BENCH_DEPTH", "DSD_BENCH_BUSY"  # the number of ticks, and the file for the busy seconds
IMAGE = SamplingParams(num_steps=9, guidance_scale=2.0, sampler="euler")


def images() -> Iterator[Task]:
    """Images of 9 guided steps."""
    while True:
        yield Generate(207, IMAGE)


def mixture() -> Iterator[Task]:
    """Images of other step counts, with and without guidance, and edits among them."""
    pixels = np.zeros(PRESETS["dsd-s"].pixel_shape, np.uint8)
    while True:
        yield Generate(207, IMAGE)
        yield Generate(1, SamplingParams(num_steps=25, sampler="euler"))
        yield Generate(2, SamplingParams(num_steps=8, guidance_scale=3.0, sampler="heun"))
        yield Edit(pixels, 3, SamplingParams(num_steps=9, guidance_scale=2.0), 0.6)


LOADS: dict[str, Callable[[], Iterator[Task]]] = {"images of 9 guided steps": images, "mixed programs": mixture}


def measure(tasks: Iterator[Task], depth: int, seconds: float) -> tuple[float, float, int]:
    """The busy share of the device, images per second, and rows a tick."""
    with tempfile.TemporaryDirectory() as folder:
        model, busy = Path(folder) / "model", Path(folder) / "busy"
        model.mkdir()
        (model / "config.json").write_text(config_json("dsd-s", PRESETS["dsd-s"], IMAGE))
        (model / "model.onnx").touch()  # only its sha256 is taken
        os.environ |= {DEPTH: str(depth), BUSY: str(busy)}
        child_process.MODULE = "benchmarks.serving.device_busy"
        backend = ProcessBackend(EngineSettings(str(model), "onnx", "cpu", "fp32", 1, BUDGET))
        jobs = deque(backend.submit_tasks([next(tasks) for _ in range(UNDER_WAY)]))

        def pump(until: float) -> int:
            done = 0
            while time.monotonic() < until:
                jobs.popleft().future.result()
                done += 1
                jobs.extend(backend.submit_tasks([next(tasks)]))
            return done

        pump(time.monotonic() + WARM_UP)
        first, began = json.loads(busy.read_text()), time.monotonic()
        done = pump(began + seconds)
        last, took = json.loads(busy.read_text()), time.monotonic() - began
        backend.close(0)
    rows = (last["rows"] - first["rows"]) / (last["ticks"] - first["ticks"])
    return (last["busy"] - first["busy"]) / (last["at"] - first["at"]), done / took, round(rows)


def main() -> None:
    if os.environ.get(DEPTH) and not sys.stdin.isatty() and len(sys.argv) == 1:
        run_engine_process()
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.device_busy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (8)")
    options = parser.parse_args()
    for name, tasks in LOADS.items():
        for depth in (1, 2):
            share, rate, rows = measure(tasks(), depth, options.seconds)
            print(f"{name}, {depth} at a time: busy {share:.1%}, {rate:.0f} tasks/s, {rows} rows a tick", flush=True)


def run_engine_process() -> None:
    """The engine process with the simulated device."""
    kind = SimulatedStream if os.environ[DEPTH] == "2" else SimulatedDevice
    os.environ.pop(DEPTH)
    file = Path(os.environ[BUSY])

    class Reporting(engine_process.EngineProcess):
        """Writes how busy the device was with each status."""

        def status(self) -> Status:
            status = super().status()
            if self.batcher is not None:
                device = self.batcher.engine
                assert isinstance(device, SimulatedDevice)
                values = {
                    "busy": device.busy,
                    "at": time.monotonic(),
                    "ticks": status.num_ticks,
                    "rows": status.num_rows,
                }
                part = file.with_suffix(".part")
                part.write_text(json.dumps(values))
                part.replace(file)
            return status

    def load(model: str, **options: Any) -> Model:
        options = {name: value for name, value in options.items() if name in ("row_budget", "observer")}
        return loading.load(model, kind(read_model_dir(Path(model)).config), **options)

    vars(engine_process).update(load=load, EngineProcess=Reporting)
    engine_process.main()


if __name__ == "__main__":
    main()
