"""Milliseconds per tick of every engine on a GPU: python -m benchmarks.gpu_speed DIR --device cuda.

In each precision and for 1, 2, 4 ... 64 denoise rows, in turns in one run: TensorRT, ONNX Runtime, torch (with CUDA
graphs) and torch.compile. A tick is one call of the batcher: rows in, arrays out, with copies to and from the device.
The table has also the share of the device's rate for large matrix products in that precision (torch.matmul), and images
per second at the model's recommended steps. Missing engines are listed with the reason.

torch.compile runs fp16 and bf16 by autocast, the usual way, which casts the weights in each call.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from benchmarks.engine_speed import denoise_rows
from benchmarks.output import add_flag, output_of
from dsd_serve.checkpoint import ModelDir, read_model_dir
from dsd_serve.engines import Engine, load_engine
from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.errors import DSDError
from dsd_serve.precision import PRECISIONS, REFERENCE, precisions_of
from dsd_serve.programs import sampling_cost
from dsd_serve.rows import Array, Row
from export.markdown import markdown_table

SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 15
SECONDS = 20.0  # for the rounds of one row count
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, PRECISIONS[name].dtype) for name in precisions_of("tensorrt")}
NAMES = ("tensorrt", "onnx", "torch", "torch.compile")


class Compiled:
    """The network by torch.compile, in a precision."""

    def __init__(self, engine: TorchEngine, precision: str) -> None:
        self.engine, self.config, self.precision = engine, engine.config, precision
        # One program for each row count and precision. Above the limit, 8 by default and counted for all of them
        # together, dynamo would run them without compilation and say so only in the log.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        engine.model.forward = torch.compile(engine.model.forward, dynamic=False)  # type: ignore[method-assign]

    def run(self, rows: Sequence[Row]) -> list[Array]:
        device = self.engine.model.role_embed.weight.device.type
        with torch.autocast(device, DTYPES[self.precision], enabled=self.precision != REFERENCE):
            return self.engine.run(rows)

    def describe(self) -> dict[str, Any]:
        return self.engine.describe() | {"precision": self.precision}


def load(name: str, path: Path, device: str, precision: str) -> Engine:
    if name == "torch.compile":
        return Compiled(TorchEngine.load(path, device=device, graphs=False), precision)
    return load_engine(name, path, device, precision=precision, flush_denormals=True)


def product_rate(device: str, precision: str) -> float:
    """The rate of a large matrix product, the best of several, in operations per second."""
    size = 8192 if device.startswith("cuda") else 1536
    a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    b = torch.randn(size, size, device=device, dtype=DTYPES[precision])

    def multiply() -> None:
        torch.matmul(a, b)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    multiply()
    return 2 * size**3 / min(seconds(multiply) for _ in range(10))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(engines: dict[str, Engine], model: ModelDir, size: int) -> dict[str, float]:
    """Median seconds per tick of `size` rows of each engine, in turns."""
    rows = denoise_rows(model.config, size)
    first = max(seconds(partial(engine.run, rows)) for engine in engines.values())
    rounds = max(3, min(ROUNDS, math.ceil(SECONDS / max(first, 1e-6) / len(engines))))
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name].append(seconds(partial(engine.run, rows)))
    return {name: statistics.median(values) for name, values in times.items()}


def speed(
    path: Path,
    device: str,
    precisions: Sequence[str],
    sizes: Sequence[int] = SIZES,
    names: Sequence[str] = NAMES,
) -> dict[str, Any]:
    """The contents of speed.json. Raises DSDError for a wrong directory; engines that fail are listed as absent."""
    model = read_model_dir(path)
    results: dict[str, Any] = {"model": model.name, "device": device_name(device), "precisions": {}}
    for precision in precisions:
        engines: dict[str, Engine] = {}
        absent: dict[str, str] = {}
        for name in names:
            try:
                engines[name] = load(name, path, device, precision)
            except DSDError as error:
                absent[name] = str(error)
        table: dict[str, dict[str, float]] = {name: {} for name in engines}
        for size in sizes if engines else ():
            for name, value in measure(engines, model, size).items():
                table[name][str(size)] = 1000 * value
        results["precisions"][precision] = {
            "product_rate": product_rate(device, precision),
            "ms": table,
            "absent": absent,
            "versions": {name: str(engine.describe()["version"]) for name, engine in engines.items()},
        }
    cost = sampling_cost(model.defaults)
    return results | {"flops_per_row": model.config.flops_per_row(), "rows_per_image": cost.rows}


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"# Milliseconds per tick: {results['model']} on {results['device']}",
        "",
        "Written by `python -m benchmarks.gpu_speed`. A tick is one call of the engine with that many denoise rows, "
        "copies included; median of several, all engines in turns. Percentages are of the rate of large matrix "
        "products in the same run.",
    ]
    for precision, result in results["precisions"].items():
        sizes = list(next(iter(result["ms"].values()), {}))
        rate = result["product_rate"]
        rows = []
        for name, row in result["ms"].items():
            cells = [
                f"{ms:.2f} ({100 * int(size) * results['flops_per_row'] / (ms / 1000) / rate:.0f} %)"
                for size, ms in row.items()
            ]
            best = max(int(size) / (ms / 1000) for size, ms in row.items()) / results["rows_per_image"]
            rows.append([f"{name} {result['versions'][name]}", *cells, f"{best:.2f}"])
        header = ["engine", *(f"{size} rows" for size in sizes), "images/s"]
        lines += ["", f"## {precision}: {rate / 1e12:.2f} TFLOP/s", "", *markdown_table(header, rows)]
        lines += [f"\nNot measured: {name}: {reason}" for name, reason in result["absent"].items()]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_speed", description=__doc__)
    parser.add_argument("model", type=Path, help="a model directory, exported with --trt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    add_flag(parser, "benchmarks/results")
    options = parser.parse_args(arguments)
    try:
        results = speed(options.model, options.device, options.precision, options.rows, options.engines)
    except (DSDError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"benchmarks.gpu_speed: {' '.join(str(error).split())[:300]}") from None
    output = output_of(options)
    (output.results / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output.pages / "speed.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
