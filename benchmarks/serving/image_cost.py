"""The processor time of an image by part: python -m benchmarks.serving.image_cost.

    network    calls of the engine, with the batches that 16 clients cause
    batcher    queue, ticks and programs, on an engine whose outputs are ready
    encoding   scaling, and from pixels to the bytes of a PNG file
    HTTP       connection, validation, answer, metrics and log: the server's time on that engine, less the two above

Processor time changes less than wall time on a busy machine. The best of several rounds counts, for each part.
"""

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import uvicorn

from benchmarks.serving.overload import address, new_session
from benchmarks.serving.tables import cpu_seconds
from dsd_serve.backends.batcher import Batcher
from dsd_serve.checkpoint import ModelDir, read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines import load_engine
from dsd_serve.files import demo_model
from dsd_serve.imaging import codec
from dsd_serve.params import to_api
from dsd_serve.programs import Generate, run_all
from dsd_serve.rows import Array, Decode, Engine, Row
from server.app import create_app
from server.service import Service
from server.settings import Settings

CLIENTS = 16
WARM_UP = 32  # images
MAX_SIZE = 1024


class ReadyEngine:
    """An engine whose outputs are ready: the same arrays for all rows of a kind."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.z_hat, self.pixels = np.zeros(config.latent_shape, np.float32), np.zeros(config.pixel_shape, np.uint8)

    def run(self, rows: Sequence[Row]) -> list[Array]:
        return [self.pixels if isinstance(row, Decode) else self.z_hat for row in rows]

    def describe(self) -> dict[str, str]:
        return {"engine": "ready", "device": "none", "precision": "fp32", "version": "0"}


class Recorder:
    """An engine that keeps the batches of another."""

    def __init__(self, engine: Engine) -> None:
        self.config, self.engine = engine.config, engine
        self.batches: list[Sequence[Row]] = []

    def run(self, rows: Sequence[Row]) -> list[Array]:
        self.batches.append(rows)
        return self.engine.run(rows)

    def describe(self) -> dict[str, str]:
        return self.engine.describe()


def tasks_of(model: ModelDir, count: int) -> list[Generate]:
    """Images of all classes with the recommended settings."""
    labels = model.config.drawable_labels
    return [Generate(labels[i % len(labels)], replace(model.defaults, seed=i)) for i in range(count)]


def milliseconds(work: Callable[[], object], count: int) -> float:
    """Processor milliseconds of this process for each of `count` images."""
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began) / count


def through_batcher(engine: Engine, tasks: Sequence[Generate], budget: int) -> float:
    """Processor milliseconds of a batcher on `engine` for each image."""
    batcher = Batcher(engine, budget=budget)

    def draw() -> None:
        for first in range(0, len(tasks), CLIENTS):
            for job in batcher.submit_tasks(tasks[first : first + CLIENTS]):
                job.future.result()

    try:
        return milliseconds(draw, len(tasks))
    finally:
        batcher.close()


async def through_server(url: str, pid: int, tasks: Sequence[Generate], size: int) -> float:
    """Processor milliseconds of a server for each image."""
    async with new_session() as session:

        async def draw(todo: list[Generate]) -> None:
            while todo:
                task = todo.pop()
                query = {"class": task.label, **to_api(task.params), "size": size}
                async with session.get(url + "/generate", params=query) as answer:
                    if answer.status != 200:
                        sys.exit(f"image_cost: the server answered with {answer.status}: {await answer.text()}")
                    await answer.read()

        await asyncio.gather(*[draw(list(tasks[:WARM_UP])) for _ in range(2)])
        todo, before = list(tasks), cpu_seconds(pid)
        await asyncio.gather(*[draw(todo) for _ in range(CLIENTS)])
        return 1000 * (cpu_seconds(pid) - before) / len(tasks)


def parts(path: Path, count: int, size: int, budget: int) -> dict[str, float]:
    """Processor milliseconds of an image by part."""
    model = read_model_dir(path)
    tasks, side = tasks_of(model, count), size or model.config.image_size
    ready, real = ReadyEngine(model.config), load_engine("onnx", path, flush_denormals=True)
    with serving(path, budget) as (process, url):
        server = asyncio.run(through_server(url, process.pid, tasks, side))
    batcher = through_batcher(ready, tasks, budget)
    recorder = Recorder(ready)
    through_batcher(recorder, tasks, budget)
    real.run(recorder.batches[0])
    network = milliseconds(lambda: [real.run(batch) for batch in recorder.batches], count)
    drawn = run_all(real, [task.program(model.config) for task in tasks[:CLIENTS]])
    settings = json.dumps(to_api(tasks[0].params))

    def encode() -> None:
        for number in range(count):
            codec.encode(codec.resized(drawn[number % CLIENTS], side), "png", settings)

    encoding = milliseconds(encode, count)
    return {"network": network, "batcher": batcher, "encoding": encoding, "HTTP": server - batcher - encoding}


@contextlib.contextmanager
def serving(path: Path, budget: int) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server on an engine whose outputs are ready, and its address."""
    command = [sys.executable, "-m", "benchmarks.serving.image_cost", "--serve", "--model", str(path)]
    process = subprocess.Popen(
        [*command, "--row-budget", str(budget)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        yield process, address(process)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def serve(path: Path, budget: int) -> None:
    settings = Settings(model=(str(path),), row_budget=budget, max_size=MAX_SIZE)
    service = Service(settings, ReadyEngine(read_model_dir(path).config))
    uvicorn.run(create_app(service), host="127.0.0.1", port=0, access_log=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.image_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=demo_model(), help="a model directory (default: the demo)")
    parser.add_argument("--images", type=int, default=400, help="images of a round (400)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=0, help="side of the images in pixels (default: the model's)")
    parser.add_argument("--row-budget", type=int, default=32)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the part in its own process
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.row_budget)
        return
    rounds = [parts(options.model, options.images, options.size, options.row_budget) for _ in range(options.rounds)]
    best = {name: min(found[name] for found in rounds) for name in rounds[0]}
    for name, value in best.items():
        print(f"{name:10} {value:7.2f} ms {value / sum(best.values()):6.1%}")
    print(f"{'whole':10} {sum(best.values()):7.2f} ms")


if __name__ == "__main__":
    main()
