"""Engines run rows. `load_engine` loads one by name and never falls back to another."""

from pathlib import Path

from dsd_serve.errors import EngineUnavailableError
from dsd_serve.precision import check_runs
from dsd_serve.rows import Engine

__all__ = ["ENGINE_NAMES", "Engine", "load_engine"]

ENGINE_NAMES = ("onnx", "torch", "tensorrt")


def load_engine(
    name: str,
    model_dir: Path,
    device: str = "cpu",
    num_threads: int = 0,
    flush_denormals: bool = False,
    precision: str = "fp32",
) -> Engine:
    """Load the network of a model directory on an engine.

    name: onnx, torch or tensorrt. device: cpu, cuda or cuda:N. num_threads: CPU threads, 0 for all cores.
    flush_denormals: the onnx engine treats numbers below 1e-38 as zero, because they are slow on a CPU (6 % of a dsd-s
    step). This applies to all arithmetic of the threads that load and run the engine, so it is for processes that only
    serve. precision: one that the directory was exported in. Raises EngineUnavailableError when the engine cannot run
    in that precision on that device here, CheckpointError when the directory is wrong or lacks the precision.
    """
    if name == "onnx":
        from dsd_serve.engines.onnx_engine import OnnxEngine

        return OnnxEngine.load(
            model_dir, device=device, num_threads=num_threads, flush_denormals=flush_denormals, precision=precision
        )
    if name == "torch":
        try:
            from dsd_serve.engines.torch_engine import TorchEngine
        except ImportError as error:
            raise EngineUnavailableError(
                f"engine 'torch' needs torch, which cannot be imported ({error}): pip install 'dsd-serve[train]'"
            ) from None
        check_runs(precision, name)
        return TorchEngine.load(model_dir, device=device, num_threads=num_threads)
    if name == "tensorrt":
        from dsd_serve.engines.tensorrt_engine import TensorRTEngine

        return TensorRTEngine.load(model_dir, device=device, precision=precision)
    raise EngineUnavailableError(f"engine must be one of {', '.join(ENGINE_NAMES)}, got {name!r}")
