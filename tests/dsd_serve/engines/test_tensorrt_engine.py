"""The TensorRT engine's own part: buffers, padding, graphs, manifests and checks, on a simulated GPU."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dsd_serve.checkpoint import read_model_dir, sha256
from dsd_serve.engines import load_engine, plan, tensorrt_engine
from dsd_serve.engines.cuda import FATAL, failure, find_gpu
from dsd_serve.engines.plan import manifest_path, plan_path, read_manifest
from dsd_serve.engines.selftest import mixture
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineError, EngineUnavailableError
from dsd_serve.precision import PRECISIONS
from dsd_serve.rows import OUTPUT_NAMES, Denoise
from export.main import main
from export.tensorrt import checks
from export.tensorrt import plans as plan_export
from tests.support.engines import check_outputs_are_kept
from tests.support.gpu_double import HOST_CODE, Context, Cuda, Status, TensorRTX
from tests.support.plans import LAYERS, put_plan


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 3, 0), (0, 64, 0), (3, 5, 2), (0, 65, 0), (70, 130, 1), (0, 0, 0)],
    ids=str,
)
def test_rows_of_any_kinds_and_numbers_are_those_of_onnx_runtime(engine, tiny_dir, counts):
    rows = mixture(engine.config, counts, seed=1)
    expected = load_engine("onnx", tiny_dir).run(rows) if rows else []
    for _ in range(2):  # a second time over what the first left in the buffers
        for ours, theirs in zip(engine.run(rows), expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert np.abs(ours.astype(float) - theirs).max() < 1e-5 if theirs.dtype != np.uint8 else 1


def test_a_plan_of_a_flow_map_gives_the_results_of_onnx_runtime(flow_map_dir, cuda, tmp_path):
    shutil.copytree(flow_map_dir, tmp_path / "model")
    put_plan(tmp_path / "model")
    engine, reference = load_engine("tensorrt", tmp_path / "model", "cuda"), load_engine("onnx", flow_map_dir)
    for counts in ((0, 1, 0), (0, 3, 0), (3, 5, 2), (0, 64, 0), (0, 65, 1)):
        rows = mixture(engine.config, counts, seed=1)
        for ours, theirs in zip(engine.run(rows), reference.run(rows), strict=True):
            assert np.abs(ours.astype(float) - theirs).max() <= (1 if theirs.dtype == np.uint8 else 1e-5)
    assert {in_graph for in_graph, _ in cuda.calls} == {True, False}


def test_outputs_are_the_callers_own(engine):
    check_outputs_are_kept(engine)


def without_graphs(directory, tiny_dir):
    """The engine of the directory, which has no CUDA graphs, and gives the results of ONNX Runtime all the same."""
    engine = load_engine("tensorrt", directory, "cuda")
    rows = mixture(engine.config, (0, 5, 0), seed=1)
    assert engine.describe()["cuda_graphs"] == "none"
    assert np.abs(engine.run(rows)[4] - load_engine("onnx", tiny_dir).run(rows)[4]).max() < 1e-5
    return engine


def test_a_capture_that_is_invalidated_leaves_an_engine_without_graphs(directory, cuda, tiny_dir, caplog):
    cuda.capture_fails = True
    without_graphs(directory, tiny_dir)
    assert cuda.cudaGetLastError() == (Status.cudaSuccess,), "TensorRT would find the error later"
    assert (
        "ticks of 1 denoise rows and more run without a CUDA graph: CUDA failed: cudaErrorStreamCaptureInvalidated"
        in caplog.text
    )


def test_a_library_that_fails_in_a_capture_leaves_an_engine_without_graphs(
    directory, cuda, tiny_dir, caplog, monkeypatch
):
    works = Context.execute_async_v3
    outside = lambda self, stream: cuda.captured is None and works(self, stream)  # noqa: E731
    monkeypatch.setattr(Context, "execute_async_v3", outside)
    without_graphs(directory, tiny_dir)
    assert "run without a CUDA graph: TensorRT could not run the plan" in caplog.text


def rtx(directory, monkeypatch, cuda, tmp_path):
    """A TensorRT-RTX, and a plan of it."""
    cuda.properties.minor, cuda.properties.major = 9, 8
    trt = TensorRTX(cuda, LAYERS)
    for module in (tensorrt_engine, plan_export):
        monkeypatch.setattr(module, "import_library", lambda name: trt)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = TensorRTX.__version__
    put_plan(directory, library="tensorrt_rtx", library_version=version, gpu=None, capability=None, targets=("8.9",))
    return trt


def test_rtx_compiles_before_it_captures_and_gives_the_same_bits_later(directory, cuda, monkeypatch, tmp_path):
    trt = rtx(directory, monkeypatch, cuda, tmp_path)
    engine = load_engine("tensorrt", directory, "cuda")
    assert engine.describe()["cuda_graphs"].startswith("encode 1, 2, 4, 8; denoise 1, 2, 3")
    rows = mixture(engine.config, (2, 3, 1), seed=1)
    first, second = engine.run(rows), engine.run(rows)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    (cache,) = (tmp_path / "cache" / "dsd-serve").iterdir()
    assert cache.parent.stat().st_mode & 0o77 == 0, "it holds code"
    compiled = len(trt.compiled)
    load_engine("tensorrt", directory, "cuda")
    assert len(trt.compiled) == compiled, "the kernels of the first start are kept"
    cache.write_bytes(b"of another driver")
    load_engine("tensorrt", directory, "cuda")
    assert cache.read_bytes().startswith(b"kernels of the double")


def test_rtx_compiles_nothing_for_a_tick_that_graphs_can_run(directory, cuda, monkeypatch, tmp_path):
    """Compiling takes seconds, so all padding is cheaper."""
    cuda.host_ms = 0.0
    trt = rtx(directory, monkeypatch, cuda, tmp_path)
    engine = load_engine("tensorrt", directory, "cuda")
    compiled = len(trt.compiled)
    for counts in ((0, 33, 0), (2, 2, 3), (0, 1, 1)):
        engine.run(mixture(engine.config, counts, seed=1))
    assert len(trt.compiled) == compiled


def test_rtx_without_a_folder_for_its_kernels_makes_them_again(directory, cuda, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    rtx(directory, monkeypatch, cuda, tmp_path)
    (tmp_path / "cache").write_text("in the way")
    assert load_engine("tensorrt", directory, "cuda").graphs.captured
    assert "kernels are not kept for the next start" in caplog.text


def test_a_plan_of_rtx_that_cannot_be_captured_is_named(directory, cuda, tiny_dir, monkeypatch, tmp_path, caplog):
    rtx(directory, monkeypatch, cuda, tmp_path).user_allocation = False
    without_graphs(directory, tiny_dir)
    assert "TensorRT says that this plan cannot be captured; build it again" in caplog.text


def test_host_code_is_run_only_of_a_plan_that_is_meant_to_hold_it(directory, cuda):
    """A version-compatible plan holds a runtime, which TensorRT loads only if that is allowed."""
    plan = plan_path(directory, "fp32")
    plan.write_bytes(HOST_CODE + plan.read_bytes())
    for compatible in (True, False):
        manifest = dataclasses.replace(read_manifest(plan), plan=sha256(plan), version_compatible=compatible)
        manifest_path(plan).write_text(manifest.to_json())
        if compatible:
            load_engine("tensorrt", directory, "cuda")
        else:
            with pytest.raises(CheckpointError, match="rejects this plan"):
                load_engine("tensorrt", directory, "cuda")


def test_a_plan_is_built_on_the_gpu_that_its_manifest_names(directory, cuda, monkeypatch):
    cuda.count = 2
    found = []
    trt = SimpleNamespace(__name__="tensorrt", __version__="11.4.0.106", BuilderFlag=SimpleNamespace(__members__={}))

    def compile_graph(*_):
        found.append(cuda.current)
        raise CheckpointError("enough")

    monkeypatch.setattr(plan_export, "find_library", lambda: trt)
    monkeypatch.setattr(plan_export, "compile_graph", compile_graph)
    for device, number in (("cuda:1", 1), ("cuda", 0)):
        with pytest.raises(CheckpointError, match="enough"):
            plan_export.build(directory, "fp32", plan_export.BuildOptions(device=device, force=True))
        assert found.pop() == number


def test_a_failing_call_names_itself(engine, cuda, monkeypatch):
    monkeypatch.setattr(cuda, "cudaGraphLaunch", lambda graph, stream: (Status.cudaErrorInvalidValue,))
    with pytest.raises(EngineError, match="CUDA failed: cudaErrorInvalidValue"):
        engine.run(mixture(engine.config, (0, 1, 0), seed=0))


def test_a_status_after_which_the_process_must_end_says_that_the_engine_is_dead(engine, cuda):
    cuda.broken = Status.cudaErrorIllegalAddress
    with pytest.raises(EngineDeadError, match=r"cudaErrorIllegalAddress; .* only a new process can use the GPU"):
        engine.run(mixture(engine.config, (0, 1, 0), seed=0))
    cuda.broken = Status.cudaErrorMemoryAllocation
    with pytest.raises(EngineError) as caught:
        engine.run(mixture(engine.config, (0, 1, 0), seed=0))
    assert not isinstance(caught.value, EngineDeadError)


def test_fatal_statuses_have_the_names_and_the_documentation_of_cuda():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    documented = {
        int(status): status.name
        for status in runtime.cudaError_t
        if "must be terminated and relaunched" in " ".join((status.__doc__ or "").split())
    }
    assert documented.items() <= FATAL.items()
    assert all(runtime.cudaError_t(number).name == name for number, name in FATAL.items())


def test_the_words_of_onnx_runtime_name_the_status():
    text = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x ; file=cuda_call.cc"
    assert isinstance(failure(f"ONNX Runtime failed: {text}"), EngineDeadError)
    assert type(failure("CUDA failure 2: out of memory ; GPU=0")) is EngineError


def test_describe_names_the_library_and_the_gpu(engine):
    described = engine.describe()
    assert (described["engine"], described["device"], described["provider"]) == (
        "tensorrt",
        "cuda:0",
        "tensorrt on Double 1",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "Other 2"}, r"was built for Other 2 \(compute capability 9.0\), but the GPU is Double 1"),
        ({"hardware": "same", "capability": "8.9"}, "was built for compute capability 8.9"),
        ({"targets": ("8.6", "8.9"), "capability": None}, "was built for compute capability 8.6, 8.9"),
        ({"library_version": "11.3.0.1"}, "was built with tensorrt 11.3.0.1, but 11.4.0.106"),
        ({"library_version": "10.9", "version_compatible": True}, "was built with tensorrt 10.9"),
        ({"library_version": "11.9", "version_compatible": True}, "was built with tensorrt 11.9"),
        ({"made_from": {"model.onnx": "0" * 64}}, "was made from another model.onnx"),
        ({"plan": "0" * 64}, "is not the plan of its manifest: it is damaged or was replaced"),
        ({"checks": None}, "its checks have not run; dsd-export .* --check"),
        ({"checks": {"x": {"passed": False, "text": ""}}}, "its checks have not run"),
        ({"format": "dsd-plan-0"}, "is not of format 'dsd-plan-1'"),
        ({"rows": (0, 8)}, "does not describe a plan"),
    ],
)
def test_a_plan_that_does_not_fit_is_rejected_with_a_fix(directory, cuda, changes, words):
    put_plan(directory, **changes)
    with pytest.raises((CheckpointError, EngineUnavailableError), match=words) as refusal:
        load_engine("tensorrt", directory, "cuda")
    assert f"dsd-export {directory}" in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": "same", "gpu": "Other 2"},
        {"hardware": "ampere+", "gpu": "Other 2", "capability": "8.0"},
        {"targets": ("8.9", "9.0"), "gpu": None, "capability": None},
        {"library_version": "11.3.9", "version_compatible": True},
    ],
)
def test_a_plan_for_more_than_one_machine_is_loaded(directory, cuda, changes):
    put_plan(directory, **changes)
    load_engine("tensorrt", directory, "cuda")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda plan: plan.unlink(), "has no TensorRT plan in fp32"),
        (lambda plan: manifest_path(plan).unlink(), r"has no manifest model\.plan\.json"),
        (lambda plan: manifest_path(plan).write_text("{"), "cannot be read"),
        (lambda plan: manifest_path(plan).write_text("[]"), "is not of format"),
        (lambda plan: plan.write_bytes(b"no plan"), "is damaged or was replaced"),
        (
            lambda plan: (plan.parent / "model.safetensors").open("ab").write(b"x"),
            "made from another model.safetensors",
        ),
    ],
)
def test_missing_and_damaged_files_are_named(directory, cuda, damage, words):
    damage(plan_path(directory, "fp32"))
    with pytest.raises(CheckpointError, match=words):
        load_engine("tensorrt", directory, "cuda")


@pytest.mark.parametrize(
    ("capability", "targets", "fix"),
    [
        (
            (9, 0),
            (),
            r"tensorrt_rtx does not support that GPU; pip install '\.\[tensorrt\]', and build it again",
        ),
        ((9, 0), ("8.6", "8.9", "12.0"), "tensorrt_rtx does not support that GPU"),
        ((7, 5), ("8.6", "8.9", "12.0"), r"build it again with dsd-export .* --targets 7\.5"),
    ],
)
def test_a_gpu_that_tensorrt_rtx_does_not_have_is_named(directory, cuda, caplog, capability, targets, fix):
    """TensorRT-RTX has no H100, H200 or B200: it would deserialise its own new plan to nothing there."""
    cuda.properties.major, cuda.properties.minor = capability
    plan = put_plan(directory, library="tensorrt_rtx", gpu=None, capability=None, targets=targets)
    with pytest.raises(EngineUnavailableError, match=fix):
        load_engine("tensorrt", directory, "cuda")
    checked = plan_export.checked(plan.read_bytes(), read_manifest(plan), read_model_dir(directory), "cuda")
    assert "the plan was NOT run" in caplog.text and checked == read_manifest(plan)


def test_a_plan_that_tensorrt_rejects(directory, cuda):
    plan = put_plan(directory)
    plan.write_bytes(b"no plan")
    put = dataclasses.replace(read_manifest(plan), plan=sha256(plan))
    manifest_path(plan).write_text(put.to_json())
    with pytest.raises(CheckpointError, match="rejects this plan on Double 1"):
        load_engine("tensorrt", directory, "cuda")


@pytest.mark.parametrize(
    ("device", "count", "words"),
    [
        ("cpu", 1, "device must be cuda or cuda:N, got 'cpu'"),
        ("cuda:x", 1, "device must be cuda or cuda:N"),
        ("cuda:1", 1, "this machine has 1, numbered from cuda:0"),
        ("cuda", 0, "needs an NVIDIA GPU and its driver"),
    ],
)
def test_a_missing_device_is_named(device, count, words):
    with pytest.raises(EngineUnavailableError, match=words):
        find_gpu(Cuda(count=count), device)


def test_a_missing_library_is_named(directory, monkeypatch):
    with pytest.raises(EngineUnavailableError, match=r"tensorrt cannot be imported .* pip install '\.\[tensorrt\]'"):
        load_engine("tensorrt", directory, "cuda")


def test_a_broken_tensorrt_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineUnavailableError, match=r"libnvinfer\.so\.11 is missing"):
        plan.find_library()


class Wrong:
    """An engine with a fault."""

    def __init__(self, engine, fault):
        self.engine, self.config, self.fault = engine, engine.config, fault

    def run(self, rows):
        outputs = [output.copy() for output in self.engine.run(rows)]
        self.fault(rows, outputs)
        return outputs


def one_class_is_broken(rows, outputs):
    for row, output in zip(rows, outputs, strict=True):
        if isinstance(row, Denoise) and row.label == 207:
            output[0] = np.nan


def the_last_of_many_is_another(rows, outputs):
    if len(rows) > 2 and outputs[-1].dtype != np.uint8:
        outputs[-1] += 1e-6


def rows_leak(rows, outputs):
    if outputs[0].dtype != np.uint8:
        outputs[0] += 1e-7 * outputs[-1].astype(np.float32).mean()


def rows_are_rough(rows, outputs):
    for output in outputs:
        if output.dtype != np.uint8:
            output *= 1.01


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (lambda rows, outputs: None, set()),
        (one_class_is_broken, {checks.FINITE, checks.IMAGE}),
        (the_last_of_many_is_another, {checks.EQUAL}),
        (rows_leak, {checks.NEIGHBOURS}),
        (rows_are_rough, {checks.ERRORS}),
    ],
)
def test_each_check_finds_its_fault(tiny_dir, fault, failing):
    reference = load_engine("onnx", tiny_dir)
    found = checks.run_checks(Wrong(reference, fault), reference, "fp32", read_model_dir(tiny_dir).defaults, LAYERS)
    failed = {check.name for check in found if not check.passed}
    assert failing <= failed and bool(failing) == bool(failed), [str(check) for check in found]


def test_the_precision_that_was_built_is_checked(tiny_dir):
    half = json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Half"}]}] * 3 + json.loads(LAYERS)["Layers"]})
    assert checks.built(half, "fp16").passed
    assert not checks.built(LAYERS, "fp16").passed
    assert not checks.built(half, "fp32").passed, "float32 was asked for, and half was built"
    assert not checks.built(half, "bf16").passed
    outputs = json.dumps(
        {"Layers": [{"Outputs": [{"Name": name, "Format/Datatype": "FP32"}]} for name in OUTPUT_NAMES]}
    )
    for untold in ('{"Layers": ["only", "names"]}', LAYERS.replace("FP32", "N/A due to dynamic shapes"), outputs):
        check = checks.built(untold, "fp16")
        assert check.passed and "unknown" in check.text


def test_a_plan_that_passes_its_checks_is_loaded(directory, cuda, capsys, caplog):
    caplog.set_level("INFO")
    put_plan(directory, checks=None)
    main([str(directory), "--check"])
    assert f"ok    {checks.IMAGE}" in caplog.text
    assert f"ok    {checks.BUILT}: outputs of layers: 1 in fp32" in caplog.text
    assert set(read_manifest(plan_path(directory, "fp32")).checks) == set(checks.NAMES)
    load_engine("tensorrt", directory, "cuda")


def test_a_plan_that_fails_its_checks_is_kept_where_no_engine_loads_it(directory, cuda, monkeypatch):
    put_plan(directory, checks=None)
    limits = dataclasses.replace(PRECISIONS["fp32"].limits, psnr=1000.0)
    monkeypatch.setitem(PRECISIONS, "fp32", dataclasses.replace(PRECISIONS["fp32"], limits=limits))
    plan = plan_path(directory, "fp32").read_bytes()
    with pytest.raises(SystemExit, match=r"failed its checks and was moved to .*rejected: the image after .* dB"):
        main([str(directory), "--check"])
    kept = plan_path(directory / "rejected", "fp32")
    assert kept.read_bytes() == plan
    assert not read_manifest(kept).passed
    assert json.loads(kept.with_name("model.plan.layers.json").read_text()) == json.loads(LAYERS)
    assert not plan_path(directory, "fp32").exists()
    assert not manifest_path(plan_path(directory, "fp32")).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--check", "--precision", "fp16"], "has no TensorRT plan in fp16; dsd-export .* --trt builds one"),
        (["--check", "--precision", "int8"], "computes in fp32, fp16 or bf16, not in int8"),
        (["--check", "--device", "cpu"], "device must be cuda or cuda:N, got 'cpu'"),
    ],
)
def test_checks_that_cannot_run_are_rejected(directory, cuda, arguments, words):
    with pytest.raises(SystemExit, match=words):
        main([str(directory), *arguments])
    assert plan_path(directory, "fp32").exists()
