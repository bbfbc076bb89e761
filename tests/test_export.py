import json

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from dsd_serve.checkpoint import read_checkpoint, read_model_dir
from dsd_serve.engines import load_engine
from dsd_serve.rows import INPUT_NAMES, OUTPUT_NAMES
from export.main import main
from export.verify import Report, verify


def test_the_model_directory_is_complete(tiny_dir):
    files = {"config.json", "model.safetensors", "model.onnx", "model.ort.onnx", "card.md"}
    assert {file.name for file in tiny_dir.iterdir()} == files
    assert {file.stat().st_mode & 0o444 for file in tiny_dir.iterdir()} == {0o444}, "a server may be another user"
    model = read_model_dir(tiny_dir)
    assert model.name == "tiny"
    assert model.config.trained_classes == (1, 207, 950)
    assert (model.defaults.num_steps, model.defaults.guidance_scale) == (4, 1.5)
    card = (tiny_dir / "card.md").read_text()
    assert "Golden Retriever (207)" in card
    assert "research and education" in card
    assert "latents differ from torch by at most" in card


def test_the_weights_are_the_ema_rounded_to_what_is_stored(checkpoint, tiny_dir):
    stored = load_file(tiny_dir / "model.safetensors")
    for name, tensor in read_checkpoint(checkpoint)["ema"].items():
        assert stored[name].dtype == np.float16
        assert np.array_equal(stored[name], tensor.numpy().astype(np.float16))


def test_the_graph_has_the_promised_signature_and_shares_the_weights(demo_dir):
    graph = onnx.load(demo_dir / "model.onnx", load_external_data=False).graph
    assert tuple(value.name for value in graph.input) == INPUT_NAMES
    assert tuple(value.name for value in graph.output) == OUTPUT_NAMES
    inline = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert inline < 100_000
    onnx.checker.check_model(str(demo_dir / "model.onnx"))
    text = (demo_dir / "model.onnx").read_bytes()
    assert b"/site-packages/" not in text, "no paths of the machine that exported"


def test_onnxruntime_gets_its_own_operators_and_others_the_plain_graph(demo_dir):
    def operators(file):
        graph = onnx.load(demo_dir / file, load_external_data=False).graph
        return {(node.domain, node.op_type) for node in graph.node}

    assert {domain for domain, _ in operators("model.onnx")} == {""}
    fused = operators("model.ort.onnx")
    assert ("com.microsoft", "MultiHeadAttention") in fused
    assert ("", "SimplifiedLayerNormalization") in fused
    assert not {("", "Softmax"), ("", "Pow")} & fused, "every attention and normalisation is fused"


def test_the_plain_graph_runs_where_the_fused_one_is_missing(demo_dir, tmp_path):
    for file in demo_dir.iterdir():
        if file.name != "model.ort.onnx":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert verify(load_engine("onnx", tmp_path), load_engine("onnx", demo_dir)).passed


def test_fp32_weights_give_a_graph_too(checkpoint, tmp_path):
    main([str(checkpoint), "-o", str(tmp_path / "model"), "--name", "mine"])
    assert verify(load_engine("onnx", tmp_path / "model"), load_engine("torch", tmp_path / "model")).passed
    assert json.loads((tmp_path / "model/config.json").read_text())["name"] == "mine"
    assert [path.name for path in (tmp_path / "model").iterdir() if path.name.startswith(".")] == []


def test_an_untrained_preset_can_be_exported(tmp_path):
    main(["--untrained", "demo", "-o", str(tmp_path)])
    assert "random" in (tmp_path / "card.md").read_text()
    assert read_model_dir(tmp_path).config.depth == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["README.md"], "README.md is"),
        (["tests"], "is a folder"),
    ],
)
def test_wrong_input_ends_in_one_sentence(arguments, named, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-o", str(tmp_path / "out")])
    assert str(stop.value).startswith("dsd-export: ")
    assert named in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("export.main.verify", lambda *_: Report(0.5, 3, 1, 10))
    with pytest.raises(SystemExit, match="nothing was written"):
        main([str(checkpoint), "-o", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_a_wrong_engine(tiny_dir):
    """A change of a hundredth in the latents and a row that depends on its neighbours are both found."""

    class Wrong:
        def __init__(self, engine):
            self.engine, self.config = engine, engine.config

        def run(self, rows):
            outputs = self.engine.run(rows)
            if len(rows) > 1 and outputs[0].dtype == np.float32:
                outputs[0] = outputs[0] + np.float32(0.01)
            return outputs

    reference = load_engine("torch", tiny_dir)
    report = verify(Wrong(load_engine("onnx", tiny_dir)), reference)
    assert not report.passed
    assert report.latent_error > 0.009
    assert report.dependent_rows > 0
