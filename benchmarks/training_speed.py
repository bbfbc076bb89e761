"""Training speed against the matrix-product rate of the device.

python -m benchmarks.training_speed --data tiny-imagenet-200

Measures images/s and FLOP/s, counted by training/estimate.py, and the rate of a large matrix product in the same
precision. Writes training-speed.md and training-speed.json. About four minutes on two cores, of which compilation takes
one or two; run it on an idle machine.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.output import add_flag, output_of
from dsd_serve.errors import DSDError
from dsd_serve.files import atomic
from export.markdown import markdown_table
from training.dataset import Images
from training.device import Device, choose_device
from training.estimate import flops_per_image, random_batch
from training.loss import Objective
from training.order import Order, micro_batches
from training.run_config import TrainConfig, load_config
from training.state import new_state
from training.step import Batch, train_step

CONFIGS = Path(__file__).parents[1] / "training/configs"
MIN_SECONDS = 2.0  # a case is repeated for at least this time, and at least twice
SIDE = 2048  # of the square matrices that measure the device's rate

# name: configuration, overrides, changes of Device
DEMO, DSD_S = ("demo", 64), ("dsd-s", 2)
CASES: dict[str, tuple[tuple[str, int], tuple[str, ...], dict[str, Any]]] = {
    "demo, fp32, math attention": (DEMO, (), {"bf16": False, "plain_attention": True}),
    "demo, fp32, fused attention": (DEMO, (), {"bf16": False, "plain_attention": False}),
    "demo, bf16, math attention": (DEMO, (), {"bf16": True, "plain_attention": True}),
    "demo, bf16, fused attention": (DEMO, (), {"bf16": True, "plain_attention": False}),
    "demo, bf16, math, Muon": (DEMO, ("optim.name=muon",), {"bf16": True, "plain_attention": True}),
    "demo, bf16, math, pyramid loss": (DEMO, ("loss.pyramid_weight=1.0",), {"bf16": True, "plain_attention": True}),
    "demo, bf16, math, compiled": (DEMO, (), {"bf16": True, "plain_attention": True, "compiled": True}),
    "demo, bf16, math, 1 draw": (DEMO, ("loss.num_draws=1",), {"bf16": True, "plain_attention": True}),
    "demo, bf16, math, 2 draws": (DEMO, ("loss.num_draws=2",), {"bf16": True, "plain_attention": True}),
    "demo, bf16, math, 8 draws": (DEMO, ("loss.num_draws=8",), {"bf16": True, "plain_attention": True}),
    "dsd-s, fp32, math attention": (DSD_S, (), {"bf16": False, "plain_attention": True}),
    "dsd-s, bf16, math attention": (DSD_S, (), {"bf16": True, "plain_attention": True}),
    "dsd-s, bf16, fused attention": (DSD_S, (), {"bf16": True, "plain_attention": False}),
}
READING = {"images in memory": -1, "decoded in the process": 0, "1 worker": 1, "2 workers": 2}


def best(run: Callable[[], Any], where: Device) -> float:
    """Seconds of the fastest run in MIN_SECONDS, after a warm-up run."""
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < MIN_SECONDS:
        began = time.perf_counter()
        run()
        if where.device.type == "cuda":
            torch.cuda.synchronize(where.device)
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_rate(where: Device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE, device=where.device, dtype=dtype) for _ in range(2))
    return 2 * SIDE**3 / best(lambda: a @ b, where)


def configured(name: str, batch: int, overrides: Sequence[str]) -> TrainConfig:
    sizes = [f"optim.batch_size={batch}", f"optim.micro_batch_size={batch}", "optim.steps=1000000"]
    return load_config(CONFIGS / f"{name}.toml", [*sizes, *overrides])


def random_batches(config: TrainConfig) -> Iterator[Batch]:
    for step in itertools.count():
        for number in range(config.optim.batch_size // config.optim.micro_batch_size):
            yield random_batch(config.network_config(), config.optim.micro_batch_size, step, number)


def time_case(
    where: Device, config: TrainConfig, rates: dict[str, float], batches: Iterator[Batch] | None = None
) -> dict[str, float]:
    """Speed of real steps: images/s, TFLOP/s, and the share of the matrix-product rate."""
    state = new_state(config, where.device)
    forward = torch.compile(state.objective) if where.compiled else state.objective
    source = random_batches(config) if batches is None else batches
    seconds = best(lambda: train_step(state, forward, config, where, source), where)
    rate = config.optim.batch_size / seconds
    assert isinstance(state.objective, Objective)
    flops = rate * flops_per_image(config.network_config(), config.loss, state.objective)
    share = flops / rates["bf16" if where.bf16 else "fp32"]
    return {"images_per_second": rate, "tflops": flops / 1e12, "share_of_matmul": share}


def time_reading(where: Device, data: str, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Speed of whole steps of the demo by source of images: memory, decoded in the process, decoded by workers."""
    results = {}
    config = configured("demo", 64, ())
    training = Images(data, config.network_config().image_size, config.data.classes)
    held = training.subset(np.arange(len(training)))
    held.hold()
    for name, workers in READING.items():
        source = held if workers < 0 else training
        batches = micro_batches(source, Order(len(source), 64, 0), 0, 100_000, 64, 0, 1, max(0, workers))
        results[name] = time_case(replace(where, bf16=True), config, rates, batches)
    return results


def report(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    rates = results["matmul_tflops"]
    lines = [
        "# Training speed",
        "",
        "Written by `python -m benchmarks.training_speed --data tiny-imagenet-200` on "
        f"{results['device']}, {results['cores']} cores, torch {results['torch']}: the fastest step in "
        f"{MIN_SECONDS:.0f} seconds. A product of two {SIDE} x {SIDE} matrices reaches {rates['fp32']:.3f} TFLOP/s in "
        f"fp32 and {rates['bf16']:.3f} in bf16; the last column is the share of that rate. *Math* attention is "
        "computed by plain matrix products, *fused* attention by torch's kernel; a *draw* is a noise draw per encoded "
        "image. Only the last four rows include reading the images.",
        "",
    ]
    rows = []
    for name, row in {**results["cases"], **results["reading"]}.items():
        label = f"demo, bf16, math, {name}" if name in READING else name
        rows.append([label, f"{row['images_per_second']:.1f}", f"{row['tflops']:.3f}", f"{row['share_of_matmul']:.0%}"])
    sizes = "demo: 64 images of 32 x 32, 4 noise draws; dsd-s: 2 of 256 x 256, 3 draws"
    lines += markdown_table([sizes, "images/s", "TFLOP/s", "share of the matrix product"], rows)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of Tiny-ImageNet parquet files, or another source")
    add_flag(parser, "benchmarks/results")
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="names of cases (default: all)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.cases) - set(CASES)):
        sys.exit(f"training_speed: --cases must be of {', '.join(CASES)}; got {unknown[0]!r}")
    try:
        config = configured("demo", 64, ("run.compile=off",))
        where = choose_device(config, config.network_config())
        rates = {"fp32": matmul_rate(where, torch.float32), "bf16": matmul_rate(where, torch.bfloat16)}
        cases = {}
        for name in options.cases:
            (network, batch), overrides, changes = CASES[name]
            cases[name] = time_case(replace(where, **changes), configured(network, batch, overrides), rates)
            print(f"{name}: {cases[name]['images_per_second']:.1f} images/s", flush=True)
        reading = time_reading(where, options.data, rates)
    except DSDError as error:
        sys.exit(f"training_speed: {error}")
    results = {
        "device": str(where.device) if where.device.type == "cpu" else torch.cuda.get_device_name(where.device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "matmul_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "cases": cases,
        "reading": reading,
    }
    output = output_of(options)
    with atomic(output.results / "training-speed.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    with atomic(output.pages / "training-speed.md") as temporary:
        temporary.write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
