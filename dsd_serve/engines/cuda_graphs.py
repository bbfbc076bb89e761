"""The CUDA graphs of a network: which calls are captured, how long each takes, and which of them run a tick.

A graph is one call of the network with rows of one kind, padded to the next number that was captured. A tick of several
kinds is one graph for each of them, in turn. Padding and additional calls take time on the device, so a tick for which
that would be too much, by the times measured at the start, runs without a graph.
"""

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_serve.engines.cuda import call
from dsd_serve.errors import EngineDeadError, EngineError
from dsd_serve.rows import DENOISE, RowCounts

log = logging.getLogger(__name__)

BORDER = (1, 2, 4, 8)
SIZES = (BORDER, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64), BORDER)  # of encode, denoise and decode rows
KINDS = RowCounts._fields
# Of the graphs of a tick, in times that of the same rows without a graph. Above 1 because shapes change from tick to
# tick, which costs the host more than was measured.
MOST_TIME = 1.15
MOST_SECONDS = 60.0  # after which nothing more is captured: a library may compile kernels for each number of rows
REPEATS = 3  # of each measurement, of which the best counts


@dataclass(frozen=True)
class Graph:
    """A captured call. context: what it was captured from, and needs as long as it lives. ms: the time it takes."""

    executable: Any
    context: Any
    ms: float


class CudaGraphs:
    """The graphs of one stream.

    compiles: whether kernels are compiled before the first call of each number of rows, which takes longer than any
    padding.
    captured: by (place of the kind in RowCounts, number of rows). plain_ms: the milliseconds of a call of so many
    denoise rows without a graph.
    """

    def __init__(self, cuda: Any, stream: Any, *, compiles: bool = False) -> None:
        self.cuda, self.stream, self.compiles = cuda, stream, compiles
        self.captured: dict[tuple[int, int], Graph] = {}
        self.plain_ms: dict[int, float] = {}
        self.events = [call(cuda.cudaEventCreateWithFlags(cuda.cudaEventDefault)) for _ in range(2)]
        for event in self.events:
            weakref.finalize(self, cuda.cudaEventDestroy, event)

    def capture_all(self, most: int, new_context: Callable[[], Any], enqueue: Callable[[Any, RowCounts], None]) -> None:
        """Capture calls of all SIZES up to `most` rows, those of denoise rows first.

        enqueue: puts a call of the network in the stream. The first failure, which the next would share, ends this, as
        do MOST_SECONDS. Raises EngineDeadError.
        """
        began, (before, _) = time.monotonic(), call(self.cuda.cudaMemGetInfo())
        for kind, size in wanted(most):
            if time.monotonic() - began > MOST_SECONDS:
                log.warning("no more CUDA graphs are captured after %.0f s", MOST_SECONDS)
                break
            counts = RowCounts(*(size if place == kind else 0 for place in range(len(KINDS))))
            try:
                context = new_context()
                executable, plain, ms = self.capture(context, lambda c=context, n=counts: enqueue(c, n))  # type: ignore[misc]
            except EngineDeadError:
                raise
            except EngineError as error:
                log.warning("ticks of %d %s rows and more run without a CUDA graph: %s", size, KINDS[kind], error)
                break
            self.captured[kind, size] = Graph(executable, context, ms)
            if kind == DENOISE:
                self.plain_ms[size] = plain
        seconds, (after, _) = time.monotonic() - began, call(self.cuda.cudaMemGetInfo())
        megabytes = (before - after) / 1e6
        log.info("%d CUDA graphs captured in %.1f s, %.0f MB on the GPU", len(self.captured), seconds, megabytes)

    def capture(self, context: Any, enqueue: Callable[[], None]) -> tuple[Any, float, float]:
        """The graph of what `enqueue` puts in the stream, and the milliseconds of that without and with the graph.

        Raises EngineError; the capture has then ended, and no error of it is left for a later call to find.
        """
        enqueue()  # the library's work at first use cannot be captured
        plain = self.time(enqueue)
        cuda = self.cuda
        capturable = getattr(context, "is_stream_capturable", None)  # of tensorrt_rtx
        if capturable is not None and not capturable(int(self.stream)):
            raise EngineError("TensorRT says that this plan cannot be captured; build it again")
        call(cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        graph = None
        try:
            try:
                enqueue()
            finally:
                status, graph = cuda.cudaStreamEndCapture(self.stream)
            call((status,))
            executable = call(cuda.cudaGraphInstantiate(graph, 0))
        except EngineError:
            cuda.cudaGetLastError()
            raise
        finally:
            if graph:
                cuda.cudaGraphDestroy(graph)
        weakref.finalize(self, cuda.cudaGraphExecDestroy, executable)
        return executable, plain, self.time(lambda: self.launch(executable))

    def time(self, work: Callable[[], None]) -> float:
        """The milliseconds from the begin of some work to its end on the device, waits for the host included."""
        begin, end = self.events
        best = float("inf")
        for _ in range(REPEATS):
            call(self.cuda.cudaStreamSynchronize(self.stream))
            call(self.cuda.cudaEventRecord(begin, self.stream))
            work()
            call(self.cuda.cudaEventRecord(end, self.stream))
            call(self.cuda.cudaEventSynchronize(end))
            best = min(best, call(self.cuda.cudaEventElapsedTime(begin, end)))
        return best

    def launch(self, executable: Any) -> None:
        call(self.cuda.cudaGraphLaunch(executable, self.stream))

    def choose(self, counts: RowCounts) -> list[Graph] | None:
        """The smallest graph that fits the rows of each kind, or None if one is missing or a call without graphs is
        faster."""
        chosen = []
        for kind, count in enumerate(counts):
            if not count:
                continue
            size = min((size for of, size in self.captured if of == kind and size >= count), default=None)
            if size is None:
                return None
            chosen.append(self.captured[kind, size])
        if self.compiles or sum(graph.ms for graph in chosen) <= MOST_TIME * self.plain(sum(counts)):
            return chosen
        return None

    def plain(self, rows: int) -> float:
        """The milliseconds of a call without a graph, estimated from the calls that were measured."""
        sizes = sorted(self.plain_ms)
        times = [self.plain_ms[size] for size in sizes]
        return float(np.interp(rows, sizes, times)) * max(1.0, rows / sizes[-1])

    def describe(self) -> str:
        """The numbers of rows of each kind that have a graph."""
        sizes = {name: [size for of, size in self.captured if of == kind] for kind, name in enumerate(KINDS)}
        parts = [f"{name} {', '.join(map(str, of))}" for name, of in sizes.items() if of]
        return "; ".join(parts) or "none"


def wanted(most: int) -> Iterator[tuple[int, int]]:
    """The kinds and numbers of rows of the graphs to capture, denoise rows first."""
    for kind in sorted(range(len(KINDS)), key=lambda kind: kind != DENOISE):
        for size in SIZES[kind]:
            if size <= most:
                yield kind, size
