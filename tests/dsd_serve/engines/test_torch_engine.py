"""The torch engine in half precision, and the recorded calls of its denoise rows as far as a CPU can run them."""

import shutil
from typing import ClassVar

import numpy as np
import pytest

from dsd_serve.engines import choose_precision, load_engine
from dsd_serve.engines.selftest import mixture
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineError
from dsd_serve.loading import load
from dsd_serve.rows import DeviceEngine
from export.main import main
from export.verify import verify
from tests.support.engines import check_outputs_are_kept

torch = pytest.importorskip("torch")
from dsd_serve.engines import torch_engine  # noqa: E402
from dsd_serve.engines.torch_engine import SIZES, CudaTorchEngine, DenoiseGraphs, HalfBlock, TorchEngine  # noqa: E402


@pytest.fixture(scope="module")
def directory(demo_dir, tmp_path_factory):
    """The demo model in fp16 and bf16 too."""
    target = tmp_path_factory.mktemp("halves") / "demo"
    shutil.copytree(demo_dir, target)
    main([str(target), "--precision", "fp16", "bf16"])
    return target


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_each_precision_is_within_its_limits(directory, precision):
    engine = load_engine("torch", directory, precision=precision)
    report = verify(engine, load_engine("onnx", directory), precision)
    assert report.within_limits, str(report)
    assert (report.latent_rms > 1e-4) == (precision != "fp32"), "half precision rounds more"
    assert engine.describe()["precision"] == precision


def test_products_are_in_half_precision_and_the_rest_is_not(directory):
    seen = []
    model = TorchEngine.load(directory, precision="bf16").model
    assert all(isinstance(block, HalfBlock) for block in model.blocks)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, out: seen.append((module.weight.dtype, out.dtype)))
    rows = [torch.zeros(1, *model.config.latent_shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)]
    pixels = torch.zeros(0, *model.config.pixel_shape, dtype=torch.uint8)
    model(pixels, *rows, rows[0][:0])
    halves = [one for one in seen if one == (torch.bfloat16, torch.bfloat16)]
    assert len(halves) == 7 * len(model.blocks)
    assert set(seen) - set(halves) == {(torch.float32, torch.float32)}


def test_a_precision_that_was_not_exported_is_named(tiny_dir):
    with pytest.raises(CheckpointError, match=r"has no graph in bf16, .*dsd-export .* --precision bf16 makes it"):
        load_engine("torch", tiny_dir, precision="bf16")


def replaying(call):
    """Repeats a call in the same memory, as a CUDA graph does."""
    output = call().clone()
    return lambda: output.copy_(call()), output


class Event:
    """A CUDA event, of which the engine records and waits for one in each pass."""

    ended: ClassVar[list["Event"]] = []
    recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded
        self.ended.append(self)


@pytest.fixture(params=["tiny_dir", "flow_map_dir"])
def engine(request, monkeypatch):
    """The engine for CUDA, with the CPU in its place."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch_engine, "pinned", lambda tensor: tensor)
    monkeypatch.setattr(Event, "ended", [])
    engine = CudaTorchEngine(TorchEngine.load(request.getfixturevalue(request.param)).model, graphs=False)
    engine.graphs = DenoiseGraphs(engine.model, replaying)
    return engine


def test_passes_are_started_and_waited_for_in_turn(engine):
    """What torch does with pinned memory needs a GPU; test_gpu.py has that."""
    assert isinstance(engine, DeviceEngine)
    ticks = [mixture(engine.config, counts, seed=1) for counts in ((0, 3, 0), (0, 4, 0), (2, 1, 1))]
    alone = [engine.run(rows) for rows in ticks]
    Event.ended.clear()
    waits = [engine.start(rows) for rows in ticks]
    assert Event.ended == []
    for number, (wait, expected) in enumerate(zip(waits, alone, strict=True), 1):
        assert all(np.array_equal(a, b) for a, b in zip(wait(), expected, strict=True))
        assert len(Event.ended) == number


def test_recorded_ticks_are_padded_and_give_the_rows_that_were_asked_for(engine):
    plain = TorchEngine(engine.model)
    assert engine.describe()["cuda_graphs"] == ", ".join(map(str, SIZES))
    for count in (1, 3, 64, 5, 2):
        rows = mixture(engine.config, (0, count, 0), seed=count)
        used = next(size for size in SIZES if size >= count)
        _, output = engine.graphs.recorded[used]
        with torch.inference_mode():
            output.zero_()
        for ours, theirs in zip(engine.run(rows), plain.run(rows), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert output.any(), f"{count} rows run in the call of {used}"


def test_outputs_are_the_callers_own(engine):
    check_outputs_are_kept(engine)


@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 0, 1), (2, 3, 1), (0, 65, 0), (0, 0, 0)], ids=str)
def test_other_ticks_run_without_a_recorded_call(engine, counts):
    rows = mixture(engine.config, counts, seed=1)
    engine.graphs.run = None
    for ours, theirs in zip(engine.run(rows), TorchEngine(engine.model).run(rows), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_size_that_cannot_be_recorded_is_left_out_with_those_above(engine, tiny_dir, caplog):
    def small_memory(call):
        output = call()
        if len(output) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return replaying(call)

    graphs = DenoiseGraphs(engine.model, small_memory)
    assert (graphs.sizes(), graphs.fits(8), graphs.fits(9)) == ("1, 2, 4, 8", True, False)
    assert "ticks of 16 rows and more run without a CUDA graph: torch cannot record a call: CUDA out of" in caplog.text


def test_errors_of_the_device_are_sentences_and_fatal_ones_say_so(engine, monkeypatch):
    rows = mixture(engine.config, (1, 0, 0), seed=0)
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    lost.error_code = 700  # as torch sets it
    for error, kind in ((torch.OutOfMemoryError("CUDA out of memory"), EngineError), (lost, EngineDeadError)):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(engine.model, "forward", fail)
        with pytest.raises(EngineError, match="torch failed: CUDA") as caught:
            engine.run(rows)
        assert type(caught.value) is kind


def test_auto_is_fp16_on_a_gpu_where_it_was_exported(directory, tiny_dir, caplog):
    from dsd_serve.checkpoint import read_model_dir

    caplog.set_level("INFO")
    halves, plain = read_model_dir(directory), read_model_dir(tiny_dir)
    assert choose_precision(halves, "onnx", "cuda:1", "auto") == "fp16"
    assert choose_precision(halves, "torch", "cuda", "auto") == "fp16"
    assert "precision auto is fp16, in which the model was exported" in caplog.text
    assert choose_precision(plain, "onnx", "cuda", "auto") == "fp32"
    assert f"a GPU is faster in fp16: run dsd-export {tiny_dir} --precision fp16" in caplog.text
    assert choose_precision(halves, "tensorrt", "cuda", "auto") == "fp32"
    assert f"dsd-export {directory} --trt --precision fp16" in caplog.text
    (directory / "model.fp16.plan").write_bytes(b"")
    assert choose_precision(halves, "tensorrt", "cuda", "auto") == "fp16"
    (directory / "model.fp16.plan").unlink()
    caplog.clear()
    assert choose_precision(halves, "onnx", "cuda", "fp32") == "fp32"
    assert choose_precision(halves, "onnx", "cpu", "auto") == "fp32"
    assert not caplog.records


def test_a_model_draws_with_it(directory):
    with load(directory, "torch", precision="bf16") as half, load(directory) as full:
        assert half.info.described["precision"] == "bf16"
        assert full.info.described["precision"] == "fp32"
        a, b = (np.asarray(model.generate(207, seed=1, num_steps=4), float) for model in (half, full))
    assert 0 < np.abs(a - b).mean() < 2
