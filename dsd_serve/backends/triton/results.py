"""Responses of a Triton server, checked: previews, results and descriptions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_serve.backends import ModelInfo
from dsd_serve.backends.task_messages import operation_of, output_shapes
from dsd_serve.config import ModelConfig
from dsd_serve.errors import EngineError, shown
from dsd_serve.programs import Task
from dsd_serve.rows import Array

MOST_BYTES = 8_000_000  # of a description; the text of the card may have a million characters


class WrongAnswer(Exception):
    """A server sent a response that this version never sends; the text says which."""


@dataclass(frozen=True)
class Preview:
    """The clean estimate after a step, uint8 [3, H, W]."""

    step: int
    pixels: Array


@dataclass(frozen=True)
class Result:
    """The result of a task, and the seconds that it waited and ran."""

    result: Array
    queued: float
    ran: float


class ResponseReader:
    """Reads the responses to one task, previews and one result, and validates them, because a server may be broken."""

    def __init__(self, task: Task, config: ModelConfig) -> None:
        self.shapes = output_shapes(config)
        self.kind = operation_of(task).output
        params = getattr(task, "params", None)
        self.steps = params.num_steps if params is not None and params.preview_every else 0
        self.step, self.ended = 0, False

    def read(self, outputs: Mapping[str, Array]) -> Preview | Result:
        """The next response. Raises WrongAnswer; EngineError for latents that are not finite."""
        if self.ended:
            raise WrongAnswer("a response follows the result")
        if "preview" in outputs:
            self.check(outputs, {"preview": self.shapes["preview"], "step": self.shapes["step"]})
            step = int(outputs["step"][0])
            if not self.step < step <= self.steps:
                raise WrongAnswer(f"a preview of step {step} after step {self.step}, of {self.steps} requested")
            self.step = step
            return Preview(step, outputs["preview"])
        dtype, (_, *row) = self.shapes[self.kind]
        self.check(outputs, {self.kind: (dtype, (1, *row)), "seconds": self.shapes["seconds"]})
        queued, ran = (float(seconds) for seconds in outputs["seconds"])
        if not (0 <= queued < 1e9 and 0 <= ran < 1e9):  # also rejects NaN
            raise WrongAnswer(f"seconds of {queued:g} and {ran:g}")
        result = outputs[self.kind][0]
        if dtype is np.float32 and not np.isfinite(result).all():
            raise EngineError("the network gave values that are not finite for this image")
        self.ended = True
        return Result(result, queued, ran)

    def check(
        self, outputs: Mapping[str, Array], expected: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]
    ) -> None:
        if set(outputs) != set(expected):
            raise WrongAnswer(f"the tensors {shown(sorted(outputs))}, not {', '.join(sorted(expected))}")
        for name, (dtype, shape) in expected.items():
            array = outputs[name]
            if array.dtype != dtype or array.shape != shape:
                raise WrongAnswer(
                    f"{name} is {array.dtype.name} {shown(list(array.shape))}, not {np.dtype(dtype).name} {list(shape)}"
                )


@dataclass(frozen=True)
class Description:
    """The description that an instance gives of itself. not_ready: the reason, or None. running, waiting: tasks."""

    instance: str
    info: ModelInfo
    budget: int
    not_ready: str | None
    running: int
    waiting: int
    seconds_ahead: float


def read_description(outputs: Mapping[str, Array]) -> Description:
    """The answer to `describe`, validated. Raises WrongAnswer."""
    text = outputs.get("text")
    if text is None or text.dtype != np.uint8 or text.ndim != 1:
        raise WrongAnswer("the output text with the description is missing")
    if text.size > MOST_BYTES:
        raise WrongAnswer(f"its description has {text.size} bytes, above {MOST_BYTES}")
    try:
        values = json.loads(text.tobytes())
    except (ValueError, RecursionError):
        raise WrongAnswer("its description is not JSON") from None
    if not isinstance(values, dict):
        raise WrongAnswer("its description is not a JSON object")
    try:
        info = ModelInfo.from_dict(values["about"])
    except Exception:  # its content is arbitrary
        raise WrongAnswer("it cannot be understood, perhaps because its version of this software is another") from None
    name, reason = values.get("instance"), values.get("not_ready")
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise WrongAnswer(f"instance is {shown(name)} in its description")
    if reason is not None:
        reason = " ".join(str(reason).split())[:200] or "is not ready"
    return Description(
        name,
        info,
        int(number(values, "budget", 1, info.budget)),
        reason,
        int(number(values, "running", 0)),
        int(number(values, "waiting", 0)),
        float(number(values, "seconds_ahead", 0, kind=int | float)),
    )


def number(
    values: Mapping[str, Any], name: str, least: int, default: int | None = None, kind: Any = int
) -> int | float:
    """A finite number of a description. default: for a version of this software that does not send it."""
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < 1e9:  # also rejects NaN
        raise WrongAnswer(f"{name} is {shown(value)} in its description")
    return value
