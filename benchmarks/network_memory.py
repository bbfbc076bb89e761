"""The memory of one graph for three roles, against three graphs: python -m benchmarks.network_memory DIR.

Measured in fresh processes, each of which loads, runs one encode, four denoise and one decode row, and reads its memory
from /proc: the one-graph engine in every precision of the model directory; three sessions with weights of their own, as
in servers with a separate encoder, denoiser and decoder; and the one graph under other settings of ONNX Runtime.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export.markdown import markdown_table

ROLES = ("encode", "denoise", "decode")
COUNTS = (1, 4, 1)  # rows of each role
LIMIT = 0.45  # of the memory of three sessions
SETTINGS: dict[str, dict[str, Any]] = {
    "no prepacked weights": {"config": {"session.disable_prepacking": "1"}},
    "no memory arena": {"arena": False},
}


def only(proto: Any, role: int) -> Any:
    """The graph for one role: without concatenation and split of the three kinds of rows, and without dead nodes."""
    import onnx
    from onnx import helper

    from export.graph.onnx_graph import rebuilt

    nodes = []
    shapes = {node.output[0] for node in proto.graph.node if node.op_type == "Shape"}
    sizes = set()
    for node in proto.graph.node:
        if node.op_type == "Concat" and shapes.issuperset(node.input):
            sizes.add(node.output[0])
        axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        if node.op_type == "Concat" and len(node.input) == len(ROLES) and axes == [0] and node.output[0] not in sizes:
            if not shapes.intersection(node.input):  # tokens or conditioning, not a shape
                node = helper.make_node("Identity", [node.input[role]], node.output)
        elif node.op_type == "Split" and len(node.input) > 1 and node.input[1] in sizes:
            node = helper.make_node("Identity", [node.input[0]], [node.output[role]])
        nodes.append(node)
    output = proto.graph.output[role]
    needed, kept = {output.name}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    new: onnx.ModelProto = rebuilt(proto, kept[::-1], proto.graph.initializer)
    inputs = [value for value in proto.graph.input if value.name in needed]
    del new.graph.input[:], new.graph.output[:]
    new.graph.input.extend(inputs)
    new.graph.output.append(output)
    return new


def split(model_dir: Path, folder: Path) -> list[Path]:
    """Three graphs of the float32 model, each with its own weights."""
    import onnx

    proto = onnx.load(model_dir / "model.ort.onnx", load_external_data=False)
    graphs = []
    for number, role in enumerate(ROLES):
        target = folder / role
        target.mkdir()
        shutil.copyfile(model_dir / "model.safetensors", target / "model.safetensors")
        graphs.append(target / "model.onnx")
        graphs[-1].write_bytes(only(proto, number).SerializeToString())
    return graphs


def memory() -> dict[str, float]:
    """Memory of this process in MiB: resident, its anonymous part, and peak resident."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {ours: int(fields[theirs].split()[0]) / 1024 for ours, theirs in names.items()}


def measure(model_dir: Path, graphs: list[Path], settings: dict[str, Any]) -> dict[str, Any]:
    """Load a session for each graph and run rows on it, in this process; memory and checksums of the outputs."""
    import onnxruntime as ort

    from dsd_serve.checkpoint import read_model_dir
    from dsd_serve.engines.selftest import mixture
    from dsd_serve.rows import collate

    config = read_model_dir(model_dir).config
    inputs = collate(mixture(config, COUNTS, 0), config)
    before = memory()
    sessions = []
    for graph in graphs:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = settings.get("arena", True)
        for key, value in settings.get("config", {}).items():
            options.add_session_config_entry(key, value)
        sessions.append(ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]))
    loaded = memory()
    outputs: dict[str, Any] = {}
    for session in sessions:
        feed = {value.name: inputs[value.name] for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        for _ in range(2):
            outputs |= dict(zip(names, session.run(names, feed), strict=True))
    sums = {name: float(np.abs(array.astype(np.float64)).sum()) for name, array in outputs.items()}
    return {"before": before, "loaded": loaded, "after": memory(), "outputs": sums}


def in_a_process(model_dir: Path, graphs: list[Path], settings: dict[str, Any] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.network_memory", str(model_dir), "--measure", *map(str, graphs)]
    done = subprocess.run(
        [*command, "--settings", json.dumps(settings or {})], capture_output=True, text=True, check=True
    )
    values: dict[str, Any] = json.loads(done.stdout)
    return values


def study(model_dir: Path) -> dict[str, Any]:
    """All measurements of one model directory; asserts that three sessions and the one compute the same."""
    from dsd_serve.checkpoint import read_model_dir

    model = read_model_dir(model_dir)
    results: dict[str, Any] = {}
    for precision in model.precisions:
        if precision != "bf16":  # no operators for the CPU
            results[precision] = in_a_process(model_dir, [model.graph(precision)])
    for name, settings in SETTINGS.items():
        results[f"fp32, {name}"] = in_a_process(model_dir, [model.graph()], settings)
    with tempfile.TemporaryDirectory() as temporary:
        results["three sessions"] = in_a_process(model_dir, split(model_dir, Path(temporary)))
    one, three = results["fp32"], results["three sessions"]
    assert one["outputs"] == three["outputs"], "the three graphs compute something else"
    return {
        "model": model.name,
        "weights": model.weights.stat().st_size,
        "share": one["after"]["resident"] / three["after"]["resident"],
        "results": results,
    }


def table(values: dict[str, Any]) -> list[str]:
    """The results as lines of Markdown."""
    rows = []
    for name, result in values["results"].items():
        after = result["after"]
        numbers = (result["loaded"]["resident"], after["resident"], after["anonymous"], after["peak"])
        rows.append([name, *(f"{number:.0f} MB" for number in numbers)])
    lines = markdown_table(["", "resident after load", "and after running", "of that anonymous", "peak"], rows)
    share = values["share"]
    before = values["results"]["fp32"]["before"]["resident"]
    sentence = f"One graph takes {share:.1%} of three sessions (limit {LIMIT:.0%} for dsd-b)"
    return [*lines, "", f"{sentence}; each process had {before:.0f} MB before it loaded anything."]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network_memory", description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="a model directory")
    parser.add_argument("--measure", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, options.measure, options.settings)))
        return
    values = study(options.model)
    print("\n".join(table(values)))
    sys.exit(0 if values["share"] <= LIMIT else f"one graph takes more than {LIMIT:.0%} of three sessions")


if __name__ == "__main__":
    main()
