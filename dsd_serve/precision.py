"""Precisions: the number formats in which a network is exported and run.

Each is one row of `PRECISIONS`. Flags, file names, limits on errors, and the engines and devices that run a precision
all follow from its row. A new format is a new row; it needs code only for arithmetic that no other row has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dsd_serve.errors import EngineUnavailableError


@dataclass(frozen=True)
class Limits:
    """The largest errors with which a graph or a plan is accepted.

    latents: largest absolute difference of encode and denoise rows. latents_rms: root mean square of that difference,
    as a share of the reference's. pixels: largest difference of decode rows, in grey levels. psnr: lowest peak
    signal-to-noise ratio, in dB, of an image after a whole generation.
    """

    latents: float
    latents_rms: float
    pixels: int
    psnr: float


@dataclass(frozen=True)
class Precision:
    """One number format.

    dtype: the type of its weights in matrix products, by the name that numpy (with ml_dtypes) and torch share; ONNX's
    type follows from it. safetensors: the same type in the header of a safetensors file. tensorrt: the same type in
    TensorRT, by the name in `DataType` and then by the names that the engine inspector prints; empty where there are no
    plans. arithmetic: the export pass that makes its graphs: "full" exports the network itself, "half" computes matrix
    products in `dtype` and sums in float32, "integer" quantises both factors. graphs: the forms it is exported in, with
    the operators of ONNX alone ("plain") and with those of ONNX Runtime ("fused"). runs: engine -> kinds of device.
    storable: model.safetensors may hold all weights in it.
    """

    name: str
    dtype: str
    safetensors: str
    tensorrt: tuple[str, ...]
    arithmetic: Literal["full", "half", "integer"]
    graphs: tuple[Literal["plain", "fused"], ...]
    runs: Mapping[str, tuple[str, ...]]
    limits: Limits
    storable: bool = False

    @property
    def stem(self) -> str:
        """The start of its file names."""
        return "model" if self.name == REFERENCE else f"model.{self.name}"

    @property
    def plain(self) -> str:
        """File name of the graph with the operators of ONNX alone."""
        return f"{self.stem}.onnx"

    @property
    def fused(self) -> str:
        """File name of the graph with ONNX Runtime's own operators."""
        return f"{self.stem}.ort.onnx"

    @property
    def weights(self) -> str:
        """File name of its weights; if it is missing, the graph reads model.safetensors."""
        return f"{self.stem}.safetensors"

    @property
    def plan(self) -> str:
        """File name of its TensorRT plan."""
        return f"{self.stem}.plan"


REFERENCE = "fp32"  # always exported; the others are compared with it
AUTO = "auto"  # the fastest on the device of those that the model was exported in
FASTEST_ON_GPU = "fp16"
ANY, CPU, CUDA = ("cpu", "cuda"), ("cpu",), ("cuda",)

# fp32 differs from torch by the order of its sums only. The other limits are some five times the errors that networks
# of this project show, trained or not, and the psnr somewhat below their worst, 64, 50 and 43 dB (docs/precision.md):
# beyond them is a mistake, or a network that does not tolerate the precision.
PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision(
            name="fp32",
            dtype="float32",
            safetensors="F32",
            tensorrt=("FLOAT", "Float", "FP32"),
            arithmetic="full",
            graphs=("plain", "fused"),
            runs={"onnx": ANY, "torch": ANY, "tensorrt": CUDA},
            limits=Limits(latents=1e-4, latents_rms=1e-5, pixels=1, psnr=50.0),
            storable=True,
        ),
        Precision(
            name="fp16",  # on a CPU it saves nothing: ONNX Runtime computes in float32
            dtype="float16",
            safetensors="F16",
            tensorrt=("HALF", "Half", "FP16"),
            arithmetic="half",
            graphs=("plain", "fused"),
            runs={"onnx": ANY, "torch": ANY, "tensorrt": CUDA},
            limits=Limits(latents=1e-2, latents_rms=2e-3, pixels=2, psnr=40.0),
            storable=True,
        ),
        Precision(
            name="bf16",  # ONNX Runtime has no operators in it for the CPU
            dtype="bfloat16",
            safetensors="BF16",
            tensorrt=("BF16", "BFloat16", "BFLOAT16"),
            arithmetic="half",
            graphs=("plain", "fused"),
            runs={"onnx": CUDA, "torch": ANY, "tensorrt": CUDA},
            limits=Limits(latents=8e-2, latents_rms=1.5e-2, pixels=4, psnr=35.0),
        ),
        Precision(
            name="int8",  # relies on an operator of ONNX Runtime that multiplies integers and scales in one step
            dtype="int8",
            safetensors="I8",
            tensorrt=(),
            arithmetic="integer",
            graphs=("fused",),
            runs={"onnx": CPU},
            limits=Limits(latents=2e-1, latents_rms=3e-2, pixels=8, psnr=30.0),
        ),
    )
}


def find_precision(name: str) -> Precision:
    """The row of a name. Raises EngineUnavailableError for a name that has none."""
    if name not in PRECISIONS:
        raise EngineUnavailableError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    return PRECISIONS[name]


def precisions_of(engine: str, kind: str | None = None) -> tuple[str, ...]:
    """The precisions that an engine runs, on a kind of device (cpu or cuda) or on any."""
    return tuple(
        name for name, row in PRECISIONS.items() if engine in row.runs and (kind is None or kind in row.runs[engine])
    )


def check_runs(precision: str, engine: str, device: str | None = None) -> None:
    """Raises EngineUnavailableError for a precision that an engine cannot run, on any device or on this one.

    device: cpu, cuda or cuda:N.
    """
    row = find_precision(precision)
    if engine not in row.runs:
        raise EngineUnavailableError(
            f"engine {engine!r} computes in {listed(precisions_of(engine))}, not in {precision}"
        )
    kind = device.partition(":")[0] if device else None
    if kind and kind not in row.runs[engine]:
        raise EngineUnavailableError(
            f"engine {engine!r} runs {precision} on {listed(row.runs[engine])}, and the device is {device}; use "
            f"--precision {listed(precisions_of(engine, kind))}, or --device {row.runs[engine][0]}"
        )


def listed(names: Iterable[str], conjunction: str = "or") -> str:
    """Names in a sentence: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} {conjunction} {last}" if others else last
