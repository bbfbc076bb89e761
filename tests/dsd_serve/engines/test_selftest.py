import numpy as np
import pytest

from dsd_serve.engines import load_engine
from dsd_serve.engines.selftest import ON_GPU, batch_invariance, mixture, self_test
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineError
from dsd_serve.rows import Decode


def test_onnxruntime_gives_the_same_bits_alone_and_in_a_mixture(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    result = batch_invariance(engine, mixture(engine.config, (2, 3, 2), seed=0))
    assert result.holds
    assert (result.num_rows, result.max_difference) == (7, 0.0)
    assert "same bits" in str(result)


class Leaky:
    """An engine whose rows depend on their neighbours, as observed with TensorRT."""

    def __init__(self, engine):
        self.engine, self.config = engine, engine.config

    def run(self, rows):
        outputs = self.engine.run(rows)
        leak = 1e-3 * (len(rows) - 1)
        return [
            output if isinstance(row, Decode) else output + np.float32(leak)
            for row, output in zip(rows, outputs, strict=True)
        ]


def test_rows_that_depend_on_their_neighbours_are_counted_and_measured(tiny_dir):
    engine = Leaky(load_engine("onnx", tiny_dir))
    result = batch_invariance(engine, mixture(engine.config, (1, 2, 1), seed=0))
    assert (result.num_rows, result.dependent_rows) == (4, 3)
    assert abs(result.max_difference - 3e-3) < 1e-5
    assert "3 of 4 rows differ" in str(result)


class OnGpu:
    """An engine that calls itself a GPU's, with sums that change from 33 rows on, and memory for `most` rows."""

    def __init__(self, engine, most=64, leak=1e-7, error=EngineError):
        self.engine, self.config, self.most, self.leak, self.error = engine, engine.config, most, leak, error

    def run(self, rows):
        if len(rows) > self.most:
            raise self.error("CUDA failed: cudaErrorMemoryAllocation")
        outputs = self.engine.run(rows)
        return [output + np.float32(self.leak) if len(rows) > 32 else output for output in outputs]

    def describe(self):
        return {"engine": "onnx", "device": "cuda:0"}


def test_a_gpu_is_tried_at_the_numbers_of_rows_at_which_libraries_split_sums(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    split = self_test(OnGpu(engine))
    assert not split.holds
    assert split.row_counts == tuple(map(sum, ON_GPU)) == (1, 2, 3, 9, 33, 64)
    assert (split.num_rows, split.dependent_rows) == (112, 97)
    whole = self_test(OnGpu(engine, leak=0))
    assert whole.holds
    assert "in calls of 1, 2, 3, 9, 33, 64" in str(whole)
    assert self_test(engine).row_counts == (4,), "one mixture shows it on a CPU"


def test_a_call_that_is_too_large_ends_the_self_test_and_not_the_start(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    assert self_test(OnGpu(engine, most=32)).row_counts == (1, 2, 3, 9)
    with pytest.raises(EngineError):
        self_test(OnGpu(engine, most=0))
    with pytest.raises(EngineDeadError):
        self_test(OnGpu(engine, most=32, error=EngineDeadError))


def test_values_that_are_not_finite_are_an_error_of_the_model(tiny_dir):
    with pytest.raises(CheckpointError, match="not finite: export it again"):
        self_test(OnGpu(load_engine("onnx", tiny_dir), leak=np.nan))
