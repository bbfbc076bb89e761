"""Every TensorRT name in our code exists in both versions of NVIDIA's bindings and in tensorrt_rtx."""

import ast
import functools
import json
import shutil
import subprocess
import sys

import pytest

from tests.support.data import ROOT

FILES = (
    "dsd_serve/engines/cuda_graphs.py",
    "dsd_serve/engines/tensorrt_engine.py",
    "dsd_serve/engines/runtime_cache.py",
    "export/tensorrt/compile.py",
    "export/tensorrt/plans.py",
)
VERSIONS = ("11.4.0.106", "10.16.1.11")
# The classes of our variables.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "context": "IExecutionContext",
    "self.plan": "ICudaEngine",
    "self.runtime": "Runtime",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "cuda_engine": "ICudaEngine",
    "runtime_config": "IRuntimeConfig",
    "kernels": "IRuntimeCache",
}
# Tested with hasattr first, or used only where such a name exists.
OF_RTX = {
    ("trt", "ComputeCapability"),
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("trt", "DynamicShapesKernelSpecializationStrategy"),
    ("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"),
    ("IRuntimeConfig", "get_runtime_cache"),
    ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeCache", "deserialize"),
    ("IRuntimeCache", "serialize"),
}
IN_PYTHON = {"nptype"}  # defined by the package around the bindings, in both versions


@functools.cache
def used():
    """(class or "trt", name) of every use in our files."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value).removeprefix("self.trt.").removeprefix("trt.")
            if owner in ("trt", "self.trt"):
                found.add(("trt", node.attr))
            elif ast.unparse(node.value) in CLASSES:
                found.add((CLASSES[ast.unparse(node.value)], node.attr))
            elif owner != ast.unparse(node.value):
                found.add((owner, node.attr))
    return {(owner, name) for owner, name in found if not name.startswith("__") and "." not in owner}


def missing(names):
    known = {"trt": set(names) | IN_PYTHON, **{owner: set(members) for owner, members in names.items()}}
    return {(owner, name) for owner, name in used() if name not in known.get(owner, ())}


def test_the_names_are_found_in_the_files():
    assert {
        ("trt", "OnnxParser"),
        ("BuilderFlag", "VERSION_COMPATIBLE"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("IBuilderConfig", "set_timing_cache"),
    } <= used()
    assert len(used()) > 40


@pytest.mark.parametrize("version", VERSIONS)
def test_nvidias_bindings_have_every_name(version, tmp_path):
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs Linux and gcc, to load the bindings without TensorRT's libraries")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
    done = subprocess.run([*download, f"tensorrt-cu13-bindings=={version}"], capture_output=True, text=True)
    wheels = list(tmp_path.glob("*.whl"))
    if not wheels:
        pytest.skip(f"the bindings cannot be downloaded: {done.stderr.strip()[-200:]}")
    command = [sys.executable, str(ROOT / "tests/support/tensorrt_bindings.py"), str(wheels[0])]
    names = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert missing(names) == OF_RTX


def test_tensorrt_rtx_has_every_name():
    trt = pytest.importorskip("tensorrt_rtx")
    assert missing({name: dir(getattr(trt, name)) for name in dir(trt)}) == set()


def test_the_cuda_runtime_has_every_name():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    found = set()
    for file in (ROOT / "dsd_serve/engines").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and node.attr[4:5].isupper():
                found.add(node.attr)
    values = ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaStreamCaptureModeThreadLocal")
    assert {"cudaEventElapsedTime", "cudaGraphLaunch", "cudaMemcpyAsync", *values} <= found
    members = {*dir(runtime), *dir(runtime.cudaMemcpyKind), *dir(runtime.cudaStreamCaptureMode)}
    assert found <= members
