"""Progress on stderr: how many images are done, their rate, and the time left."""

import sys
import time

from dsd_serve.shell.arguments import say

REDRAWN = 0.2  # seconds between two updates of a terminal
LOGGED = 60.0  # seconds between two lines of a log


class Progress:
    """Of `total` images, some of which an earlier run may have drawn. done: of both. drawn: of this run."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.drawn = total, 0, 0
        self.began = self.said = time.monotonic()
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def step(self, done: int) -> None:
        """One more image is drawn, and `done` are there now."""
        self.done, self.drawn = done, self.drawn + 1
        now = time.monotonic()
        if now - self.said >= (REDRAWN if self.terminal else LOGGED):
            self.said = now
            self.show()

    def show(self) -> None:
        if self.terminal:
            sys.stderr.write(f"\r\033[K{self}")
            sys.stderr.flush()
        else:
            say(str(self))

    def end(self) -> None:
        """Leave the line of a terminal."""
        if self.terminal and self.drawn:
            self.show()
            sys.stderr.write("\n")
            sys.stderr.flush()

    def __str__(self) -> str:
        rate = self.drawn / max(time.monotonic() - self.began, 1e-9)
        text = f"{self.done:,} of {self.total:,} images, {rate:.1f} images/s"
        return f"{text}, {clock((self.total - self.done) / rate)} left" if self.done < self.total else text


def clock(seconds: float) -> str:
    """Seconds as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
