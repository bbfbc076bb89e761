"""The precision study: size, speed and error of each precision.

python -m studies.precision_cost DIR [DIR ...]

For every model directory (exported with --precision fp16 bf16 int8): the size of the weights, milliseconds per row on
this CPU and against float32 in the same run, the errors that dsd-export measured, and the PSNR of whole generations
against float32's. For the first directory also the error without each float32 island, and for the last the memory of
its precisions (`benchmarks.network_memory`).

fp16 and bf16 are for GPUs. Their errors are measured here by emulation of a GPU: each operator in float32, its result
rounded (`export.graph.half.emulated`).
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import network_memory
from benchmarks.engine_speed import denoise_rows
from benchmarks.output import add_flag, output_of
from dsd_serve.checkpoint import ModelDir, read_model_dir, read_weights
from dsd_serve.engines import Engine
from dsd_serve.engines.onnx_engine import OnnxEngine, choose_provider, import_onnxruntime, open_session
from dsd_serve.precision import PRECISIONS, precisions_of
from dsd_serve.programs import generate, run_all
from export.graph.half import HALVES, ISLANDS, PARTS, emulated, half_weights, to_half
from export.graph.onnx_graph import block_products
from export.graph.weights import write_weights
from export.markdown import markdown_table
from export.verify import Report, verify

NUM_STEPS = 50
ROUNDS = 15
PAYS = 1.1  # speed-up over float32 above which a precision counts as faster


@contextlib.contextmanager
def as_on_a_gpu(model: ModelDir, proto: onnx.ModelProto, precision: str, weights: Path) -> Iterator[Engine]:
    """An engine that computes a half-precision graph as a GPU does. weights: the file that the graph points to."""
    ort = import_onnxruntime()
    with tempfile.TemporaryDirectory(dir=weights.parent) as temporary:
        graph = Path(temporary) / "emulated.onnx"
        shutil.copyfile(weights, graph.parent / weights.name)
        graph.write_bytes(emulated(proto, precision).SerializeToString())
        yield OnnxEngine(open_session(ort, graph, *choose_provider(ort, "cpu")), model.config, "cpu", precision)


@contextlib.contextmanager
def numerics(model: ModelDir, precision: str) -> Iterator[Engine]:
    """The engine that measures the errors of a precision."""
    if precision not in HALVES:
        yield OnnxEngine.load(model.path, precision=precision)
        return
    proto = onnx.load(model.path / PRECISIONS[precision].plain, load_external_data=False)
    with as_on_a_gpu(model, proto, precision, model.files(precision)[1]) as engine:
        yield engine


def images(engine: Engine, model: ModelDir, num_classes: int, num_seeds: int) -> list[Any]:
    """Generated images of num_classes classes with num_seeds seeds each, uint8 [3, S, S]."""
    trained = model.config.drawable_labels
    classes = trained[:: max(1, len(trained) // num_classes)][:num_classes]
    programs = [
        generate(model.config, label, replace(model.defaults, num_steps=NUM_STEPS, sampler="euler", seed=seed))
        for label in classes
        for seed in range(num_seeds)
    ]
    return run_all(engine, programs)


def psnr(ours: Any, theirs: Any) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB; 99 for equal ones."""
    error = float(np.square(ours.astype(np.float64) - theirs).mean())
    return min(99.0, 10 * float(np.log10(255**2 / error))) if error else 99.0


def speeds(model: ModelDir, num_rows: int) -> dict[str, float]:
    """Median milliseconds per denoise row of each precision that the CPU runs, measured in alternation."""
    on_cpu = [precision for precision in model.precisions if precision in precisions_of("onnx", "cpu")]
    engines = {name: OnnxEngine.load(model.path, precision=name, flush_denormals=True) for name in on_cpu}
    rows = denoise_rows(model.config, num_rows)
    times: dict[str, list[float]] = {precision: [] for precision in engines}
    for _ in range(ROUNDS + 2):
        for precision, engine in engines.items():
            start = time.perf_counter()
            engine.run(rows)
            times[precision].append(1000 * (time.perf_counter() - start) / num_rows)
    return {precision: statistics.median(values[2:]) for precision, values in times.items()}


def study(path: Path, num_rows: int, num_classes: int, num_seeds: int) -> dict[str, Any]:
    """The results of one model directory, without islands and memory."""
    model = read_model_dir(path)
    milliseconds = speeds(model, num_rows)
    reference: list[Any] = []
    results = {}
    for precision in model.precisions:
        with numerics(model, precision) as engine:
            drawn = images(engine, model, num_classes, num_seeds)
        reference = reference or drawn
        values = [psnr(ours, theirs) for ours, theirs in zip(drawn, reference, strict=True)]
        weights = model.files(precision)[1]
        results[precision] = {
            "weights_bytes": weights.stat().st_size,
            "weights_file": weights.name,
            "ms_per_row": milliseconds.get(precision),
            "measured": model.artefacts[precision]["measured"],
            "psnr_median": statistics.median(values),
            "psnr_least": min(values),
        }
        print(f"{model.name} {precision}: {results[precision]}", flush=True)
    num_parameters = sum(array.size for array in read_weights(path).values())
    return {
        "model": model.name,
        "parameters": num_parameters,
        "rows": num_rows,
        "images": len(reference),
        "guidance": model.defaults.guidance_scale,
        "results": results,
    }


def islands(path: Path) -> dict[str, dict[str, Any]]:
    """Errors of the plain graph by its float32 islands: all, without each one, none."""
    model = read_model_dir(path)
    proto = onnx.load(path / "model.onnx", load_external_data=False)
    reference, state, products = OnnxEngine.load(path), read_weights(path), block_products(proto)
    choices = {"as exported": ISLANDS, "and softmax": frozenset(PARTS)}
    choices |= {f"without {part}": ISLANDS - {part} for part in PARTS if part in ISLANDS}
    choices["none"] = frozenset()
    errors: dict[str, dict[str, Any]] = {name: {} for name in choices}
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "half.safetensors"
        for precision in HALVES:
            write_weights(weights, half_weights(state, precision, products))
            for name, kept in choices.items():
                with as_on_a_gpu(model, to_half(proto, precision, weights, kept), precision, weights) as engine:
                    errors[name][precision] = verify(engine, reference, precision).to_dict()
    return errors


def document(values: dict[str, Any]) -> str:
    lines = [
        "# Precision",
        "",
        f"Written by `{values['command']}` on {values['machine']}. Errors are against float32.",
        "",
        "- **ms per row**: time of a denoise row in ONNX Runtime on this CPU, median of rounds that alternate between",
        "  precisions, and the speed relative to float32. ONNX Runtime has no bf16 operators for CPUs, and computes",
        "  fp16 in float32 between conversions. Both are for GPUs, on which nothing has been measured yet.",
        "- **latents**: largest error of a row, and root mean square error relative to the latents, as measured by",
        "  dsd-export.",
        f"- **image**: PSNR of images drawn in {NUM_STEPS} Euler steps, median and worst. fp16 and bf16 are emulated:",
        "  each operator runs in float32, and its result is rounded.",
    ]
    for model in values["models"]:
        lines += model_section(model)
    lines += ["", "## Which parts stay in float32", "", *island_section(values["islands"])]
    lines += ["", "## Memory", "", *memory_section(values["memory"])]
    return "\n".join([*lines, ""])


def model_section(model: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"## {model['model']}: {model['parameters'] / 1e6:.1f}M parameters",
        "",
        f"{model['rows']} rows per call for speed; {model['images']} images, guidance {model['guidance']:g}.",
        "",
    ]
    base = model["results"]["fp32"]
    rows, verdicts = [], []
    for precision, result in model["results"].items():
        milliseconds, report = result["ms_per_row"], result["measured"]
        speed = "no operators"
        if milliseconds:
            ratio = base["ms_per_row"] / milliseconds
            speed = f"{milliseconds:.2f}, {ratio:.2f} x"
            if precision != "fp32":
                verdict = "is faster" if ratio >= PAYS else "is not faster"
                verdicts.append(f"{precision} {verdict} than fp32 on this CPU ({ratio:.2f} times the speed)")
        else:
            verdicts.append(f"{precision} does not run on a CPU")
        is_shared = precision != "fp32" and result["weights_file"] == base["weights_file"]
        shared = " (the same file)" if is_shared else ""
        errors = "-" if precision == "fp32" else f"{report['latent_error']:.1e}, {report['latent_rms']:.1e}"
        image = "-" if precision == "fp32" else f"{result['psnr_median']:.1f}, {result['psnr_least']:.1f} dB"
        size = f"{result['weights_bytes'] / 1e6:.1f} MB{shared}"
        rows.append([precision, size, speed, errors, image])
    header = ["precision", "weights", "ms per row", "latents: largest, rms", "image: median, worst"]
    return [*lines, *markdown_table(header, rows), "", "; ".join(verdicts) + "."]


def island_section(errors: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Errors of the first model above, without fused operators. *conditioning*: embeddings, time features,",
        "modulation; *residual*: the stream between blocks, gates and shifts; *heads*: everything after the last",
        "block's products.",
        "",
    ]
    rows = []
    for name, by_precision in errors.items():
        reports = (Report(**report) for report in by_precision.values())
        rows.append([name, *(f"{report.latent_rms:.1e}, {report.pixel_error}" for report in reports)])
    header = ["in float32", "fp16: latents rms, pixels", "bf16: latents rms, pixels"]
    return [
        *lines,
        *markdown_table(header, rows),
        "",
        f"The export keeps these in float32: {', '.join(part for part in PARTS if part in ISLANDS)}.",
    ]


def memory_section(values: dict[str, Any]) -> list[str]:
    return [
        f"{values['model']}, {values['weights'] / 1e6:.0f} MB of weights in float32, by",
        "`python -m benchmarks.network_memory`: a fresh process loads the graph, runs one encode, four denoise and one",
        "decode row twice, and reads /proc/self/status.",
        "",
        *network_memory.table(values),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.precision_cost", description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", metavar="DIR", help="model directories with all precisions")
    add_flag(parser, "studies/results")
    parser.add_argument("--rows", type=int, default=4, help="denoise rows per call, for speed (default 4)")
    parser.add_argument("--large", type=int, default=2, help="images of a model of 256 tokens or more (default 2)")
    options = parser.parse_args(arguments)
    models = []
    for path in options.models:
        large = read_model_dir(path).config.latent_shape[0] >= 256
        counts = (options.large, 1) if large else (10, 4)
        models.append(study(path, options.rows, *counts))
    values = {
        "command": f"python -m studies.precision_cost {' '.join(path.name for path in options.models)}",
        "machine": f"{os.cpu_count()} CPU cores",
        "models": models,
        "islands": islands(options.models[0]),
        "memory": network_memory.study(options.models[-1]),
    }
    output = output_of(options)
    (output.results / "precision.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (output.pages / "precision.md").write_text(document(values), encoding="utf-8")


if __name__ == "__main__":
    main()
