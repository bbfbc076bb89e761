"""A test double of a GPU: the CUDA runtime and TensorRT as TensorRTEngine calls them, in this process's memory.

GPU memory is host memory filled with junk. A copy outside an allocation, or of the wrong kind, is an error. The device
does nothing until somebody waits for it, so that what is read too early is junk, and what is overwritten too early is
an error. Captured work runs when the graph is launched. ONNX Runtime runs the network on the addresses that were set.
This tests the engine's shapes, sizes, addresses and order, and not TensorRT itself.
"""

import ctypes
import enum
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

STATUSES = {
    "cudaSuccess": 0,
    "cudaErrorInvalidValue": 1,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorIllegalAddress": 700,
    "cudaErrorStreamCaptureUnsupported": 900,
    "cudaErrorStreamCaptureInvalidated": 901,
}
Status = enum.IntEnum("Status", STATUSES)
Kind = enum.Enum("Kind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"])
OK = Status.cudaSuccess
JUNK = 0x7F  # a byte of labels that do not exist and of numbers near the largest
CALL_MS, ROW_MS = 0.7, 0.08  # simulated time of a call of the network, and of each of its rows


class Cuda:
    """The functions of `cuda.bindings.runtime`, for one stream."""

    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1
    cudaEventDefault, cudaEventDisableTiming = 0, 2

    def __init__(self, name: str = "Double 1", capability: tuple[int, int] = (9, 0), count: int = 1) -> None:
        self.properties = SimpleNamespace(name=name.encode() + b"\0\0", major=capability[0], minor=capability[1])
        self.count = count
        self.memory: dict[int, tuple[str, Any]] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.queue: deque[Callable[[], None]] = deque()  # work of the stream
        self.events: dict[int, list[Any]] = {}  # flags, records that are to come, the time of the last
        self.targets: set[int] = set()  # pinned memory that the device is going to write
        self.ms = 0.0  # of the device
        self.host_ms = 5.0  # for which the device waits in a call of the network that is not in a graph
        self.calls: list[tuple[bool, tuple[int, ...]]] = []  # of the network: in a graph, rows of each input
        self.num_launches = self.num_allocations = 0
        self.last = OK  # of cudaGetLastError, which clears it
        self.broken: Status = OK  # what every call answers from now on, as after an illegal address
        self.capture_fails = False  # something that a capture does not allow
        self.current = 0  # the device of this thread

    def cudaGetDeviceCount(self):
        return OK, self.count

    def cudaGetDeviceProperties(self, number):
        return OK, self.properties

    def cudaSetDevice(self, number):
        if number >= self.count:
            return (Status.cudaErrorInvalidValue,)
        self.current = number
        return (self.broken,)

    def cudaGetLastError(self):
        last, self.last = self.broken or self.last, OK
        return (last,)

    def cudaStreamCreateWithFlags(self, flags):
        return OK, 7

    def cudaStreamSynchronize(self, stream):
        assert self.captured is None, "a stream that is captured cannot be waited for"
        while self.queue:
            self.queue.popleft()()
        return (self.broken,)

    def cudaEventCreateWithFlags(self, flags):
        self.events[len(self.events) + 100] = [flags, 0, None]
        return OK, len(self.events) + 99

    def cudaEventRecord(self, event, stream):
        state = self.events[event]

        def record():
            state[1:] = state[1] - 1, self.ms

        state[1] += 1
        self.do(record)
        return (self.broken,)

    def cudaEventSynchronize(self, event):
        """Runs what is in the stream before the last record of the event, and no more."""
        while self.events[event][1]:
            self.queue.popleft()()
        return (self.broken,)

    def cudaEventElapsedTime(self, begin, end):
        (flags, pending, began), (_, also_pending, ended) = self.events[begin], self.events[end]
        assert flags == self.cudaEventDefault and not pending and not also_pending
        return OK, ended - began

    def cudaMemGetInfo(self):
        return OK, 10**9 - self.num_allocations, 10**9

    def cudaMemsetAsync(self, address, value, size, stream):
        self.within(address, size, "device")
        self.do(lambda: ctypes.memset(address, value, size))
        return (self.broken,)

    def allocate(self, where, size):
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, JUNK, size)
        self.num_allocations += 1
        self.memory[ctypes.addressof(block)] = (where, block)
        return OK, ctypes.addressof(block)

    def cudaMallocHost(self, size):
        return self.allocate("host", size)

    def cudaMalloc(self, size):
        return self.allocate("device", size)

    def cudaFree(self, address):
        return (OK,)  # memory lives as long as this object, so premature frees are not detected

    cudaFreeHost = cudaGraphDestroy = cudaGraphExecDestroy = cudaEventDestroy = cudaFree

    def within(self, address, size, where):
        for start, (found, block) in self.memory.items():
            # < because the end of an allocation may be the start of the next
            if start <= address < start + len(block) and address + size <= start + len(block):
                assert found == where, f"{where} memory is needed, and this is of the {found}"
                return
        raise AssertionError(f"{size} bytes at {address} are not allocated")

    def do(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        to_device = kind is Kind.cudaMemcpyHostToDevice
        self.within(target, size, "device" if to_device else "host")
        self.within(source, size, "host" if to_device else "device")
        assert self.captured is None, "the memory of a pass must not be in a graph, which serves others"
        if to_device:
            given = ctypes.string_at(source, size)

            def copy():
                assert ctypes.string_at(source, size) == given, "overwritten before the device has copied it"
                ctypes.memmove(target, source, size)
        else:
            assert target not in self.targets, "a pass under way is to write this memory"
            self.targets.add(target)
            ctypes.memset(target, JUNK, size)

            def copy():
                self.targets.remove(target)
                ctypes.memmove(target, source, size)

        self.do(copy)
        return (self.broken,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.captured is None
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        captured, self.captured = self.captured, None
        if self.capture_fails:
            self.last = Status.cudaErrorStreamCaptureInvalidated
            return self.last, None
        return OK, captured

    def cudaGraphInstantiate(self, graph, flags):
        return OK, graph

    def cudaGraphLaunch(self, graph, stream):
        self.num_launches += 1
        if not self.broken:
            self.queue.extend(graph)
        return (self.broken,)


class TensorRT:
    """The names of `tensorrt` that the engine uses. A plan is the path of an ONNX graph, perhaps after HOST_CODE."""

    __name__, __version__ = "tensorrt", "11.4.0.106"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    LayerInformationFormat = SimpleNamespace(JSON=1)

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None: ...

    def __init__(self, cuda: Cuda, layers: str = '{"Layers": []}') -> None:
        self.cuda, self.layers = cuda, layers

    def nptype(self, dtype):
        return dtype

    def Runtime(self, logger):
        return Runtime(self)


class TensorRTX(TensorRT):
    """`tensorrt_rtx`, which compiles at run time. kernels: those that were compiled, by shapes.

    With the strategy LAZY, its default, a first call of a shape runs a fallback, whose bits differ.
    """

    __name__, __version__ = "tensorrt_rtx", "1.7.1.116"
    DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
    ComputeCapability = SimpleNamespace(__members__={"SM86": 86, "SM89": 89, "SM120": 120})
    user_allocation = True  # whether the plan was built with REQUIRE_USER_ALLOCATION

    def __init__(self, cuda: Cuda, layers: str = '{"Layers": []}') -> None:
        super().__init__(cuda, layers)
        self.compiled: list[Any] = []


class RuntimeConfig:
    def __init__(self, trt: TensorRTX) -> None:
        self.strategy = None
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True

    def get_runtime_cache(self):
        return self.cache


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob):
        lines = bytes(blob).decode(errors="replace").splitlines()
        if lines[:1] != ["kernels of the double"]:
            return False
        self.kernels = set(lines[1:])
        return True

    def serialize(self):
        return "\n".join(["kernels of the double", *sorted(self.kernels)]).encode()


HOST_CODE = b"host code:"


class Runtime:
    """Rejects a plan with host code unless that is allowed, as by default it is not."""

    engine_host_code_allowed = False

    def __init__(self, trt: TensorRT) -> None:
        self.trt = trt

    def deserialize_cuda_engine(self, plan: bytes):
        if plan.startswith(HOST_CODE) and not self.engine_host_code_allowed:
            return None
        path = Path(plan.removeprefix(HOST_CODE).decode(errors="replace"))
        return Plan(self.trt, path) if path.is_file() else None


TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(int64)": np.int64}


class Plan:
    device_memory_size_v2 = 256

    def __init__(self, trt: TensorRT, graph: Path) -> None:
        self.trt, self.session = trt, onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.tensors = {tensor.name: tensor for tensor in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, number):
        return list(self.tensors)[number]

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_dtype(self, name):
        return TYPES[self.tensors[name].type]

    def create_execution_context(self, options):
        strategy = options.strategy if isinstance(options, RuntimeConfig) else options
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED, "it would allocate in calls"
        return Context(self, options)

    def create_runtime_config(self):
        assert isinstance(self.trt, TensorRTX)
        return RuntimeConfig(self.trt)

    def create_engine_inspector(self):
        return Inspector(self)


class Inspector:
    """Names types only in a context whose shapes are set, as a plan with dynamic shapes does."""

    execution_context = None

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def get_engine_information(self, kind):
        values = json.loads(self.plan.trt.layers)
        context = self.execution_context
        if context is None or set(context.shapes) != {tensor.name for tensor in self.plan.session.get_inputs()}:
            for output in (output for layer in values["Layers"] for output in layer.get("Outputs", ())):
                output["Format/Datatype"] = "N/A due to dynamic shapes"
        return json.dumps(values)


class Context:
    def __init__(self, plan: Plan, options: Any) -> None:
        self.plan, self.options = plan, options
        self.shapes, self.addresses, self.scratch = {}, {}, None
        self.pending = 0  # calls that are under way

    def is_stream_capturable(self, stream):
        return getattr(self.plan.trt, "user_allocation", True)

    def set_device_memory(self, address, size):
        assert size >= self.plan.device_memory_size_v2
        self.plan.trt.cuda.within(address, size, "device")
        self.scratch = address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        assert not self.pending, "the shapes of a call under way must not change"
        self.shapes[name] = tuple(shape)
        return 0 <= shape[0] <= 64

    def execute_async_v3(self, stream):
        cuda = self.plan.trt.cuda
        inputs = {tensor.name for tensor in self.plan.session.get_inputs()}
        if self.scratch is None or set(self.shapes) != inputs or set(self.addresses) != set(self.plan.tensors):
            return False  # TensorRT runs nothing until all shapes, addresses and its own memory are set
        if cuda.broken:
            return False
        shapes = dict(self.shapes)
        fallback = self.compile(str(sorted(shapes.items())))
        in_graph = cuda.captured is not None
        rows = tuple(shapes[name][0] for name in ("encode_pixels", "denoise_latents", "decode_latents"))
        self.pending += not in_graph

        def execute():
            self.pending -= not in_graph
            cuda.calls.append((in_graph, rows))
            cuda.ms += CALL_MS + ROW_MS * sum(rows) + (0 if in_graph else cuda.host_ms)
            inputs = {name: self.read(name, shape) for name, shape in shapes.items()}
            names = [output.name for output in self.plan.session.get_outputs()]
            for name, output in zip(names, self.plan.session.run(names, inputs), strict=True):
                output = output + output.dtype.type(1e-6) if fallback else output
                self.plan.trt.cuda.within(self.addresses[name], output.nbytes, "device")
                ctypes.memmove(self.addresses[name], np.ascontiguousarray(output).ctypes.data, output.nbytes)

        self.plan.trt.cuda.do(execute)
        return True

    def compile(self, shapes: str) -> bool:
        """Whether this call runs a fallback; the kernel is compiled unless the cache has it."""
        trt, options = self.plan.trt, self.options
        if not isinstance(trt, TensorRTX) or (options.cache and shapes in options.cache.kernels):
            return False
        trt.compiled.append(shapes)
        if options.cache is not None:
            options.cache.kernels.add(shapes)
        strategy = options.dynamic_shapes_kernel_specialization_strategy
        return strategy is not trt.DynamicShapesKernelSpecializationStrategy.EAGER

    def read(self, name, shape):
        dtype = np.dtype(self.plan.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        self.plan.trt.cuda.within(self.addresses[name], size, "device")
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)
