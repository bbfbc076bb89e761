import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.gpu_speed import SIZES, main


def test_engines_are_measured_and_missing_ones_are_named(tiny_dir, tmp_path, capsys):
    engines = ["--engines", "tensorrt", "onnx", "torch"]
    main([str(tiny_dir), "--device", "cpu", "--precision", "fp32", "--rows", "1", "3", *engines, "-o", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())["precisions"]["fp32"]
    assert set(results["ms"]) == {"onnx", "torch"}
    assert all(set(row) == {"1", "3"} and min(row.values()) > 0 for row in results["ms"].values())
    assert "no TensorRT plan" in results["absent"]["tensorrt"]
    text = (tmp_path / "speed.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "Not measured: tensorrt: " in text


def test_a_missing_device_gets_a_sentence(tiny_dir, tmp_path):
    with pytest.raises(SystemExit, match=r"benchmarks.gpu_speed: "):
        main([str(tiny_dir), "--device", "nothing", "--precision", "fp32", "-o", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_torch_compile_compiles_every_size_in_every_precision(tiny_dir, tmp_path, monkeypatch):
    counter, compile_it = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_it(function, backend=counter, **options))
    torch._dynamo.reset()
    options = ["--device", "cpu", "--precision", "fp32", "bf16", "--engines", "torch.compile", "-o", str(tmp_path)]
    main([str(tiny_dir), *options])
    assert counter.frame_count == 2 * len(SIZES)
