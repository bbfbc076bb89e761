"""The ONNX Runtime engine: on the CPU by default, on CUDA with onnxruntime-gpu, without torch."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines.cuda import check_driver, failure
from dsd_serve.errors import CheckpointError, EngineUnavailableError, shown
from dsd_serve.precision import check_runs, find_precision
from dsd_serve.rows import OUTPUT_NAMES, Array, Row, collate, distribute, inputs_of, outputs_of

INSTALL = "pip install '.[cpu]' (or '.[gpu]' for NVIDIA GPUs; never both, they overwrite each other)"

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
# Operators that compute shapes, which ONNX Runtime runs on the CPU on purpose.
OF_SHAPES = {"Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Mul", "Range"}
OF_SHAPES |= {"Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"}
PRODUCTS = {"Attention", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"}

ORT_TYPES = {"float32": "float"}  # that have another name in numpy

MOST_BINDINGS = 64  # combinations of row counts whose memory is kept

# MatMulInteger of a (uint8) and b (int8), as the bytes of an ONNX file, because serving does not install onnx.
# tests/export/graph/test_half.py builds the same bytes with onnx.
INTEGER_PRODUCT = (
    b'\x08\n:>\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\t\n\x01a\x12\x04'
    b"\n\x02\x08\x02Z\t\n\x01b\x12\x04\n\x02\x08\x03b\t\n\x01y\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\x14"
)


class OnnxEngine:
    """One ONNX Runtime session on a graph of a model directory.

    On the CPU the bits of a row's result do not depend on the other rows of the call, in any precision.
    """

    def __init__(self, session: Any, config: ModelConfig, device: str, precision: str = "fp32") -> None:
        self.session, self.config, self.device, self.precision = session, config, device, precision
        self.bound = None if device == "cpu" else BoundSession(session, config, device)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "cpu",
        num_threads: int = 0,
        flush_denormals: bool = False,
        precision: str = "fp32",
    ) -> "OnnxEngine":
        """Load a graph of a model directory, see `load_engine`. fp16 on a CPU saves nothing: it computes in float32."""
        ort = import_onnxruntime()
        provider, provider_options = choose_provider(ort, device)
        check_runs(precision, "onnx", device)
        model = read_model_dir(model_dir)
        model.check(model.files(precision))
        if find_precision(precision).arithmetic == "integer":
            check_integers(ort)
        session = open_session(
            ort, model.graph(precision), provider, provider_options, num_threads, flush_denormals=flush_denormals
        )
        check_signature(session, model.config, model.graph(precision))
        model.check_unchanged()
        return cls(session, model.config, device, precision)

    def run(self, rows: Sequence[Row]) -> list[Array]:
        inputs = collate(rows, self.config)
        try:
            outputs = self.bound.run(inputs) if self.bound else self.session.run(OUTPUT_NAMES, inputs)
        except Exception as error:
            raise failure(f"ONNX Runtime failed: {' '.join(str(error).split())[:300]}") from error
        return distribute(rows, outputs)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "onnx",
            "device": self.device,
            "provider": self.session.get_providers()[0],
            "precision": self.precision,
            "version": import_onnxruntime().__version__,
        }


class BoundSession:
    """A session whose inputs and outputs stay on a device, allocated once for each combination of row counts.

    Otherwise ONNX Runtime would allocate both for every call.
    """

    def __init__(self, session: Any, config: ModelConfig, device: str) -> None:
        kind, _, number = device.partition(":")
        self.session, self.config, self.kind, self.number = session, config, kind, int(number or 0)
        self.known: dict[tuple[int, ...], tuple[Any, dict[str, Any]]] = {}

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs of the graph, in the order of OUTPUT_NAMES."""
        counts = tuple(len(inputs[name]) for name in ("encode_pixels", "denoise_latents", "decode_latents"))
        if counts in self.known:
            self.known[counts] = self.known.pop(counts)  # the most recently used is evicted last
        else:
            if len(self.known) == MOST_BINDINGS:
                del self.known[next(iter(self.known))]
            self.known[counts] = self.bind(inputs, counts)
        binding, values = self.known[counts]
        for name, array in inputs.items():
            if array.size:
                values[name].update_inplace(array)
        self.session.run_with_iobinding(binding)
        return [np.asarray(output) for output in binding.copy_outputs_to_cpu()]

    def bind(self, inputs: Mapping[str, Array], counts: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
        binding = self.session.io_binding()
        values = {name: self.allocate(array.shape, array.dtype) for name, array in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for output in outputs_of(self.config):
            memory = self.allocate((counts[output.kind], *output.shape), output.dtype)
            binding.bind_ortvalue_output(output.name, memory)
        return binding, values

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> Any:
        create = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
        return create(list(shape), dtype, self.kind, self.number)


def open_session(
    ort: Any,
    graph: Path,
    provider: str,
    provider_options: dict[str, str],
    num_threads: int = 0,
    flush_denormals: bool = False,
) -> Any:
    """A session on a graph with one execution provider and no fallback."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    if provider != CPU_PROVIDER:
        options.intra_op_num_threads = num_threads or 1  # only shapes are left to the CPU
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if flush_denormals:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        session = ort.InferenceSession(str(graph), options, providers=[provider], provider_options=[provider_options])
    except Exception as error:  # onnxruntime has a class for each status code, without a common base
        raise CheckpointError(f"{graph} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    running = session.get_providers()[0]
    if running != provider:  # ONNX Runtime falls back silently
        raise EngineUnavailableError(
            f"ONNX Runtime runs {running} instead of {provider}: the libraries of the device are missing; "
            "install them, or use --device cpu"
        )
    if provider != CPU_PROVIDER:
        check_assignment(session, provider)
    return session


def check_assignment(session: Any, provider: str) -> None:
    """Check that the nodes of a graph run on its device: ONNX Runtime gives those without a kernel there to the CPU.

    Raises EngineUnavailableError if matrix products are among them, and logs any others that are not of shapes.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # of earlier releases
        return
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != provider]
    elsewhere = sorted({node.op_type for part in parts for node in part.get_nodes()} - OF_SHAPES)
    if heavy := [name for name in elsewhere if name in PRODUCTS]:
        raise EngineUnavailableError(
            f"ONNX Runtime would run {', '.join(heavy)} on the CPU and not by {provider}: use another --precision, or "
            "a later onnxruntime-gpu"
        )
    if elsewhere:
        log.warning("ONNX Runtime runs %s on the CPU, and each tick waits for it", ", ".join(elsewhere))


def check_signature(session: Any, config: ModelConfig, graph: Path) -> None:
    """Raises CheckpointError for a graph whose inputs and outputs do not fit the configuration."""
    signature = (*inputs_of(config), *outputs_of(config))
    types = (np.dtype(one.dtype).name for one in signature)
    expected = {
        one.name: (f"tensor({ORT_TYPES.get(name, name)})", one.shape)
        for one, name in zip(signature, types, strict=True)
    }
    found = {one.name: (one.type, tuple(one.shape[1:])) for one in (*session.get_inputs(), *session.get_outputs())}
    if unknown := sorted(set(found) - set(expected)):
        raise CheckpointError(
            f"{graph} does not belong to its config.json: {shown(unknown[0])} is not among the inputs and outputs of "
            "such a model; export the model again with dsd-export"
        )
    for name, (kind, shape) in expected.items():
        if found.get(name) != (kind, shape):
            raise CheckpointError(
                f"{graph} does not belong to its config.json: {name} is {shown(found.get(name))}, not {kind} [*, "
                f"{', '.join(map(str, shape))}]; export the model again with dsd-export"
            )


def check_integers(ort: Any) -> None:
    """Raises EngineUnavailableError if integer products are wrong: x86 without VNNI adds pairs of them in 16 bits.

    Tested with the largest factors: 255 * 127 + 255 * 127 does not fit into 16 bits.
    """
    session = ort.InferenceSession(INTEGER_PRODUCT, providers=[CPU_PROVIDER])
    a, b = np.full((16, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    (products,) = session.run(None, {"a": a, "b": b})
    if (products != 64 * 255 * 127).any():
        raise EngineUnavailableError(
            "int8 needs a CPU whose sums of 8-bit products do not overflow (x86 with VNNI, or Arm), and on this "
            "one they do: use --precision fp32"
        )


def import_onnxruntime() -> Any:
    """The module. Raises EngineUnavailableError when it is missing or broken."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailableError(
            f"engine 'onnx' needs ONNX Runtime, which is not installed ({error}): {INSTALL}"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):  # the remains after one of two overlapping wheels is removed
        raise EngineUnavailableError(f"the installation of ONNX Runtime is broken; reinstall it: {INSTALL}")
    return onnxruntime


def choose_provider(ort: Any, device: str) -> tuple[str, dict[str, str]]:
    """The execution provider of `cpu`, `cuda` or `cuda:N`, and its options. Raises EngineUnavailableError."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return CPU_PROVIDER, {}
    if kind != "cuda" or (number and not number.isdecimal()):
        raise EngineUnavailableError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineUnavailableError(
            f"device {device!r} needs onnxruntime-gpu, and this is the CPU build: install '.[gpu]' "
            "in an environment of its own"
        )
    check_driver(device)  # ONNX Runtime would run on the CPU
    ort.preload_dlls()
    # The arena by default doubles: a GPU would run out of memory at half of it.
    arena = {"arena_extend_strategy": "kSameAsRequested"}
    return "CUDAExecutionProvider", {"device_id": number or "0", "use_tf32": "0", **arena}
