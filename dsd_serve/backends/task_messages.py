"""Tasks on their way to another process: tasks <-> parameters and tensors, errors <-> their text.

Requests to Triton have this form, and so have tasks on their way to an engine process. Arrays are input tensors, all
else is a request parameter of KServe v2, so that `curl` needs no tensor to draw an image. One request is one task;
encode, decode and denoise take M rows, the first axis of their tensors.

    operation     inputs                                                   answers with
    generate      label; settings                                          image
    edit          pixels, strength; mask, label, settings                  image
    reconstruct   pixels                                                   image
    interpolate   label, to_label, fraction; to_seed, to_index, settings   image
    encode        pixels                                                   latents
    decode        latents                                                  image
    denoise       latents, t, labels; r                                    latents
    describe                                                               text, JSON: the model, and its queue

Settings are the fields of SamplingParams, by default the model's recommendation, and max_seconds. A label is an index,
a wnid or a name, or the number of classes for no class; a model without classes needs none. r, the time to jump to, is
for models with a flow map; by default it is t. A preview is a response of its own, with `preview` and `step`. The last
response has `seconds`: in the queue, and from the first tick to the end.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_serve import errors
from dsd_serve.config import ModelConfig
from dsd_serve.errors import DSDError, EngineError, InputError, QueueFullError, shown
from dsd_serve.labels import table_of
from dsd_serve.params import FIELDS, SamplingParams, check_sampler, to_fields
from dsd_serve.programs import Edit, Generate, Interpolate, Reconstruct, Task, WalkEnd
from dsd_serve.rows import Array, Decode, Denoise, Encode, stack

MODEL = "dsd"
DESCRIBE = {"operation": "describe"}
TRITONS_OWN = ("priority", "timeout", "sequence_id", "sequence_start", "sequence_end")  # it may add them

Parameters = Mapping[str, str | int | float | bool]
Inputs = Mapping[str, Array]
Message = tuple[dict[str, Array], dict[str, Any]]  # input tensors and parameters


def input_shapes(config: ModelConfig) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Type and shape of each input tensor; -1 is M, any number of rows."""
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "pixels": (np.uint8, (-1, *config.pixel_shape)),
        "mask": (np.uint8, config.pixel_shape[1:]),  # nonzero where to draw
        "latents": (np.float32, (-1, *config.latent_shape)),
        "t": (np.float64, (-1,)),
        "labels": (np.int64, (-1,)),
    }
    return {**shapes, "r": shapes["t"]} if config.flow_map else shapes


def output_shapes(config: ModelConfig) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Type and shape of each output tensor; a response has some of them."""
    return {
        "image": (np.uint8, (-1, *config.pixel_shape)),
        "latents": (np.float32, (-1, *config.latent_shape)),
        "preview": (np.uint8, config.pixel_shape),
        "step": (np.int64, (1,)),
        "seconds": (np.float64, (2,)),
        "text": (np.uint8, (-1,)),  # UTF-8
    }


def to_wire(task: Task) -> Message:
    """Input tensors and parameters of a task."""
    operation = operation_of(task)
    inputs, parameters = operation.write(task)
    return inputs, {"operation": operation.name, **parameters}


def from_wire(
    inputs: Inputs, parameters: Parameters, config: ModelConfig, defaults: SamplingParams
) -> tuple[list[Task], float | None]:
    """The tasks of a request, one for each row, and its `max_seconds`. Raises InputError."""
    reader = RequestReader(inputs, parameters, config, defaults)
    operation = reader.parameter("operation", str)
    if operation not in OPERATIONS:
        raise InputError(f"operation must be one of {', '.join(OPERATIONS)}, describe, got {shown(operation)}")
    seconds = reader.parameter("max_seconds", float, None)
    if seconds is not None and not seconds > 0:
        raise InputError(f"max_seconds must be above 0, got {seconds}")
    tasks = OPERATIONS[operation].read(reader)
    reader.check_all_used(operation)
    return tasks, seconds


class RequestReader:
    """Reads the parts of a request one by one, and validates each."""

    def __init__(self, inputs: Inputs, parameters: Parameters, config: ModelConfig, defaults: SamplingParams) -> None:
        self.inputs, self.parameters = dict(inputs), dict(parameters)
        self.config, self.defaults = config, defaults

    def parameter(self, name: str, kind: type, *default: Any) -> Any:
        """A parameter of type `kind`; required if there is no default."""
        if name not in self.parameters:
            if not default:
                raise InputError(f"the parameter {name} is missing")
            return default[0]
        value = self.parameters.pop(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise InputError(f"the parameter {name} must be a finite number, got {shown(value)}") from None
        if not isinstance(value, kind) or isinstance(value, bool):  # a bool is an int to Python
            raise InputError(f"the parameter {name} must be of type {kind.__name__}, got {shown(value)}")
        return value

    def label(self, name: str, *default: int) -> int:
        """A label; required if there is no default and the model has classes."""
        none = self.config.null_label
        if name not in self.parameters and (default or not self.config.num_classes):
            return default[0] if default else none
        value = self.parameter(name, str if isinstance(self.parameters.get(name), str) else int)
        return none if value == none else table_of(self.config).find(value, name).index

    def params(self) -> SamplingParams:
        params = SamplingParams(
            **{
                name: self.parameter(name, type(getattr(self.defaults, name)), getattr(self.defaults, name))
                for name in FIELDS
            }
        )
        table_of(self.config).check_has_classes("guidance_scale", params.guidance_scale)
        check_sampler(params.sampler, self.config.flow_map)
        return params

    def rows(self, name: str) -> list[Array]:
        """The rows of an input tensor, at least one."""
        dtype, shape = input_shapes(self.config)[name]
        array = self.inputs.pop(name, None)
        if array is None or not array.ndim or not len(array):
            raise InputError(f"the input {name} is missing")
        rows = list(array)
        stack(rows, shape[1:], dtype, f"a row of the input {name}")
        if dtype is np.float32 and not np.isfinite(array).all():
            raise InputError(f"the input {name} must be finite numbers, got NaN or infinity")
        return rows

    def row(self, name: str) -> Array:
        rows = self.rows(name)
        if len(rows) > 1:
            raise InputError(f"the input {name} must have one row for this operation, got {len(rows)}")
        return rows[0]

    def mask(self) -> Array | None:
        array = self.inputs.pop("mask", None)
        if array is None:
            return None
        dtype, shape = input_shapes(self.config)["mask"]
        stack([array], shape, dtype, "the input mask")
        return array != 0

    def check_all_used(self, operation: str) -> None:
        known = set(TRITONS_OWN)
        if unknown := [*(set(self.parameters) - known), *self.inputs]:
            raise InputError(f"{operation} does not take {', '.join(sorted(unknown))[:200]}; is it misspelt?")


def read_edit(reader: RequestReader) -> list[Task]:
    pixels, label = reader.row("pixels"), reader.label("label", reader.config.null_label)
    return [Edit(pixels, label, reader.params(), reader.parameter("strength", float), reader.mask())]


def read_interpolate(reader: RequestReader) -> list[Task]:
    params, fraction = reader.params(), reader.parameter("fraction", float)
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction must be from 0 to 1, got {fraction}")
    start = WalkEnd(reader.label("label"), params.seed, params.index)
    to_seed, to_index = reader.parameter("to_seed", int, params.seed), reader.parameter("to_index", int, params.index)
    SamplingParams(seed=to_seed, index=to_index)  # raises InputError for values out of range
    return [Interpolate(start, WalkEnd(reader.label("to_label"), to_seed, to_index), fraction, params)]


def read_denoise(reader: RequestReader) -> list[Task]:
    latents, ts, numbers = reader.rows("latents"), reader.rows("t"), reader.rows("labels")
    if not len(latents) == len(ts) == len(numbers):
        raise InputError(
            f"latents, t and labels must have as many rows, got {len(latents)}, {len(ts)} and {len(numbers)}"
        )
    rs: list[float | None] = [None] * len(ts)
    if "r" in reader.inputs and reader.config.flow_map:
        rs = [float(r) for r in reader.rows("r")]
    if len(rs) != len(ts):
        raise InputError(f"r must have as many rows as t, got {len(rs)} and {len(ts)}")
    for t, label, r in zip(ts, numbers, rs, strict=True):
        if not 0 <= t < 1 or not 0 <= label <= reader.config.null_label:
            raise InputError(
                f"t must be from 0 to below 1 and labels from 0 to {reader.config.null_label}, got {t} and {label}"
            )
        if r is not None and not t <= r <= 1:
            raise InputError(f"r must be from t to 1, got {r} for t = {t}")
    return [Denoise(z, float(t), int(y), r) for z, t, y, r in zip(latents, ts, numbers, rs, strict=True)]


def write_edit(task: Edit) -> Message:
    mask = {} if task.mask is None else {"mask": task.mask.astype(np.uint8)}
    own = {"label": task.label, "strength": task.strength}
    return {"pixels": task.pixels[None], **mask}, {**own, **to_fields(task.params)}


def write_interpolate(task: Interpolate) -> Message:
    start, end = task.start, task.end
    ends = {"label": start.label, "to_label": end.label, "to_seed": end.seed, "to_index": end.index}
    own = {"seed": start.seed, "index": start.index, "fraction": task.fraction}
    return {}, {**to_fields(task.params), **ends, **own}


def write_denoise(row: Denoise) -> Message:
    times = {"t": np.array([row.t]), **({} if row.r is None else {"r": np.array([row.r])})}
    return {"latents": row.z_t[None], **times, "labels": np.array([row.label], np.int64)}, {}


@dataclass(frozen=True)
class Operation:
    """One value of the parameter `operation`: its tasks, their output tensor, and both directions of the wire."""

    name: str
    task: type
    output: str
    read: Callable[[RequestReader], list[Task]]
    write: Callable[[Any], Message]


ALL = (
    Operation(
        "generate",
        Generate,
        "image",
        lambda reader: [Generate(reader.label("label"), reader.params())],
        lambda task: ({}, {"label": task.label, **to_fields(task.params)}),
    ),
    Operation("edit", Edit, "image", read_edit, write_edit),
    Operation(
        "reconstruct",
        Reconstruct,
        "image",
        lambda reader: [Reconstruct(reader.row("pixels"))],
        lambda task: ({"pixels": task.pixels[None]}, {}),
    ),
    Operation("interpolate", Interpolate, "image", read_interpolate, write_interpolate),
    Operation(
        "encode",
        Encode,
        "latents",
        lambda reader: [Encode(pixels) for pixels in reader.rows("pixels")],
        lambda row: ({"pixels": row.pixels[None]}, {}),
    ),
    Operation(
        "decode",
        Decode,
        "image",
        lambda reader: [Decode(z) for z in reader.rows("latents")],
        lambda row: ({"latents": row.z[None]}, {}),
    ),
    Operation("denoise", Denoise, "latents", read_denoise, write_denoise),
)
OPERATIONS = {operation.name: operation for operation in ALL}
BY_TASK = {operation.task: operation for operation in ALL}


def operation_of(task: Task) -> Operation:
    """The operation of a task."""
    return BY_TASK[type(task)]


def results_to_wire(results: Sequence[Array]) -> dict[str, Array]:
    """The output tensor with the results of a request."""
    return {"image" if results[0].dtype == np.uint8 else "latents": np.stack(results)}


def error_to_text(error: BaseException) -> str:
    """An error as Triton's clients see it: its kind and its sentence. The details of a bug stay in the log."""
    if not isinstance(error, DSDError):
        error = EngineError("internal error; see the server log")
    more = f"({error.retry_after:.3f})" if isinstance(error, QueueFullError) else ""
    return f"{type(error).__name__}{more}: {error}"


def error_from_text(text: str) -> DSDError | None:
    """The inverse; None when the text is not ours but Triton's."""
    found = re.search(r"\b(\w+Error)(?:\((\d+\.\d+)\))?: (.*)", text, re.DOTALL)
    kind = getattr(errors, found[1], None) if found else None
    if found is None or not isinstance(kind, type) or not issubclass(kind, DSDError):
        return None
    return QueueFullError(found[3], float(found[2] or 1)) if kind is QueueFullError else kind(found[3])
