"""The speed of the engines against the matrix-product rate of the CPU: python -m benchmarks.engine_speed.

Measures, in turns in one run, the float32 matrix-product rate of the machine (numpy's BLAS, the better of the network's
shapes and a large square), and the ONNX engine and eager torch on the same denoise rows. Rates count only the
multiplications and additions of the network's matrix products.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dsd_serve.config import PRESETS, ModelConfig, mlp_size
from dsd_serve.engines import Engine, load_engine
from dsd_serve.errors import DSDError, EngineUnavailableError
from dsd_serve.rows import Array, Denoise, Row

ROUNDS = 12
ENGINES = ("onnx", "torch")  # engines that run on a CPU


def denoise_rows(config: ModelConfig, count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    labels = config.drawable_labels
    return [
        Denoise(
            rng.standard_normal(config.latent_shape, dtype=np.float32), float(rng.random()), labels[i % len(labels)]
        )
        for i in range(count)
    ]


def product(n: int, k: int, m: int, flops: int) -> tuple[Callable[[], object], int]:
    """A function that repeats a float32 product [n, k] x [k, m] to about `flops` operations, and their exact number."""
    rng = np.random.default_rng(0)
    a, b = rng.random((n, k), np.float32), rng.random((k, m), np.float32)
    out = np.empty((n, m), np.float32)
    repeats = max(1, round(flops / (2 * n * k * m)))

    def multiply() -> None:
        for _ in range(repeats):
            np.matmul(a, b, out=out)

    return multiply, repeats * 2 * n * k * m


def best_rates(tasks: dict[str, tuple[Callable[[], object], int]], rounds: int = ROUNDS) -> dict[str, float]:
    """The best of several rounds of each task, in turns: name -> floating-point operations per second."""
    best = dict.fromkeys(tasks, float("inf"))
    for run, _ in tasks.values():
        run()
    for _ in range(rounds):
        for name, (run, _) in tasks.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: flops / best[name] for name, (_, flops) in tasks.items()}


def untrained(preset: str, folder: Path) -> Path:
    """Export a model directory of a preset with random weights."""
    command = [sys.executable, "-m", "export", "--untrained", preset, "-o", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineUnavailableError(
            f"dsd-export --untrained {preset} failed; use --model DIR instead: {done.stderr.strip()[-300:]}"
        )
    return folder


def bench(model_dir: Path, num_rows: int, threads: int) -> str:
    """Measure, and return the report."""
    # Each engine is loaded and runs in a thread of its own: flushing denormals applies to the whole thread, and would
    # speed torch up too.
    threads_of = {name: ThreadPoolExecutor(1) for name in ENGINES}
    engines: dict[str, Engine] = {}
    for name, thread in threads_of.items():
        try:
            engines[name] = thread.submit(
                load_engine, name, model_dir, num_threads=threads, flush_denormals=True
            ).result()
        except EngineUnavailableError as error:
            print(f"no comparison: {error}", file=sys.stderr)
    config = engines["onnx"].config
    rows = denoise_rows(config, num_rows)
    tokens, d = num_rows * config.latent_shape[0], config.hidden_size
    # As much work as one call of an engine: a shorter task would profit from quiet moments of a shared machine.
    flops = num_rows * config.flops_per_row()
    tasks: dict[str, tuple[Callable[[], object], int]] = {
        "square": product(2048, 2048, 2048, flops),
        "shaped": product(tokens, d, mlp_size(d), flops),
    }
    for name, engine in engines.items():
        tasks[name] = partial(wait_for, threads_of[name], engine, rows), flops
    rates = best_rates(tasks)
    machine = max(rates["square"], rates["shaped"])
    lines = [
        f"{num_rows} denoise rows of {tokens // num_rows} tokens, width {d}, depth {config.depth}; {threads} threads",
        f"machine   {machine / 1e9:7.1f} GFLOP/s float32 matrix products",
    ]
    for name in engines:
        rate = rates[name]
        milliseconds = 1000 * config.flops_per_row() / rate
        lines.append(f"{name:9} {rate / 1e9:7.1f} GFLOP/s, {rate / machine:.0%} of that, {milliseconds:.2f} ms per row")
    if "torch" in engines:
        lines.append(f"onnx is {rates['onnx'] / rates['torch']:.2f} times torch eager")
    return "\n".join(lines)


def wait_for(thread: ThreadPoolExecutor, engine: Engine, rows: Sequence[Row]) -> list[Array]:
    return thread.submit(engine.run, rows).result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_speed", description=__doc__)
    parser.add_argument("--model", type=Path, help="a model directory (default: an untrained --preset)")
    parser.add_argument("--preset", choices=PRESETS, default="dsd-s")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        model_dir = options.model or untrained(options.preset, Path(temporary) / options.preset)
        try:
            print(bench(model_dir, options.rows, options.threads))
        except DSDError as error:
            sys.exit(f"engine_speed: {error}")


if __name__ == "__main__":
    main()
