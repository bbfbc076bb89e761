"""The rate of dsd-generate against the engine in a plain loop: python -m benchmarks.bulk_rate.

Both draw images of the same settings, in turns in one process, each with an engine of its own; the best round of each
counts, so that a moment in which the machine was busy does not decide. The plain loop keeps the pixels and nothing
else. dsd-generate also encodes them, with their settings, and writes them to the disk.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsd_serve.engines import load_engine
from dsd_serve.errors import DSDError
from dsd_serve.files import demo_model
from dsd_serve.loading import load
from dsd_serve.model import Model
from dsd_serve.programs import run_all
from dsd_serve.rows import Engine
from dsd_serve.shell.arguments import MANY
from dsd_serve.shell.bulk import generate_shard, output_of
from dsd_serve.shell.sample_set import SampleSet, Shard

TOGETHER = (32, 64)  # images in lockstep in the plain loop; the better number counts
OUTPUTS = ("samples", "samples.npz", "samples-%05d.tar")


class Best:
    """The best rates of rounds: images per second, and per second of the processor, which a busy machine hardly
    changes."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    @contextlib.contextmanager
    def round(self, count: int) -> Iterator[None]:
        began = time.perf_counter(), time.process_time()
        yield
        self.wall = max(self.wall, count / (time.perf_counter() - began[0]))
        self.processor = max(self.processor, count / (time.process_time() - began[1]))


def plain(engine: Engine, samples: SampleSet, together: int) -> None:
    """The engine in a loop that draws `together` images in lockstep."""
    tasks = [samples.sample(number).task for number in range(len(samples))]
    for start in range(0, len(tasks), together):
        run_all(engine, [task.program(engine.config) for task in tasks[start : start + together]])


def bulk(model: Model, samples: SampleSet, target: Path) -> None:
    """dsd-generate into an output."""
    generate_shard(model, samples, Shard(), output_of(str(target), Shard(), 1000), None)


def bench(model_dir: Path, per_class: int, rounds: int, threads: int) -> str:
    """Measure, and return the report."""
    with (
        load(model_dir, threads=threads, row_budget=MANY) as model,
        # In a thread of its own, because flushing denormals applies to the whole thread.
        ThreadPoolExecutor(1) as thread,
        # Kept to the end: ext4 takes 0.5 ms of the processor to make a file shortly after others were deleted.
        tempfile.TemporaryDirectory() as folder,
    ):
        engine = thread.submit(load_engine, "onnx", model_dir, num_threads=threads, flush_denormals=True).result()
        samples = SampleSet(tuple(model.classes), per_class, model.info.defaults)
        loops, ours = {together: Best() for together in TOGETHER}, {name: Best() for name in OUTPUTS}
        for _ in range(rounds):
            for together, best in loops.items():
                with best.round(len(samples)):
                    thread.submit(plain, engine, samples, together).result()
            for name, best in ours.items():
                with best.round(len(samples)):
                    bulk(model, samples, Path(tempfile.mkdtemp(dir=folder)) / name)
    wall = max(best.wall for best in loops.values())
    processor = max(best.processor for best in loops.values())
    lines = [
        f"{len(samples)} images a round, {rounds} rounds, {threads} threads, {MANY} rows a tick; best rounds",
        f"{'':24} images/s         images/s of the processor",
    ]
    for name, best in {**{f"engine, {n} in lockstep": best for n, best in loops.items()}, **ours}.items():
        shares = best.wall / wall, best.processor / processor
        lines.append(f"{name:24} {best.wall:8.1f} {shares[0]:5.0%}   {best.processor:8.1f} {shares[1]:5.0%}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk_rate", description=__doc__)
    parser.add_argument("--model", type=Path, default=demo_model(), help="a model directory (default: the demo)")
    parser.add_argument("--per-class", type=int, default=40, help="images of each class in a round (40)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of the engine")
    options = parser.parse_args(arguments)
    try:
        print(bench(options.model, options.per_class, options.rounds, options.threads))
    except DSDError as error:
        sys.exit(f"bulk_rate: {error}")


if __name__ == "__main__":
    main()
