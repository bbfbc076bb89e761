"""Engines run rows. `load_engine` loads one by name and never falls back to another."""

import logging
from pathlib import Path

from dsd_serve.checkpoint import ModelDir
from dsd_serve.errors import EngineUnavailableError
from dsd_serve.precision import AUTO, FASTEST_ON_GPU, REFERENCE, check_runs, find_precision
from dsd_serve.rows import Engine

__all__ = ["ENGINE_NAMES", "Engine", "choose_precision", "load_engine"]

log = logging.getLogger(__name__)

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
                f"engine 'torch' needs torch, which cannot be imported ({error}): pip install '.[train]'"
            ) from None
        check_runs(precision, name)
        return TorchEngine.load(model_dir, device=device, num_threads=num_threads, precision=precision)
    if name == "tensorrt":
        from dsd_serve.engines.tensorrt_engine import TensorRTEngine

        return TensorRTEngine.load(model_dir, device=device, precision=precision)
    raise EngineUnavailableError(f"engine must be one of {', '.join(ENGINE_NAMES)}, got {name!r}")


def choose_precision(directory: ModelDir, engine: str, device: str, precision: str) -> str:
    """The precision that `precision` stands for: `auto` is fp16 on a GPU if the model was exported in it, else fp32.

    On a GPU half precision is the fast one, on a CPU it is not. What is chosen on a GPU is logged.
    """
    if precision != AUTO:
        return precision
    if device.partition(":")[0] != "cuda":
        return REFERENCE
    half = FASTEST_ON_GPU
    exported = half in directory.precisions
    if exported and (engine != "tensorrt" or (directory.path / find_precision(half).plan).exists()):
        log.info("precision auto is %s, in which the model was exported", half)
        return half
    how = f"dsd-export {directory.path} {'--trt ' if engine == 'tensorrt' else ''}--precision {half}"
    log.warning("precision auto is %s; a GPU is faster in %s: run %s", REFERENCE, half, how)
    return REFERENCE
