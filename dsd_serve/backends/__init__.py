"""Backends carry out tasks: a batcher in this process, an engine process with its batcher, or Triton servers.

Their interface: a backend takes tasks, returns a job for each, and describes the model that it serves.
"""

import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.class_images import ClassImages
from dsd_serve.config import ModelConfig
from dsd_serve.engines.selftest import BatchInvariance
from dsd_serve.errors import CancelledError, ConfigError, DeadlineError, InputError, QueueFullError
from dsd_serve.labels import ClassTable, ImageClass, table_of
from dsd_serve.params import SamplingParams, to_api
from dsd_serve.programs import Edit, OnPreviews, Task, WalkEnd
from dsd_serve.rows import Array, Pixels, RowCounts

ENGINE_PROCESS_STATES = ("starting", "ready", "hanging", "down")
OF_AN_END = ("class", "seed", "index")  # settings that belong to one end of a walk


@dataclass(frozen=True)
class ModelInfo:
    """A model and the engine that runs it, as plain values that can travel.

    described: the engine's `describe`. budget: rows a tick, as measured at the start. card: the text of card.md.
    created: modification time of config.json, Unix seconds. class_images: those of its directory, if there are any.
    """

    name: str
    config: ModelConfig
    defaults: SamplingParams
    fingerprint: str
    described: dict[str, str]
    invariance: BatchInvariance
    budget: int
    card: str | None
    created: int
    class_images: ClassImages | None = None

    @cached_property
    def table(self) -> ClassTable:
        """The classes of the model."""
        return table_of(self.config)

    def find_class(self, name: object, param: str = "class", optional: bool = False) -> ImageClass | None:
        """The training class with this index, wnid or name; None for no class.

        A model without classes takes no name, others need one unless it is `optional`. Raises InputError, which names
        the parameter `param`.
        """
        if name is None and (optional or not self.config.num_classes):
            return None
        return self.table.find(name, param)

    def label_of(self, target: ImageClass | None) -> int:
        """The label of a class, or that of no class."""
        return self.config.null_label if target is None else target.index

    def towards(
        self,
        target: ImageClass | None,
        params: Sequence[SamplingParams],
        guidance: float | None,
        name: str = "guidance",
        class_: str = "class",
    ) -> list[SamplingParams]:
        """The settings of images towards a class, or towards none, where guidance is off.

        guidance: what the caller gave, or None. name, class_: its parameters. Raises InputError.
        """
        if target is not None:
            return list(params)
        if guidance not in (None, 1):
            self.table.check_has_classes(name, guidance)
            raise InputError(f"{name} needs a class to guide to: give {class_}, or leave {name} out", name)
        return [replace(p, guidance_scale=1.0) for p in params]

    def edits(
        self,
        pixels: Pixels,
        target: ImageClass | None,
        params: Sequence[SamplingParams],
        strength: float,
        mask: Array | None = None,
    ) -> list[Task]:
        """Tasks that redraw an image towards a class, or towards none, once for each of `params`."""
        return [Edit(pixels, self.label_of(target), p, strength, mask) for p in params]

    def settings_of(self, target: ImageClass | None, params: SamplingParams) -> dict[str, Any]:
        """The settings that draw an image again, under the names of the HTTP API."""
        return {
            "class": None if target is None else target.to_dict(),
            **to_api(params),
            "model": self.name,
            "fingerprint": self.fingerprint,
        }

    def walk_settings_of(self, start: WalkEnd, end: WalkEnd, params: SamplingParams) -> dict[str, Any]:
        """The settings that draw a walk between classes or seeds again, under the names of the HTTP API."""
        common = self.settings_of(None, params)
        none = self.config.null_label
        return {
            "from": {"class": None if start.label == none else start.label, "seed": start.seed},
            "to": {"class": None if end.label == none else end.label, "seed": end.seed},
            **{name: value for name, value in common.items() if name not in OF_AN_END},
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelInfo":
        """The inverse of `to_dict`. Raises DSDError, KeyError or TypeError for impossible values."""
        info = cls(
            **{
                **values,
                "config": ModelConfig.from_dict(values["config"]),
                "defaults": SamplingParams(**values["defaults"]),
                "class_images": ClassImages.from_dict(images) if (images := values.get("class_images")) else None,
                "invariance": BatchInvariance(
                    **{**values["invariance"], "row_counts": tuple(values["invariance"].get("row_counts", ()))}
                ),
            }
        )
        tested, card = info.invariance, info.card
        words = (info.name, *info.described, *info.described.values())
        sane = (
            all(isinstance(word, str) and len(word) <= 1000 for word in words)
            and len(info.described) <= 100
            and re.fullmatch("[0-9a-f]{64}", info.fingerprint)
            and all(type(number) is int for number in (info.budget, info.created))
            and 1 <= info.budget <= 1_000_000
            and 0 <= info.created < 2**53
            and (card is None or (isinstance(card, str) and len(card) <= 1_000_000))
            and len(tested.row_counts) <= 100
            and all(type(number) is int for number in (tested.num_rows, tested.dependent_rows, *tested.row_counts))
            and isinstance(tested.max_difference, int | float)
            and math.isfinite(tested.max_difference)
        )
        if not sane:
            raise ConfigError("the description of a model holds impossible values")
        return info


class Observer:
    """Hooks into the work of a backend. The methods do nothing; override those of interest. They must not block."""

    def tick(self, rows: RowCounts, seconds: float) -> None:
        """The engine ran so many rows in one call."""

    def started(self, waited: float) -> None:
        """A task left the queue after `waited` seconds."""

    def finished(self, outcome: str) -> None:
        """A task ended: done, failed, cancelled or late."""

    def rejected(self, reason: str) -> None:
        """A request was rejected: queue_full, deadline, draining or dead."""

    def engine_process(self, state: str) -> None:
        """The engine's own process, if it has one, is now in this state, one of ENGINE_PROCESS_STATES."""

    def engine_restarted(self) -> None:
        """The engine's process has ended, and a new one is started."""


def outcome_of(error: BaseException | None) -> str:
    """The outcome of a task for `Observer.finished`: done, failed, cancelled or late."""
    if error is None:
        return "done"
    if isinstance(error, CancelledError):
        return "cancelled"
    return "late" if isinstance(error, DeadlineError) else "failed"


@dataclass(eq=False)
class Job(ABC):
    """A task in progress. `future` gets its result, or an error.

    number: its order. submitted, started, ended and deadline are times of `time.monotonic`; 0 is not yet. rows_left:
    the part of its cost that is not yet paid; 0 where the backend does not know it.
    """

    number: int
    deadline: float
    future: "Future[Any]" = field(default_factory=Future, kw_only=True)
    cancelled: bool = field(default=False, kw_only=True)
    submitted: float = field(default_factory=time.monotonic, kw_only=True)
    started: float = field(default=0.0, kw_only=True)
    ended: float = field(default=0.0, kw_only=True)
    rows_left: int = field(default=0, kw_only=True)

    @property
    def waits_for(self) -> Sequence[str]:
        """The kinds of the rows that it waits for now, where the backend knows them."""
        return ()

    @abstractmethod
    def cancel(self) -> None:
        """Cancel it: its future gets CancelledError unless it ends first."""

    def resolve(self, result: Any, error: BaseException | None) -> None:
        """Record the end, and set the result or the error of the future."""
        self.ended = time.monotonic()
        if not self.future.set_running_or_notify_cancel():
            return  # the caller cancelled the future itself
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


class Backend(Protocol):
    """Carries out tasks. All methods may be called from any thread."""

    @property
    def budget(self) -> int:
        """Rows a tick now; 0 while unknown."""
        ...

    @property
    def times(self) -> TickTimes:
        """The measured times of ticks, from which waits are estimated."""
        ...

    @property
    def not_ready(self) -> str | None:
        """The reason why no task is carried out now, or None."""
        ...

    @property
    def ready(self) -> bool: ...

    @property
    def given_up(self) -> str | None:
        """The reason why this process must be restarted, or None."""
        ...

    @property
    def num_running(self) -> int:
        """Tasks that have started."""
        ...

    @property
    def num_waiting(self) -> int:
        """Tasks in the queue."""
        ...

    def submit_tasks(
        self, tasks: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> Sequence[Job]:
        """Accept all tasks or none; returns a job for each, in order.

        timeout: seconds after which their results are useless. on_preview: called from a thread of the backend; must
        not block. Raises QueueFullError, DeadlineError if the results cannot be expected in time, and ClosedError if
        nothing is accepted any more.
        """
        ...

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """The error if there is no room for `count` more tasks now, else None."""
        ...

    def seconds_ahead(self) -> float:
        """Estimated seconds until the queued and running tasks are done."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """The running and waiting tasks, as plain values."""
        ...

    def drain(self) -> None:
        """Accept nothing more, and finish what was accepted."""
        ...

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        ...
