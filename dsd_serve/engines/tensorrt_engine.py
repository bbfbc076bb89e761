"""The TensorRT engine: runs the plans that `dsd-export --trt` builds, on a GPU, with cuda-bindings and without torch.

Most ticks hold only denoise rows. They are padded to the next of a few row counts, and each of those counts is one CUDA
graph: a single call starts the copies to the GPU, the network and the copies back. Any other tick runs the network with
exactly its rows. All memory is allocated when the plan is loaded, none in a tick.
"""

import ctypes
import logging
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines.cuda import Gpu, call, find_gpu, import_runtime
from dsd_serve.engines.plan import Manifest, check_bytes, check_plan, import_library, plan_path, read_manifest
from dsd_serve.engines.runtime_cache import context_options, save_runtime_cache
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineError
from dsd_serve.precision import check_runs
from dsd_serve.rows import INPUT_NAMES, OUTPUT_NAMES, Array, Decode, Denoise, Encode, Row, collate, distribute

log = logging.getLogger(__name__)

KINDS = (Encode, Denoise, Decode)
# The place in KINDS of each input and output.
KIND_OF = dict(zip((*INPUT_NAMES, *OUTPUT_NAMES), (0, 1, 1, 1, 2, 0, 1, 2), strict=True))


class Buffer:
    """One input or output of the plan: pinned host memory, viewed as `array` [rows, ...], and GPU memory."""

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        size = shape[0] * self.row_bytes
        self.pinned = call(cuda.cudaMallocHost(size))
        weakref.finalize(self, cuda.cudaFreeHost, self.pinned)
        self.device = call(cuda.cudaMalloc(size))
        weakref.finalize(self, cuda.cudaFree, self.device)
        memory = (ctypes.c_byte * size).from_address(int(self.pinned))
        self.array: Array = np.frombuffer(memory, dtype).reshape(shape)
        self.array[...] = 0


class TensorRTEngine:
    """A plan on one GPU, for one thread at a time.

    plan: the bytes of the plan that `manifest` describes. trt: the library that built it. cuda: the CUDA runtime.
    Raises CheckpointError when TensorRT rejects the plan.
    """

    def __init__(self, plan: bytes, manifest: Manifest, config: ModelConfig, gpu: Gpu, trt: Any, cuda: Any) -> None:
        self.manifest, self.config, self.gpu, self.trt, self.cuda = manifest, config, gpu, trt, cuda
        call(cuda.cudaSetDevice(gpu.number))
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        # A version-compatible plan holds the code of a runtime. `open` has compared its sha256 with the manifest.
        self.runtime.engine_host_code_allowed = manifest.version_compatible
        self.plan = self.runtime.deserialize_cuda_engine(plan)
        if self.plan is None:
            raise CheckpointError(f"{trt.__name__} {trt.__version__} rejects this plan on {gpu}; build it again")
        self.check_signature()
        self.most = manifest.rows[2]
        self.stream = call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.buffers = {name: self.buffer(name) for name in (*INPUT_NAMES, *OUTPUT_NAMES)}
        # Shared by all contexts, because they run one after another on one stream.
        self.scratch_bytes = max(1, self.plan.device_memory_size_v2)
        self.scratch = call(cuda.cudaMalloc(self.scratch_bytes))
        weakref.finalize(self, cuda.cudaFree, self.scratch)
        self.options = context_options(trt, self.plan, gpu, manifest)
        self.mixed = self.new_context()
        self.graphs: dict[int, Any] = {}
        self.contexts: list[Any] = []  # the graphs' own; a graph needs the context it was captured from
        self.warm_up()

    @classmethod
    def load(cls, model_dir: Path, *, device: str, precision: str = "fp32") -> "TensorRTEngine":
        """Load the plan of a model directory. Raises EngineUnavailableError without its library or GPU, CheckpointError
        when there is no plan, it does not fit its manifest, or it has not passed its checks."""
        check_runs(precision, "tensorrt")
        directory = read_model_dir(model_dir)
        plan = plan_path(model_dir, precision)
        if not plan.exists():
            raise CheckpointError(
                f"{model_dir} has no TensorRT plan in {precision}; "
                f"dsd-export {model_dir} --trt --precision {precision} builds it"
            )
        manifest = read_manifest(plan)
        engine = cls.open(plan, manifest, device)
        if not manifest.passed:
            raise CheckpointError(
                f"{plan} was built, but its checks have not run; dsd-export {model_dir} --check runs them on its GPU"
            )
        directory.check_unchanged()
        return engine

    @classmethod
    def open(cls, plan: Path, manifest: Manifest, device: str) -> "TensorRTEngine":
        """Load a plan that fits its manifest and this machine, whether or not its checks have run."""
        directory = read_model_dir(plan.parent)
        trt = import_library(manifest.library)
        cuda = import_runtime()
        gpu = find_gpu(cuda, device)
        check_plan(manifest, directory, trt.__version__, gpu)
        data = plan.read_bytes()
        check_bytes(plan, data, manifest)
        return cls(data, manifest, directory.config, gpu, trt, cuda)

    def check_signature(self) -> None:
        names = {self.plan.get_tensor_name(number) for number in range(self.plan.num_io_tensors)}
        if names != {*INPUT_NAMES, *OUTPUT_NAMES}:
            raise CheckpointError(f"the plan is of another network: its inputs and outputs are {sorted(names)}")

    def buffer(self, name: str) -> Buffer:
        shape = tuple(self.plan.get_tensor_shape(name))
        return Buffer(self.cuda, (self.most, *shape[1:]), self.trt.nptype(self.plan.get_tensor_dtype(name)))

    def new_context(self) -> Any:
        context = self.plan.create_execution_context(self.options)
        if context is None:
            raise EngineError("TensorRT cannot create an execution context: the GPU has too little memory")
        context.set_device_memory(int(self.scratch), self.scratch_bytes)
        for name, buffer in self.buffers.items():
            if not context.set_tensor_address(name, int(buffer.device)):
                raise EngineError(f"TensorRT rejects the memory of {name}")
        return context

    def warm_up(self) -> None:
        """Run each kind of row once and capture the graphs, so that the first request pays for nothing."""
        self.launch(self.mixed, (1, 1, 1))
        count = 1
        while count < 2 * self.most:
            self.add_graph(min(count, self.most))
            count *= 2
        save_runtime_cache(self.options, self.gpu, self.manifest)

    def add_graph(self, count: int) -> None:
        """Capture the CUDA graph of a tick of `count` denoise rows. Where that fails such ticks run without one."""
        try:
            context = self.new_context()
            self.launch(context, (0, count, 0))  # the library's work at first use cannot be captured
            self.graphs[count] = self.capture(context, (0, count, 0))
        except EngineDeadError:
            raise
        except EngineError as error:
            log.warning("ticks of %d rows run without a CUDA graph: %s", count, error)
            return
        weakref.finalize(self, self.cuda.cudaGraphExecDestroy, self.graphs[count])
        self.contexts.append(context)

    def capture(self, context: Any, counts: tuple[int, ...]) -> Any:
        """The CUDA graph of a call with the rows in the buffers. Raises EngineError; the capture has then ended, and no
        error of it is left for a later call to find."""
        cuda = self.cuda
        capturable = getattr(context, "is_stream_capturable", None)  # of tensorrt_rtx
        if capturable is not None and not capturable(int(self.stream)):
            raise EngineError(f"{self.trt.__name__} says that this plan cannot be captured; build it again")
        call(cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        graph = None
        try:
            try:
                self.enqueue(context, counts)
            finally:
                status, graph = cuda.cudaStreamEndCapture(self.stream)
            call((status,))
            return call(cuda.cudaGraphInstantiate(graph, 0))
        except EngineError:
            cuda.cudaGetLastError()
            raise
        finally:
            if graph:
                cuda.cudaGraphDestroy(graph)

    def launch(self, context: Any, counts: tuple[int, ...]) -> None:
        """Run the rows in the buffers and wait. counts: rows of each kind."""
        for name in INPUT_NAMES:
            shape = (counts[KIND_OF[name]], *self.buffers[name].array.shape[1:])
            if not context.set_input_shape(name, shape):
                raise EngineError(f"the plan rejects {shape[0]} rows in {name}")
        self.enqueue(context, counts)
        call(self.cuda.cudaStreamSynchronize(self.stream))

    def enqueue(self, context: Any, counts: tuple[int, ...]) -> None:
        kind = self.cuda.cudaMemcpyKind
        for name in INPUT_NAMES:
            self.copy(name, counts, kind.cudaMemcpyHostToDevice)
        if not context.execute_async_v3(int(self.stream)):
            call(self.cuda.cudaGetLastError())
            raise EngineError("TensorRT could not run the plan")
        for name in OUTPUT_NAMES:
            self.copy(name, counts, kind.cudaMemcpyDeviceToHost)

    def copy(self, name: str, counts: tuple[int, ...], kind: Any) -> None:
        buffer = self.buffers[name]
        if not (size := counts[KIND_OF[name]] * buffer.row_bytes):
            return
        to_device = kind == self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        target, source = (buffer.device, buffer.pinned) if to_device else (buffer.pinned, buffer.device)
        call(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def run(self, rows: Sequence[Row]) -> list[Array]:
        call(self.cuda.cudaSetDevice(self.gpu.number))  # a setting of the thread, and the batcher has its own
        results: list[Array | None] = [None] * len(rows)
        for numbers in self.calls(rows):
            for number, output in zip(numbers, self.run_call([rows[i] for i in numbers]), strict=True):
                results[number] = output
        return [result for result in results if result is not None]

    def calls(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """The numbers of the rows, in lists with at most as many of each kind as the plan allows."""
        of_kinds = [[i for i, row in enumerate(rows) if isinstance(row, kind)] for kind in KINDS]
        for start in range(0, max(map(len, of_kinds)), self.most):
            yield sorted(number for numbers in of_kinds for number in numbers[start : start + self.most])

    def run_call(self, rows: Sequence[Row]) -> list[Array]:
        counts = tuple(sum(isinstance(row, kind) for row in rows) for kind in KINDS)
        for name, array in collate(rows, self.config).items():
            self.buffers[name].array[: len(array)] = array
        graph = self.padded(counts)
        if graph is not None:
            call(self.cuda.cudaGraphLaunch(graph, self.stream))
            call(self.cuda.cudaStreamSynchronize(self.stream))
        else:
            self.launch(self.mixed, counts)
        outputs = [self.buffers[name].array[: counts[KIND_OF[name]]].copy() for name in OUTPUT_NAMES]
        return distribute(rows, outputs)

    def padded(self, counts: tuple[int, ...]) -> Any:
        """The smallest graph that fits these rows, or None. The padding is rows of earlier ticks, whose outputs are
        dropped; no row depends on another."""
        if counts[0] or counts[2]:
            return None
        enough = min((size for size in self.graphs if size >= counts[1]), default=None)
        return None if enough is None else self.graphs[enough]

    def layers(self) -> str:
        """The layers that TensorRT built, from its inspector, as JSON.

        Of a plan with dynamic shapes it names the types of tensors only in a context whose shapes are set.
        """
        inspector = self.plan.create_engine_inspector()
        inspector.execution_context = self.mixed
        return str(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "tensorrt",
            "device": f"cuda:{self.gpu.number}",
            "provider": f"{self.manifest.library} on {self.gpu.name}",
            "precision": self.manifest.precision,
            "cuda_graphs": ", ".join(map(str, sorted(self.graphs))) or "none",
            "plan": self.manifest.plan[:12],  # two plans of one graph may give other bits, so an ETag must differ
            "version": self.manifest.library_version,
        }
