"""Real builds of TensorRT plans, on a machine without a GPU."""

import json
import shutil
import subprocess
import sys

import pytest

from dsd_serve.checkpoint import sha256
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from export.main import main
from export.to_tensorrt import build, check_types, compile_graph, find_library

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dsd-serve[tensorrt]'")


@pytest.fixture(scope="module")
def built(tiny_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("plans") / "model"
    shutil.copytree(tiny_dir, target)
    main([str(target), "--trt", "--precision", "fp32", "fp16"])
    return target


def manifest_of(directory, name):
    return json.loads((directory / f"{name}.json").read_text())


def test_each_precision_has_a_plan_and_a_manifest_that_says_what_it_is(built):
    for name, graph, products in (
        ("model.plan", "model.onnx", "FLOAT"),
        ("model.fp16.plan", "model.fp16.onnx", "HALF"),
    ):
        manifest = manifest_of(built, name)
        assert manifest["plan"] == sha256(built / name)
        assert manifest["made_from"][graph] == sha256(built / graph)
        assert any(file.endswith(".safetensors") for file in manifest["made_from"])
        assert manifest["library_version"] == find_library().__version__
        assert manifest["rows"]["min"] == 0
        assert max(manifest["types"], key=manifest["types"].get) == products
        assert set(manifest["gates"].values()) == {"not run"}


def test_only_what_changed_is_built_again(built, caplog):
    caplog.set_level("INFO")
    before = (built / "model.plan").stat().st_mtime_ns
    build(built, "fp32")
    assert "model.plan: unchanged" in caplog.text
    assert (built / "model.plan").stat().st_mtime_ns == before
    with (built / "model.plan").open("ab") as plan:
        plan.write(b"broken")
    build(built, "fp32")
    assert manifest_of(built, "model.plan")["plan"] == sha256(built / "model.plan")


def test_a_graph_that_is_not_what_its_name_says_is_refused(built):
    _, types = compile_graph(find_library(), built / "model.onnx")
    with pytest.raises(CheckpointError, match="the network is not in fp16"):
        check_types("fp16", types)


def test_refusals_are_sentences(built, tmp_path):
    with pytest.raises(EngineUnavailableError, match="fp32, fp16, bf16, not int8"):
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


def test_a_graph_that_the_parser_cannot_read_is_a_sentence(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"cannot read model\.onnx"):
        compile_graph(find_library(), tmp_path / "model.onnx")


def test_without_tensorrt_a_sentence_says_what_to_install(built):
    code = (
        "import sys; sys.modules.update(tensorrt=None, tensorrt_rtx=None); "
        f"from export.main import main; main([{str(built)!r}, '--trt'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install 'dsd-serve[tensorrt]'" in ended.stderr
    assert "Traceback" not in ended.stderr
