"""The ONNX Runtime engine: the CPU by default, CUDA with onnxruntime-gpu. It needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, EngineError, EngineUnavailableError
from dsd_serve.rows import OUTPUT_NAMES, Array, Row, collate, distribute

INSTALL = "pip install 'dsd-serve[cpu]' (or 'dsd-serve[gpu]' for NVIDIA GPUs; never both, they overwrite each other)"


class OnnxEngine:
    """One ONNX Runtime session over model.onnx.

    On the CPU in float32 a row's result does not depend, to the bit, on the other rows of the call.
    """

    def __init__(self, session: Any, config: ModelConfig, device: str) -> None:
        self.session, self.config, self.device = session, config, device

    @classmethod
    def load(
        cls, model_dir: Path, *, device: str = "cpu", num_threads: int = 0, flush_denormals: bool = False
    ) -> "OnnxEngine":
        ort = import_onnxruntime()
        model = read_model_dir(model_dir)
        if not model.graph.exists():
            raise CheckpointError(f"{model_dir} has no model.onnx; dsd-export {model_dir} --onnx writes it")
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        if flush_denormals:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        provider, provider_options = choose_provider(ort, device)
        try:
            session = ort.InferenceSession(
                str(model.graph), options, providers=[provider], provider_options=[provider_options]
            )
        except Exception as error:  # onnxruntime raises a class per status code, without a common base
            raise CheckpointError(f"{model.graph} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        running = session.get_providers()[0]
        if running != provider:  # ONNX Runtime falls back without a word
            raise EngineUnavailableError(
                f"{provider} was asked for, but ONNX Runtime runs {running}: the libraries of the device are missing; "
                "install them, or ask for --device cpu"
            )
        return cls(session, model.config, device)

    def run(self, rows: Sequence[Row]) -> list[Array]:
        inputs = collate(rows, self.config)
        try:
            outputs = self.session.run(OUTPUT_NAMES, inputs)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {' '.join(str(error).split())[:300]}") from error
        return distribute(rows, outputs)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "onnx",
            "device": self.device,
            "provider": self.session.get_providers()[0],
            "precision": "fp32",
            "version": import_onnxruntime().__version__,
        }


def import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailableError(
            f"engine 'onnx' needs ONNX Runtime, which is not installed ({error}): {INSTALL}"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):  # what is left when one of two overlapping wheels is removed
        raise EngineUnavailableError(f"the installation of ONNX Runtime is broken; reinstall it: {INSTALL}")
    return onnxruntime


def choose_provider(ort: Any, device: str) -> tuple[str, dict[str, str]]:
    """The execution provider and its options for `cpu`, `cuda` or `cuda:N`; EngineUnavailableError for others."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if kind != "cuda" or (number and not number.isdecimal()):
        raise EngineUnavailableError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineUnavailableError(
            f"device {device!r} needs onnxruntime-gpu, and this is the CPU build: install 'dsd-serve[gpu]' "
            "in an environment of its own"
        )
    ort.preload_dlls()
    return "CUDAExecutionProvider", {"device_id": number or "0", "use_tf32": "0"}
