"""The torch engine: the reference for the others in float32, and on a GPU a fast one that needs no other library.

In fp16 and bf16 it computes as the exported graphs do: matrix products and attention of the blocks in the half type,
norms, conditioning, sums and both borders in float32. On CUDA the ticks of denoise rows are CUDA graphs, and two passes
may be under way.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsd_serve.checkpoint import read_model_dir, read_weights
from dsd_serve.engines.cuda import failure
from dsd_serve.errors import CheckpointError, EngineDeadError, EngineUnavailableError
from dsd_serve.network import DSD
from dsd_serve.precision import PRECISIONS, REFERENCE
from dsd_serve.rows import DENOISE, Array, Row, RowCounts, collate, count_rows, distribute, inputs_of

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64)  # rows of the CUDA graphs
Call = Callable[[], Tensor]
Recorder = Callable[[Call], tuple[Callable[[], Any], Tensor]]


class HalfBlock(nn.Module):
    """A block of the network whose matrix products are in `dtype`, between float32 tensors."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block, dtype
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)  # autocast would cast float32 weights in every call

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            return self.block(x, modulation)


class TorchEngine:
    """A network in torch, on any device that torch supports."""

    def __init__(self, model: DSD, precision: str = REFERENCE) -> None:
        self.config, self.precision = model.config, precision
        if precision != REFERENCE:
            dtype = getattr(torch, PRECISIONS[precision].dtype)
            model.blocks = nn.ModuleList(HalfBlock(block, dtype) for block in model.blocks)
        self.model = model.eval()
        self.device = model.role_embed.weight.device

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "cpu",
        num_threads: int = 0,
        precision: str = REFERENCE,
        graphs: bool = True,
    ) -> "TorchEngine":
        """Load a model directory.

        precision: one in which it was exported, and so verified. graphs: on CUDA, run denoise rows as CUDA graphs.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        directory = read_model_dir(model_dir)
        if precision != REFERENCE:
            directory.graph(precision)  # raises CheckpointError if there is none
        directory.check([directory.weights])
        model = DSD(directory.config)
        weights = {name: torch.from_numpy(array) for name, array in read_weights(model_dir).items()}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{model_dir}: the weights do not fit config.json: {first_words(error)}") from None
        try:
            model = model.to(device)
            if model.role_embed.weight.device.type == "cuda":
                return CudaTorchEngine(model, precision, graphs=graphs)
            return cls(model, precision)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise EngineUnavailableError(f"engine 'torch' cannot use device {device!r}: {reason}") from None

    def run(self, rows: Sequence[Row]) -> list[Array]:
        inputs = [torch.from_numpy(array) for array in collate(rows, self.config).values()]
        with torch.inference_mode(), named_failures():
            outputs = self.model(*(tensor.to(self.device) for tensor in inputs))
            return distribute(rows, [output.cpu().numpy() for output in outputs])

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "device": str(self.device),
            "precision": self.precision,
            "version": torch.__version__,
        }


class CudaTorchEngine(TorchEngine):
    """A network in torch on CUDA, where all passes run in one stream, one after another.

    Each pass has new pinned memory, which torch keeps for later ones, and does not give away while a copy is under way.
    """

    def __init__(self, model: DSD, precision: str = REFERENCE, *, graphs: bool = True) -> None:
        super().__init__(model, precision)
        self.graphs = DenoiseGraphs(self.model, Capture(self.device)) if graphs else None

    def run(self, rows: Sequence[Row]) -> list[Array]:
        return self.start(rows)()

    def start(self, rows: Sequence[Row]) -> Callable[[], list[Array]]:
        torch.cuda.set_device(self.device)  # a setting of the thread, and the batcher has its own
        inputs = [torch.from_numpy(array) for array in collate(rows, self.config).values()]
        with torch.inference_mode(), named_failures():
            outputs = self.forward([pinned(tensor) for tensor in inputs], count_rows(rows))
            outputs = [to_host(output) for output in outputs]
            event = torch.cuda.Event()
            event.record()

        def wait() -> list[Array]:
            with torch.inference_mode(), named_failures():
                event.synchronize()
                return distribute(rows, [output.clone().numpy() for output in outputs])  # results may live for long

        return wait

    def forward(self, inputs: Sequence[Tensor], counts: RowCounts) -> Sequence[Tensor]:
        """The outputs on the device, of inputs in pinned memory."""
        if self.graphs and not counts.encode and not counts.decode and self.graphs.fits(counts.denoise):
            none = inputs[0]
            return none, self.graphs.run(inputs), none
        return self.model(*(tensor.to(self.device, non_blocking=True) for tensor in inputs))

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({} if self.graphs is None else {"cuda_graphs": self.graphs.sizes()})


def pinned(tensor: Tensor) -> Tensor:
    """A copy of a tensor of the CPU in pinned memory."""
    return tensor.pin_memory() if tensor.numel() else tensor


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in pinned memory that will hold a copy of `tensor` once the work in the stream is done."""
    pin = tensor.is_cuda and tensor.numel() > 0
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin).copy_(tensor, non_blocking=True)


@contextmanager
def named_failures() -> Iterator[None]:
    """Raises EngineError for the errors of torch, EngineDeadError after those that leave CUDA useless."""
    try:
        yield
    except RuntimeError as error:  # torch.AcceleratorError has the status of CUDA
        raise failure(f"torch failed: {first_words(error)}", getattr(error, "error_code", 0)) from error


class DenoiseGraphs:
    """Denoise rows on a device as one recorded call for each of SIZES; a tick is padded to the next of them.

    record: runs a call, and returns a function that repeats it in the same memory, and its output. A size that cannot
    be recorded is left out, as are those above it.
    """

    def __init__(self, model: DSD, record: Recorder) -> None:
        device = model.role_embed.weight.device
        self.inputs: list[Tensor] = []  # those of other rows are empty
        for given in inputs_of(model.config):
            count = SIZES[-1] if given.kind == DENOISE else 0
            self.inputs.append(torch.from_numpy(np.zeros((count, *given.shape), given.dtype)).to(device))
        self.recorded: dict[int, tuple[Callable[[], Any], Tensor]] = {}
        for size in SIZES:
            rows = [tensor[:size] for tensor in self.inputs]
            try:
                with torch.inference_mode():
                    self.recorded[size] = record(lambda rows=rows: model(*rows)[1])  # type: ignore[misc]
            except RuntimeError as error:
                reason = failure(f"torch cannot record a call: {first_words(error)}", getattr(error, "error_code", 0))
                if isinstance(reason, EngineDeadError):
                    raise reason from None
                log.warning("ticks of %d rows and more run without a CUDA graph: %s", size, reason)
                break

    def fits(self, count: int) -> bool:
        return 0 < count <= max(self.recorded, default=0)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """z_hat [M, L, C] of the inputs of the graph with M denoise rows alone. The next call overwrites it."""
        count = max(map(len, inputs))
        replay, output = self.recorded[min(size for size in self.recorded if size >= count)]
        for given, tensor in zip(inputs, self.inputs, strict=True):
            tensor[: len(given)].copy_(given, non_blocking=True)
        replay()  # the padding is rows of earlier ticks; no row depends on another
        return output[:count]

    def sizes(self) -> str:
        return ", ".join(map(str, self.recorded)) or "none"


class Capture:
    """Records calls as CUDA graphs. They share their memory, because they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Call) -> tuple[Callable[[], Any], Tensor]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries need a first call outside a capture
                for _ in range(2):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                output = call()
        return graph.replay, output


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
