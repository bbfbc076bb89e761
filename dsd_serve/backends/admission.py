"""Admission to a queue: whether there is room for more tasks, and the errors of those that are refused."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsd_serve.backends import Observer
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.errors import DeadlineError, QueueFullError
from dsd_serve.rows import Cost


@dataclass(frozen=True)
class Admission:
    """The limits of a queue. max_waiting: tasks that may wait. max_seconds: of estimated work that may be ahead of one.

    observer: notified of each refusal.
    """

    max_waiting: int
    max_seconds: float
    observer: Observer

    def queue_full(self, count: int, waiting: int, ahead: float) -> QueueFullError | None:
        """The error if there is no room for `count` more tasks, else None.

        waiting: tasks in the queue. ahead: estimated seconds of work before them.
        """
        excess = waiting + count - self.max_waiting
        if excess <= 0 and ahead <= self.max_seconds:
            return None
        self.observer.rejected("queue_full")
        share = min(1.0, excess / max(1, waiting)) if excess > 0 else 1 - self.max_seconds / ahead
        return QueueFullError(
            f"{waiting} images are waiting, about {ahead:.1f} s of work is ahead; this server takes at most "
            f"{self.max_waiting} images and {self.max_seconds:.0f} s; try again later",
            ahead * share,
        )

    def check(self, costs: Sequence[Cost], timeout: float | None, waiting: int, ahead: float, times: TickTimes) -> None:
        """Raise QueueFullError if there is no room for tasks of these costs, and DeadlineError if they would take
        longer than `timeout` seconds."""
        if (full := self.queue_full(len(costs), waiting, ahead)) is not None:
            raise full
        expected = times.until_done(ahead, costs)
        if timeout is not None and expected > timeout:
            self.observer.rejected("deadline")
            seconds = f"{expected:.{2 if expected >= 0.01 else 4}f} s"
            raise DeadlineError(
                f"this would take about {seconds}, more than the timeout of {timeout:g} s: allow more time, ask for "
                "fewer steps or images, or try again later"
            )
