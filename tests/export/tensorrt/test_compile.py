"""Real builds of TensorRT plans, on a machine without a GPU."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from dsd_serve.checkpoint import sha256
from dsd_serve.engines.plan import find_library, manifest_path, plan_path, read_manifest
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from export.main import main
from export.tensorrt.compile import BuildOptions, aim, check_types, compile_graph
from export.tensorrt.plans import build

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[tensorrt-rtx]'")


@pytest.fixture(scope="module")
def built(tiny_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("plans") / "model"
    shutil.copytree(tiny_dir, target)
    main([str(target), "--trt", "--precision", "fp32", "fp16"])
    return target


def test_each_precision_has_a_plan_and_a_manifest(built):
    for precision, name, graph, products in (
        ("fp32", "model.plan", "model.onnx", "FLOAT"),
        ("fp16", "model.fp16.plan", "model.fp16.onnx", "HALF"),
    ):
        manifest = read_manifest(built / name)
        assert plan_path(built, precision) == built / name
        assert manifest.plan == sha256(built / name)
        assert manifest.made_from[graph] == sha256(built / graph)
        assert any(file.endswith(".safetensors") for file in manifest.made_from)
        assert manifest.library_version == find_library().__version__
        assert manifest.rows == (0, 8, 64)
        assert manifest.targets == ("8.6", "8.9", "12.0")
        assert max(manifest.types, key=manifest.types.get) == products
        assert (manifest.checks, manifest.passed) == (None, False)


def test_without_a_gpu_the_log_names_the_open_checks_and_the_command_that_runs_them(built, caplog):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    build(built, "fp32", BuildOptions(force=True))
    assert "the plan was NOT run: device 'cuda' needs an NVIDIA GPU" in caplog.text
    assert "not checked: finite outputs for every class" in caplog.text
    assert f"dsd-export {built} --check" in caplog.text


def test_a_flow_map_has_a_plan(flow_map_dir, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(flow_map_dir, target)
    main([str(target), "--trt", "--precision", "fp16"])
    assert read_manifest(target / "model.fp16.plan").made_from["model.fp16.onnx"] == sha256(target / "model.fp16.onnx")


@pytest.mark.thorough
def test_the_demo_model_has_plans(demo_dir, tmp_path):
    target = tmp_path / "demo"
    shutil.copytree(demo_dir, target)
    main([str(target), "--trt", "--precision", "fp32", "fp16"])
    sizes = {precision: plan_path(target, precision).stat().st_size for precision in ("fp32", "fp16")}
    assert sizes["fp32"] - sizes["fp16"] > 4e6, sizes  # besides 3.2M weights a plan holds code
    assert read_manifest(plan_path(target, "fp16")).made_from["model.fp16.onnx"] == sha256(target / "model.fp16.onnx")


@pytest.mark.slow
def test_a_checkpoint_of_dsd_s_has_plans(tmp_path):
    from training.run_config import TrainConfig
    from training.state import new_state, save

    config = TrainConfig.from_dict({"model": {"preset": "dsd-s"}})
    save(new_state(config, torch.device("cpu")), config, tmp_path / "checkpoint.pt")
    main([str(tmp_path / "checkpoint.pt"), "-o", str(tmp_path / "model"), "--trt", "--precision", "fp32", "fp16"])
    for precision, num_bytes in (("fp32", 4), ("fp16", 2)):
        plan = plan_path(tmp_path / "model", precision)
        assert plan.stat().st_size > 40e6 * num_bytes
        assert read_manifest(plan).plan == sha256(plan)


def test_targets_are_built_for_and_recorded(built):
    main([str(built), "--trt", "--precision", "fp16", "--targets", "8.9", "12.0"])
    manifest = read_manifest(built / "model.fp16.plan")
    assert manifest.targets == ("8.9", "12.0")
    assert "REQUIRE_USER_ALLOCATION" in manifest.flags, "without it no call can be captured"
    assert manifest.plan == sha256(built / "model.fp16.plan")


def test_another_row_count_to_tune_for_is_another_plan(built, tmp_path, caplog):
    caplog.set_level("INFO")
    target = tmp_path / "model"
    shutil.copytree(built, target)
    main([str(target), "--trt", "--precision", "fp16", "--tuned-rows", "64"])
    assert read_manifest(target / "model.fp16.plan").rows == (0, 64, 64)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine((target / "model.fp16.plan").read_bytes())
    if engine is not None:  # None without a GPU
        assert [shape[0] for shape in engine.get_tensor_profile_shape("denoise_t", 0)] == [0, 64, 64]
    caplog.clear()
    main([str(target), "--trt", "--precision", "fp16", "--tuned-rows", "64"])
    assert "model.fp16.plan: unchanged" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("8.9", "9.0")}, r"--targets of tensorrt_rtx must be among 7\.5, .*; got '9\.0'"),
        ({"version_compatible": True}, "a plan of tensorrt_rtx runs with its own version only"),
        ({"hardware": "same"}, "--hardware and --timing-cache are for tensorrt"),
        ({"hardware": "all"}, r"--hardware must be one of this, same, ampere\+, got 'all'"),
        ({"tuned_rows": 0}, "--tuned-rows must be from 1 to 64, the most rows of a tick, got 0"),
        ({"tuned_rows": 65}, "--tuned-rows must be from 1 to 64, the most rows of a tick, got 65"),
    ],
)
def test_unsupported_options_are_rejected_before_the_build(built, options, words):
    before = (built / "model.plan").stat().st_mtime_ns
    with pytest.raises(EngineUnavailableError, match=words):
        build(built, "fp32", BuildOptions(**options))
    assert (built / "model.plan").stat().st_mtime_ns == before


@pytest.mark.thorough
def test_new_weights_remove_the_plans_of_the_old_ones(built, checkpoint, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(built, target)
    main([str(target), "--name", "renamed"])
    assert (target / "model.plan").exists(), "plans do not contain the name"
    main([str(checkpoint), "-o", str(target), "--store", "fp32"])
    assert not list(target.glob("*.plan*"))
    assert (built / "model.plan").exists()


def test_only_what_changed_is_built_again(built, caplog):
    caplog.set_level("INFO")
    before = (built / "model.plan").stat().st_mtime_ns
    build(built, "fp32")
    assert "model.plan: unchanged" in caplog.text
    assert (built / "model.plan").stat().st_mtime_ns == before
    with (built / "model.plan").open("ab") as plan:
        plan.write(b"broken")
    build(built, "fp32")
    assert read_manifest(built / "model.plan").plan == sha256(built / "model.plan")
    assert manifest_path(built / "model.plan").exists()


def test_a_graph_in_another_precision_is_rejected(built):
    _, types = compile_graph(find_library(), built / "model.onnx")
    with pytest.raises(CheckpointError, match="the network is not in fp16"):
        check_types("fp16", types)


def test_errors_are_sentences(built, tmp_path):
    with pytest.raises(EngineUnavailableError, match="fp32, fp16 or bf16, not in int8"):
        build(built, "int8")
    with pytest.raises(CheckpointError, match="has no graph in bf16; `dsd-export"):
        build(built, "bf16")
    damaged = tmp_path / "damaged"
    shutil.copytree(built, damaged)
    (damaged / "model.onnx").write_bytes(b"not a graph")
    (damaged / "model.plan").unlink()
    with pytest.raises(CheckpointError):
        build(damaged, "fp32")
    assert not (damaged / "model.plan").exists()


def test_an_unreadable_graph_gets_a_sentence(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"cannot read model\.onnx"):
        compile_graph(find_library(), tmp_path / "model.onnx")


def test_without_tensorrt_an_error_says_what_to_install(built):
    code = (
        "import sys; sys.modules.update(tensorrt=None, tensorrt_rtx=None); "
        f"from export.main import main; main([{str(built)!r}, '--trt'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install '.[tensorrt]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_version_compatible_plan_holds_the_runtime_that_later_versions_need():
    config = trt.Builder(trt.Logger()).create_builder_config()
    aim(trt, config, BuildOptions(version_compatible=True))
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert not config.get_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME), "nothing here loads a lean runtime from elsewhere"
