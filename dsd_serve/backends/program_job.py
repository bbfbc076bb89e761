"""The job of a program in the batcher."""

import time
from dataclasses import dataclass, field
from typing import Any

from dsd_serve.backends import Job
from dsd_serve.rows import Denoise, Program, Row


@dataclass(eq=False)
class ProgramJob(Job):
    """A program in the batcher. rows: that it waits for. rows_left: the part of its cost that is not yet paid. in_tick:
    whether its rows are in a tick that has begun."""

    program: Program
    rows_left: int
    rows: list[Row] = field(default_factory=list)
    in_tick: bool = False

    def cancel(self) -> None:
        """Cancel it; takes effect at the next tick."""
        self.cancelled = True

    def snapshot(self) -> dict[str, Any]:
        """Its number, what is left, the rows that it waits for once it has started, and its age, as plain values."""
        started = {"waits_for": [type(row).__name__.lower() for row in self.rows]} if self.started else {}
        seconds = round(time.monotonic() - self.submitted, 3)
        return {"number": self.number, "rows_left": self.rows_left, **started, "seconds": seconds}

    @property
    def only_codes(self) -> bool:
        """Whether it waits for encode or decode rows only. These go first, because they begin or end an image."""
        return not any(isinstance(row, Denoise) for row in self.rows)
