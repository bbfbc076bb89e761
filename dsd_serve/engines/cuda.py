"""The CUDA runtime through NVIDIA's cuda-bindings, without torch: the GPU, and calls that raise our errors."""

import ctypes
import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from dsd_serve.errors import EngineDeadError, EngineError, EngineUnavailableError

# Statuses of the CUDA runtime after which every further call in the process fails: those whose documentation says that
# the process must be terminated and relaunched, a lost context, and memory or links that are broken.
FATAL = {
    214: "cudaErrorECCUncorrectable",
    220: "cudaErrorNvlinkUncorrectable",
    226: "cudaErrorContained",
    700: "cudaErrorIllegalAddress",
    702: "cudaErrorLaunchTimeout",
    709: "cudaErrorContextIsDestroyed",
    710: "cudaErrorAssert",
    714: "cudaErrorHardwareStackError",
    715: "cudaErrorIllegalInstruction",
    716: "cudaErrorMisalignedAddress",
    717: "cudaErrorInvalidAddressSpace",
    718: "cudaErrorInvalidPc",
    719: "cudaErrorLaunchFailure",
    721: "cudaErrorTensorMemoryLeak",
    810: "cudaErrorMpsClientTerminated",
    911: "cudaErrorExternalDevice",
}
IN_TEXT = re.compile(r"\b(?:CUDA failure|CUDA error:?) (\d+)\b")  # as ONNX Runtime writes a status


@dataclass(frozen=True)
class Gpu:
    """A GPU. number: its index in CUDA. name: from its driver. capability: its compute capability, such as "9.0"."""

    number: int
    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability})"


def import_runtime() -> ModuleType:
    """`cuda.bindings.runtime`. Raises EngineUnavailableError if it is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineUnavailableError(
            f"NVIDIA's cuda-bindings are required but cannot be imported ({error}): pip install '.[tensorrt]' "
            "or '.[tensorrt-rtx]'"
        ) from None
    return runtime


def call(result: tuple[Any, ...]) -> Any:
    """The results of a CUDA runtime function, without the status. Raises EngineError if the status is not success, and
    EngineDeadError if it is one of FATAL."""
    status, *values = result
    if int(status):
        raise failure(f"CUDA failed: {status.name}", int(status))
    return values[0] if len(values) == 1 else tuple(values)


def failure(text: str, status: int | None = None) -> EngineError:
    """The error of a failed call: EngineDeadError if its status is one of FATAL. status: None to find it in `text`."""
    if status is None:
        found = IN_TEXT.search(text)
        status = int(found[1]) if found else 0
    if status in FATAL:
        return EngineDeadError(f"{text}; after {FATAL[status]} only a new process can use the GPU")
    return EngineError(text)


def check_driver(device: str) -> None:
    """Raises EngineUnavailableError without NVIDIA's driver. Only Linux is checked."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise EngineUnavailableError(
                f"device {device!r} needs an NVIDIA GPU and its driver ({error}); install the driver, run a "
                "container with --gpus all, or use --device cpu"
            ) from None


def find_gpu(runtime: Any, device: str) -> Gpu:
    """The GPU of the device `cuda` or `cuda:N`. Raises EngineUnavailableError when there is none of that number."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise EngineUnavailableError(f"TensorRT runs on NVIDIA GPUs: device must be cuda or cuda:N, got {device!r}")
    status, count = runtime.cudaGetDeviceCount()
    if int(status) or not count:
        reason = status.name if int(status) else "the driver reports none"
        raise EngineUnavailableError(f"device {device!r} needs an NVIDIA GPU and its driver: {reason}")
    index = int(number or 0)
    if index >= count:
        raise EngineUnavailableError(f"there is no device {device!r}: this machine has {count}, numbered from cuda:0")
    found = call(runtime.cudaGetDeviceProperties(index))
    return Gpu(index, found.name.split(b"\0")[0].decode(), f"{found.major}.{found.minor}")
