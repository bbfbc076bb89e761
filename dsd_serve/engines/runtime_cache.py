"""The kernels of TensorRT-RTX: how they are compiled, and their cache on disk.

TensorRT-RTX compiles kernels for the shapes of a call at run time. By default a slower kernel runs meanwhile, so equal
calls would give other bits later, and a CUDA graph would keep the slower kernel for ever. Here it compiles before the
first call of each shape. The cache saves that work at the next start.
"""

import logging
import os
from pathlib import Path
from typing import Any

from dsd_serve.engines.cuda import Gpu
from dsd_serve.engines.plan import Manifest
from dsd_serve.errors import EngineError
from dsd_serve.files import atomic

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of a cache file


def compiles(trt: Any) -> bool:
    """Whether the library compiles kernels for each new shape of a call."""
    return hasattr(trt, "DynamicShapesKernelSpecializationStrategy")


def context_options(trt: Any, cuda_engine: Any, gpu: Gpu, manifest: Manifest) -> Any:
    """What `create_execution_context` takes, so that the engine owns all memory: a strategy, or with TensorRT-RTX a
    configuration with the cache of earlier starts."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not compiles(trt):
        return strategy
    runtime_config = cuda_engine.create_runtime_config()
    runtime_config.set_execution_context_allocation_strategy(strategy)
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
    kernels = runtime_config.create_runtime_cache()
    if known := read_cache(cache_file(gpu, manifest)):
        kernels.deserialize(known)  # false for those of another version, driver or GPU, which are replaced
    if not runtime_config.set_runtime_cache(kernels):
        raise EngineError(f"{trt.__name__} does not take a runtime cache")
    return runtime_config


def save_runtime_cache(runtime_config: Any, gpu: Gpu, manifest: Manifest) -> None:
    """Keep the kernels that were made. Without a folder that can be written the next start makes them again."""
    if not hasattr(runtime_config, "get_runtime_cache"):
        return
    kernels = runtime_config.get_runtime_cache()
    data, file = bytes(kernels.serialize()), cache_file(gpu, manifest)
    if data == read_cache(file) or len(data) > MOST_BYTES:
        return
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic(file) as draft:
            draft.write_bytes(data)
    except OSError as error:
        log.info("kernels are not kept for the next start (%s); XDG_CACHE_HOME can name a folder", error)


def cache_file(gpu: Gpu, manifest: Manifest) -> Path:
    """In the user's own cache folder, because the file holds code; never in a folder that others may write."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsd-serve"
    return folder / f"{manifest.plan[:16]}-{gpu.capability}.kernels"


def read_cache(file: Path) -> bytes:
    """The contents, empty if there are none."""
    try:
        return file.read_bytes() if file.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return b""
