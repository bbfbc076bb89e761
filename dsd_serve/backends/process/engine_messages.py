"""Messages between a process that has tasks and one that carries them out: plain values in msgpack, arrays in frames.

A server and its engine process exchange them, and so do an HTTP worker and its main process (`server/workers/`).

A bundle is a list of messages, sent as one multipart message: first their values, then the bytes of their arrays in
order. Every value is checked when it is read, and no message can name code, as a pickle does.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from dsd_serve import errors
from dsd_serve.errors import DSDError, EngineError, InputError, QueueFullError
from dsd_serve.rows import Array

MAX_TEXT = 2000  # characters of a sentence or a line of the log


class BrokenMessage(Exception):
    """A bundle that cannot be read; the text says why."""


class EngineSettings(Struct, frozen=True):
    """The arguments of `loading.load` for the engine process, by their names there."""

    model: str
    engine: str = "onnx"
    device: str = "cpu"
    precision: str = "auto"
    threads: int = 0
    row_budget: int = 0


class Start(Struct):
    """The first line of a child process's standard input, in JSON. endpoint: of the socket of its parent."""

    endpoint: str
    parent: int


class StartEngine(Start):
    """log_level: a number of `logging`."""

    settings: EngineSettings
    log_level: int


class ArrayHead(Struct, array_like=True):
    """The type and shape of an array, whose bytes are a frame of the bundle."""

    dtype: Literal["bool", "uint8", "int64", "float32", "float64"]
    shape: tuple[int, ...]


# From the process that has tasks, which is the server of an engine process.


class TaskMessage(Struct, array_like=True):
    """A task as `task_messages.to_wire` writes it. deadline: of `time.monotonic`, which all processes share."""

    number: int
    deadline: float
    previews: bool
    parameters: dict[str, str | bool | int | float]
    arrays: dict[str, ArrayHead]


class Submit(Struct, tag=True, array_like=True):
    tasks: list[TaskMessage]


class Cancel(Struct, tag=True, array_like=True):
    number: int


class Stop(Struct, tag=True, array_like=True):
    """End the process."""


# From the process that carries them out.


class Ready(Struct, tag=True, array_like=True):
    """The model is loaded and has passed its self-test. info: of `ModelInfo.to_dict`. tick, row: of TickTimes."""

    info: dict[str, Any]
    tick: float
    row: float


class Failure(Struct, array_like=True):
    """An error of this project. kind: its class."""

    kind: str
    text: str
    param: str | None = None
    retry_after: float = 0.0


class NotLoaded(Struct, tag=True, array_like=True):
    """The model could not be loaded; the process ends."""

    failure: Failure


class RunningTask(Struct, array_like=True):
    number: int
    rows_left: int
    waits_for: list[str]


class Status(Struct, tag=True, array_like=True):
    """The state of the backend that carries out the tasks; a heartbeat.

    running: the tasks that have started. budget: rows a tick; 0 while it loads. given_up: of the backend.
    others_running, others_waiting, others_seconds: tasks of other processes than the one that this is sent to, and the
    estimated seconds of their work. snapshot: of the backend, with all tasks.
    """

    not_ready: str | None
    tick: float
    row: float
    running: list[RunningTask]
    budget: int = 0
    num_ticks: int = 0
    num_rows: int = 0
    given_up: str | None = None
    others_running: int = 0
    others_waiting: int = 0
    others_seconds: float = 0.0
    snapshot: dict[str, Any] | None = None


class Tick(Struct, tag=True, array_like=True):
    """The engine ran so many rows of each kind."""

    encode: int
    denoise: int
    decode: int
    seconds: float


class Started(Struct, tag=True, array_like=True):
    """A task left the queue. at: of `time.monotonic`."""

    number: int
    at: float


class PreviewMade(Struct, tag=True, array_like=True):
    number: int
    step: int
    pixels: ArrayHead


class Finished(Struct, tag=True, array_like=True):
    """A task is done. started: as `at` of Started."""

    number: int
    started: float
    result: ArrayHead


class Failed(Struct, tag=True, array_like=True):
    """A task has failed. started: as `at` of Started; 0 if it never left the queue."""

    number: int
    started: float
    failure: Failure


class LogLine(Struct, tag=True, array_like=True):
    """A record of the log. exception: its formatted traceback."""

    name: str
    level: int
    created: float
    text: str
    exception: str | None


class Dead(Struct, tag=True, array_like=True):
    """The engine failed for good; the process ends."""

    reason: str


FromServer = Submit | Cancel | Stop
FromEngine = Ready | NotLoaded | Status | Tick | Started | PreviewMade | Finished | Failed | LogLine | Dead
DROPPABLE = (PreviewMade, Tick, LogLine, Status)  # dropped if they are not read in time

encoder = msgspec.msgpack.Encoder()
from_server = msgspec.msgpack.Decoder(list[FromServer])
from_engine = msgspec.msgpack.Decoder(list[FromEngine])


def head_of(array: Array) -> ArrayHead:
    return ArrayHead(array.dtype.name, array.shape)  # type: ignore[arg-type]  # checked when it is read


def heads_of(message: Struct) -> list[ArrayHead]:
    """The heads of the arrays that belong to a message, in the order of their frames."""
    if isinstance(message, Submit):
        return [head for task in message.tasks for head in task.arrays.values()]
    if isinstance(message, PreviewMade):
        return [message.pixels]
    return [message.result] if isinstance(message, Finished) else []


def to_frames(bundle: Iterable[tuple[Struct, Sequence[Array]]]) -> list[Any]:
    """The frames of messages with their arrays."""
    messages: list[Struct] = []
    frames: list[Any] = [b""]
    for message, arrays in bundle:
        messages.append(message)
        frames += [np.ascontiguousarray(array).data.cast("B") if array.size else b"" for array in arrays]
    frames[0] = encoder.encode(messages)
    return frames


def from_frames(frames: Sequence[Any], decoder: Any) -> list[tuple[Any, list[Array]]]:
    """The inverse of `to_frames`. The arrays are copies. Raises BrokenMessage."""
    try:
        messages = decoder.decode(frames[0])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: text that is not UTF-8
        raise BrokenMessage(str(error)) from None
    heads = [heads_of(message) for message in messages]
    if sum(map(len, heads)) != len(frames) - 1:
        raise BrokenMessage(f"it has {len(frames) - 1} arrays, not {sum(map(len, heads))}")
    rest = iter(frames[1:])
    return [
        (message, [array_of(head, next(rest)) for head in own]) for message, own in zip(messages, heads, strict=True)
    ]


def array_of(head: ArrayHead, frame: Any) -> Array:
    dtype, data = np.dtype(head.dtype), memoryview(frame)
    if min(head.shape, default=0) < 0 or math.prod(head.shape) * dtype.itemsize != data.nbytes:
        raise BrokenMessage(f"an array {head.dtype} {list(head.shape)[:8]} in {data.nbytes} bytes")
    return np.frombuffer(data, dtype).reshape(head.shape).copy()


def failure_of(error: BaseException) -> Failure:
    """An error as it travels. The details of a bug stay in the log."""
    if not isinstance(error, DSDError):
        error = EngineError("internal error; see the server log")
    return Failure(
        type(error).__name__, str(error), getattr(error, "param", None), float(getattr(error, "retry_after", 0.0))
    )


def error_of(failure: Failure) -> DSDError:
    """The inverse of `failure_of`."""
    kind = getattr(errors, failure.kind, None)
    if kind is InputError:
        return InputError(failure.text, failure.param)
    if kind is QueueFullError:
        return QueueFullError(failure.text, failure.retry_after)
    if isinstance(kind, type) and issubclass(kind, DSDError) and kind.__init__ is Exception.__init__:
        return kind(failure.text)
    return EngineError(failure.text)


def line_of(record: logging.LogRecord) -> LogLine:
    """A record of the log as it travels."""
    exception = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
    return LogLine(record.name, record.levelno, record.created, record.getMessage()[:MAX_TEXT], exception)


def write_line(line: LogLine) -> None:
    """Write a line of the process to the log of this one."""
    logger = logging.getLogger(line.name)
    if logger.isEnabledFor(line.level):
        record = logging.LogRecord(line.name, line.level, "", 0, line.text, None, None)
        record.created, record.msecs, record.exc_text = line.created, line.created % 1 * 1000, line.exception
        logger.handle(record)
