"""The TensorRT engine: runs the plans that `dsd-export --trt` builds, on a GPU, with cuda-bindings and without torch.

Two passes may be under way. Each has pinned memory of its own for its rows and outputs, and an event that ends it. They
share one stream, in which the device runs them one after another, and so all memory of the device. Most ticks are
launches of CUDA graphs, the others run the network with exactly their rows. All memory is allocated when the plan is
loaded, none in a tick.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.engines.cuda import Gpu, call, find_gpu, import_runtime
from dsd_serve.engines.cuda_graphs import CudaGraphs
from dsd_serve.engines.plan import Manifest, check_bytes, check_plan, import_library, plan_path, read_manifest
from dsd_serve.engines.runtime_cache import compiles, context_options, save_runtime_cache
from dsd_serve.errors import CheckpointError, EngineError
from dsd_serve.precision import check_runs
from dsd_serve.rows import (
    Array,
    Decode,
    Denoise,
    Encode,
    GraphTensor,
    Row,
    RowCounts,
    collate,
    count_rows,
    distribute,
    inputs_of,
    outputs_of,
)

KINDS = (Encode, Denoise, Decode)
PASSES = 2  # that may be under way


class Buffer:
    """GPU memory of one input or output of the plan. shape: [rows, ...]."""

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self.size = shape[0] * self.row_bytes
        self.device = call(cuda.cudaMalloc(self.size))
        weakref.finalize(self, cuda.cudaFree, self.device)


class Staging:
    """What a pass under way has of its own: pinned memory, viewed as `arrays` by name, and the event that ends it.

    context: of its calls without a graph, because the shapes of a context may change only when its last call is done.
    """

    def __init__(self, cuda: Any, buffers: dict[str, Buffer], context: Any) -> None:
        self.context = context
        self.event = call(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
        weakref.finalize(self, cuda.cudaEventDestroy, self.event)
        self.pinned: dict[str, Any] = {}
        self.arrays: dict[str, Array] = {}
        for name, buffer in buffers.items():
            self.pinned[name] = call(cuda.cudaMallocHost(buffer.size))
            weakref.finalize(self, cuda.cudaFreeHost, self.pinned[name])
            memory = (ctypes.c_byte * buffer.size).from_address(int(self.pinned[name]))
            self.arrays[name] = np.frombuffer(memory, buffer.dtype).reshape(buffer.shape)


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
        self.inputs, self.outputs = inputs_of(config), outputs_of(config)
        self.check_signature()
        self.most = manifest.rows[2]
        self.stream = call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.buffers = {one.name: self.buffer(one.name) for one in (*self.inputs, *self.outputs)}
        # Shared by all contexts, because they run one after another on one stream.
        self.scratch_bytes = max(1, self.plan.device_memory_size_v2)
        self.scratch = call(cuda.cudaMalloc(self.scratch_bytes))
        weakref.finalize(self, cuda.cudaFree, self.scratch)
        self.options = context_options(trt, self.plan, gpu, manifest)
        self.stagings = [Staging(cuda, self.buffers, self.new_context()) for _ in range(PASSES)]
        self.free = list(self.stagings)
        self.graphs = CudaGraphs(cuda, self.stream, compiles=compiles(trt))
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
        if names != {one.name for one in (*self.inputs, *self.outputs)}:
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
        # Padding may be read before any row was in its place, and its labels must exist.
        for buffer in self.buffers.values():
            call(self.cuda.cudaMemsetAsync(buffer.device, 0, buffer.size, self.stream))
        for staging in self.stagings:
            self.enqueue(staging.context, RowCounts(1, 1, 1))
            call(self.cuda.cudaStreamSynchronize(self.stream))
        # The graphs hold the network and not the copies, whose pinned memory differs from pass to pass. So one graph
        # serves all passes, only the rows that there are get copied, and the copies cost a few more calls.
        self.graphs.capture_all(self.most, self.new_context, self.enqueue)
        save_runtime_cache(self.options, self.gpu, self.manifest)

    def enqueue(self, context: Any, counts: RowCounts) -> None:
        """Put a call of the network over the rows in GPU memory in the stream."""
        for one in self.inputs:
            if not context.set_input_shape(one.name, (counts[one.kind], *one.shape)):
                raise EngineError(f"the plan rejects {counts[one.kind]} rows in {one.name}")
        if not context.execute_async_v3(int(self.stream)):
            call(self.cuda.cudaGetLastError())
            raise EngineError("TensorRT could not run the plan")

    def run(self, rows: Sequence[Row]) -> list[Array]:
        return self.start(rows)()

    def start(self, rows: Sequence[Row]) -> Callable[[], list[Array]]:
        """Begin a pass. Of more rows of a kind than the plan takes all calls but the last are waited for here."""
        call(self.cuda.cudaSetDevice(self.gpu.number))  # a setting of the thread, and the batcher has its own
        results: list[Array | None] = [None] * len(rows)
        finish: Callable[[], None] | None = None
        for numbers in self.calls(rows):
            if finish is not None:
                finish()
            finish = self.start_call(rows, numbers, results)

        def wait() -> list[Array]:
            if finish is not None:
                finish()
            return [result for result in results if result is not None]

        return wait

    def calls(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """The numbers of the rows, in lists with at most as many of each kind as the plan allows."""
        of_kinds = [[i for i, row in enumerate(rows) if isinstance(row, kind)] for kind in KINDS]
        for start in range(0, max(map(len, of_kinds)), self.most):
            yield sorted(number for numbers in of_kinds for number in numbers[start : start + self.most])

    def start_call(self, rows: Sequence[Row], numbers: list[int], results: list[Array | None]) -> Callable[[], None]:
        """Begin a call with the rows of these numbers, and return the function that waits for it and puts its outputs
        in `results`."""
        called = [rows[number] for number in numbers]
        inputs, counts = collate(called, self.config), count_rows(called)
        if not self.free:
            raise EngineError(f"{PASSES} passes are under way; wait for the first of them")
        staging = self.free.pop()
        try:
            for name, array in inputs.items():
                staging.arrays[name][: len(array)] = array
            self.submit(staging, counts)
        except BaseException:
            self.cuda.cudaStreamSynchronize(self.stream)  # its copies may be under way; its status would be the same
            self.free.append(staging)
            raise

        def finish() -> None:
            try:
                call(self.cuda.cudaEventSynchronize(staging.event))
                outputs = [staging.arrays[one.name][: counts[one.kind]].copy() for one in self.outputs]
            finally:
                self.free.append(staging)
            for number, output in zip(numbers, distribute(called, outputs), strict=True):
                results[number] = output

        return finish

    def submit(self, staging: Staging, counts: RowCounts) -> None:
        """Put in the stream a call with the rows in `staging`: copies to the GPU, network, copies back and event."""
        kind = self.cuda.cudaMemcpyKind
        for one in self.inputs:
            self.copy(self.buffers[one.name].device, staging.pinned[one.name], one, counts, kind.cudaMemcpyHostToDevice)
        if (graphs := self.graphs.choose(counts)) is not None:
            for graph in graphs:
                self.graphs.launch(graph.executable)
        else:
            self.enqueue(staging.context, counts)
        for one in self.outputs:
            self.copy(staging.pinned[one.name], self.buffers[one.name].device, one, counts, kind.cudaMemcpyDeviceToHost)
        call(self.cuda.cudaEventRecord(staging.event, self.stream))

    def copy(self, target: Any, source: Any, one: GraphTensor, counts: RowCounts, kind: Any) -> None:
        if size := counts[one.kind] * self.buffers[one.name].row_bytes:
            call(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def layers(self) -> str:
        """The layers that TensorRT built, from its inspector, as JSON.

        Of a plan with dynamic shapes it names the types of tensors only in a context whose shapes are set.
        """
        inspector = self.plan.create_engine_inspector()
        inspector.execution_context = self.stagings[0].context
        return str(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "tensorrt",
            "device": f"cuda:{self.gpu.number}",
            "provider": f"{self.manifest.library} on {self.gpu.name}",
            "precision": self.manifest.precision,
            "cuda_graphs": self.graphs.describe(),
            "plan": self.manifest.plan[:12],  # two plans of one graph may give other bits, so an ETag must differ
            "version": self.manifest.library_version,
        }
