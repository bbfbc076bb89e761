"""The job of a program in the batcher."""

from dataclasses import dataclass, field

from dsd_serve.backends import Job
from dsd_serve.rows import Denoise, Program, Row


@dataclass(eq=False)
class ProgramJob(Job):
    """A program in the batcher. rows: that it waits for. rows_left: the part of its cost that is not yet paid."""

    program: Program
    rows_left: int
    rows: list[Row] = field(default_factory=list)

    def cancel(self) -> None:
        """Cancel it; takes effect at the next tick."""
        self.cancelled = True

    @property
    def only_codes(self) -> bool:
        """Whether it waits for encode or decode rows only. These go first, because they begin or end an image."""
        return not any(isinstance(row, Denoise) for row in self.rows)
