import numpy as np

from dsd_serve.engines import load_engine
from dsd_serve.engines.selftest import batch_invariance, mixture
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
