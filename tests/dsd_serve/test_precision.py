"""The table of precisions: a new precision needs only a row."""

import json
import subprocess
import sys

import pytest

from dsd_serve.errors import EngineUnavailableError
from dsd_serve.precision import PRECISIONS, check_runs, find_precision, listed, precisions_of
from tests.support.data import ROOT

# Two new rows, added before any other module of the project is imported: fp8 shows what follows from a row, and a twin
# of fp16 under another name is exported and run.
NEW_ROWS = """
import dataclasses, json, sys
from pathlib import Path
from dsd_serve.precision import ANY, CUDA, PRECISIONS, Limits, Precision
PRECISIONS["fp8"] = Precision(
    name="fp8",
    dtype="float8_e4m3fn",
    safetensors="F8_E4M3",
    tensorrt=("FP8",),
    arithmetic="half",
    graphs=("plain",),
    runs={"tensorrt": CUDA},
    limits=Limits(latents=0.3, latents_rms=0.05, pixels=12, psnr=25.0),
)
PRECISIONS["twin"] = dataclasses.replace(PRECISIONS["fp16"], name="twin", tensorrt=(), storable=False)
"""

FACTS = """
import torch
from benchmarks.gpu_speed import DTYPES
from dsd_serve.engines.plan import plan_path
from dsd_serve.errors import DSDError
from export.build import stale_plans
from export.graph.weights import onnx_type
from export.main import arguments_parser
from export.tensorrt import checks
from export.verify import Report
from server.settings import CHOICES

def refusal(call):
    try:
        call()
    except DSDError as error:
        return str(error)

from dsd_serve.engines import load_engine
flag = next(action for action in arguments_parser()._actions if action.dest == "precision")
layers = json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Row major FP8"}]}]})
print(json.dumps({
    "dsd-export": list(flag.choices),
    "dsd-serve": list(CHOICES["precision"]),
    "benchmark": [name for name, dtype in DTYPES.items() if dtype == torch.float8_e4m3fn],
    "plan": plan_path(Path("m"), "fp8").name,
    "stale": stale_plans(["model.fp8.onnx"]),
    "onnx": onnx_type("fp8"),
    "limits": str(Report(0.4, 3, 0, 9, 0.01, "fp8")),
    "passed": [Report(error, 3, 0, 9, 0.01, "fp8").passed for error in (0.2, 0.4)],
    "built": checks.built(layers, "fp8").passed,
    "cpu": refusal(lambda: load_engine("onnx", Path("dsd_serve/demo"), precision="fp8")),
    "unknown": refusal(lambda: load_engine("onnx", Path("dsd_serve/demo"), precision="fp4")),
}))
"""

EXPORT = """
from dsd_serve.engines import load_engine
from export.main import main
from export.verify import verify
main([sys.argv[1], "-o", sys.argv[2], "--precision", "twin"])
engine = load_engine("onnx", Path(sys.argv[2]), precision="twin")
print(json.dumps({
    "files": sorted(file.name for file in Path(sys.argv[2]).glob("*twin*")),
    "passed": verify(engine, load_engine("onnx", Path(sys.argv[2])), "twin").passed,
    "card": "| twin |" in Path(sys.argv[2], "card.md").read_text(),
}))
"""


def run(code, *arguments):
    command = [sys.executable, "-c", NEW_ROWS + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_flags_file_names_limits_and_sentences_follow_a_new_row():
    found = run(FACTS)
    names = [*PRECISIONS, "fp8", "twin"]
    assert ["auto", *found["dsd-export"]] == found["dsd-serve"] == ["auto", *names]
    assert found["benchmark"] == ["fp8"]
    assert found["plan"] == "model.fp8.plan"
    assert found["stale"] == ["model.fp8.plan", "model.fp8.plan.json"]
    assert found["onnx"] == 17  # TensorProto.FLOAT8E4M3FN
    assert "(limit 3e-01)" in found["limits"] and "grey levels (limit 12)" in found["limits"]
    assert found["passed"] == [True, False]
    assert found["built"]
    assert found["cpu"] == "engine 'onnx' computes in fp32, fp16, bf16, int8 or twin, not in fp8"
    assert found["unknown"] == f"precision must be one of {', '.join(names)}, got 'fp4'"


@pytest.mark.thorough
def test_a_new_row_with_known_arithmetic_is_exported_and_runs(checkpoint, tmp_path):
    found = run(EXPORT, checkpoint, tmp_path / "model")
    assert found["files"] == ["model.twin.onnx", "model.twin.ort.onnx", "model.twin.safetensors"]
    assert found["passed"] and found["card"]


def test_file_names_and_engines_of_the_rows():
    assert [row.plain for row in PRECISIONS.values()][:2] == ["model.onnx", "model.fp16.onnx"]
    assert (PRECISIONS["fp32"].fused, PRECISIONS["int8"].fused) == ("model.ort.onnx", "model.int8.ort.onnx")
    assert (PRECISIONS["fp32"].weights, PRECISIONS["fp16"].weights) == ("model.safetensors", "model.fp16.safetensors")
    assert precisions_of("torch") == ("fp32", "fp16", "bf16")
    assert precisions_of("tensorrt") == ("fp32", "fp16", "bf16")
    assert precisions_of("onnx", "cpu") == ("fp32", "fp16", "int8")
    assert precisions_of("onnx", "cuda") == ("fp32", "fp16", "bf16")
    assert all(name == row.name for name, row in PRECISIONS.items())


@pytest.mark.parametrize(
    ("precision", "engine", "device", "sentence"),
    [
        ("fp64", "onnx", "cpu", "precision must be one of fp32, fp16, bf16, int8, got 'fp64'"),
        ("int8", "torch", "cpu", "engine 'torch' computes in fp32, fp16 or bf16, not in int8"),
        ("int8", "tensorrt", None, "engine 'tensorrt' computes in fp32, fp16 or bf16, not in int8"),
        (
            "bf16",
            "onnx",
            "cpu",
            "engine 'onnx' runs bf16 on cuda, and the device is cpu; "
            "use --precision fp32, fp16 or int8, or --device cuda",
        ),
    ],
)
def test_an_unsupported_precision_is_rejected_with_the_supported_ones(precision, engine, device, sentence):
    with pytest.raises(EngineUnavailableError) as refusal:
        check_runs(precision, engine, device)
    assert str(refusal.value) == sentence


def test_listed():
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
    assert listed(["a", "b"], "and") == "a and b"
    assert find_precision("int8").dtype == "int8"
