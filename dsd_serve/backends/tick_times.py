"""The times of a batcher's ticks: moving averages, and the estimates that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsd_serve.rows import Cost

WEIGHT = 0.1  # of the newest tick in an average


@dataclass
class TickTimes:
    """Averages in seconds; 0 is not yet measured. tick: over all ticks. row: per row, over the fuller ticks."""

    tick: float = 0.0
    row: float = 0.0

    def note(self, num_rows: int, seconds: float, budget: int) -> None:
        """A tick took `seconds`. Only one that is more than half full shows what a row costs under load."""
        self.tick = average(self.tick, seconds)
        if 2 * num_rows > budget or not self.row:
            self.row = average(self.row, seconds / num_rows)

    def of_rows(self, num_rows: int) -> float:
        """Estimated seconds of that many rows in full ticks."""
        return num_rows * self.row

    def until_done(self, seconds_ahead: float, costs: Sequence[Cost]) -> float:
        """Estimated seconds until programs of these costs are done, with work of `seconds_ahead` before them."""
        work = seconds_ahead + self.of_rows(sum(cost.rows for cost in costs))
        return max(work, max(cost.ticks for cost in costs) * self.tick)


def average(before: float, value: float) -> float:
    return before + (value - before) * (WEIGHT if before else 1.0)
