"""Tests that need a GPU; `make gpu` runs them. A skipped test gives the reason."""

import shutil

import numpy as np
import pytest

from dsd_serve.engines import load_engine
from dsd_serve.engines.cuda import find_gpu, import_runtime
from dsd_serve.engines.plan import find_library, plan_path, read_manifest
from dsd_serve.engines.selftest import batch_invariance, mixture
from dsd_serve.errors import DSDError
from export.main import main
from export.tensorrt import checks
from export.verify import verify
from tests.support.servers import Server

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu():
    try:
        return find_gpu(import_runtime(), "cuda")
    except DSDError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def planned(request, gpu, demo_dir, tmp_path_factory):
    """The demo model with a plan that passed its checks on this GPU, and the precision."""
    try:
        find_library()
    except DSDError as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("plans") / "demo"
    shutil.copytree(demo_dir, target)
    main([str(target), "--trt", "--precision", request.param])
    return target, request.param


def test_every_check_has_run_and_passed(planned):
    directory, precision = planned
    manifest = read_manifest(plan_path(directory, precision))
    assert set(manifest.checks) == set(checks.NAMES)
    assert manifest.passed


def test_tensorrt_is_the_network(planned, demo_dir):
    directory, precision = planned
    engine = load_engine("tensorrt", directory, "cuda", precision=precision)
    report = verify(engine, load_engine("onnx", demo_dir), precision)
    print(report)
    assert report.within_limits


def test_graph_launches_give_the_bits_of_a_call_without(planned):
    directory, precision = planned
    engine = load_engine("tensorrt", directory, "cuda", precision=precision)
    captured = dict(engine.graphs.captured)
    print(engine.describe()["cuda_graphs"], {key: round(graph.ms, 3) for key, graph in captured.items()})
    print("without", {rows: round(ms, 3) for rows, ms in engine.graphs.plain_ms.items()})
    assert len(captured) == 22, "the plan was not captured"
    rows = mixture(engine.config, (0, 8, 0), seed=1)
    launched = engine.run(rows)
    engine.graphs.captured.clear()
    assert all(np.array_equal(a, b) for a, b in zip(launched, engine.run(rows), strict=True))


def check_two_passes(engine):
    ticks = [mixture(engine.config, counts, seed=1) for counts in ((0, 64, 0), (2, 5, 2), (0, 3, 0), (0, 40, 4)) * 5]
    alone = [engine.run(rows) for rows in ticks]
    waits = [engine.start(ticks[0])]
    for number, rows in enumerate([*ticks[1:], None]):
        if rows is not None:
            waits.append(engine.start(rows))
        assert all(np.array_equal(a, b) for a, b in zip(waits.pop(0)(), alone[number], strict=True))


def test_two_passes_under_way_give_the_bits_of_each_alone(planned):
    directory, precision = planned
    engine = load_engine("tensorrt", directory, "cuda", precision=precision)
    check_two_passes(engine)


def test_the_server_generates_with_it(planned):
    import httpx

    directory, precision = planned
    running = Server("--model", str(directory), "--engine", "tensorrt", "--device", "cuda", "--precision", precision)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.get("/generate", params={"class": 207}).headers["content-type"] == "image/png"
        assert client.get("/model").json()["engine"]["engine"] == "tensorrt"
    assert running.stop() == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_onnx_runtime_on_cuda_is_the_network(precision, demo_dir, tmp_path):
    target = tmp_path / "demo"
    shutil.copytree(demo_dir, target)
    main([str(target), "--precision", precision])
    try:
        engine = load_engine("onnx", target, "cuda", precision=precision)
    except DSDError as error:
        pytest.skip(str(error))
    report = verify(engine, load_engine("onnx", demo_dir), precision)
    print(report, batch_invariance(engine, mixture(engine.config, (1, 7, 1), seed=2)))
    assert report.within_limits


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_torch_on_cuda_is_the_network(precision, demo_dir, tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    target = tmp_path / "demo"
    shutil.copytree(demo_dir, target)
    main([str(target), "--precision", precision])
    engine = load_engine("torch", target, "cuda", precision=precision)
    report = verify(engine, load_engine("onnx", demo_dir), precision)
    print(report)
    assert report.within_limits
    assert engine.describe()["cuda_graphs"] == "1, 2, 4, 8, 16, 32, 64"
    for count in (3, 8, 64):
        rows = mixture(engine.config, (0, count, 0), seed=count)
        captured, graphs = engine.run(rows), engine.graphs
        engine.graphs = None
        plain = engine.run(rows)
        engine.graphs = graphs
        limit = 1e-4 if precision == "fp32" else 8e-2  # padding changes the sums of the libraries
        assert all(np.abs(a - b).max() < limit for a, b in zip(captured, plain, strict=True))
    check_two_passes(engine)
