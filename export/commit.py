"""How new files take the place of old ones in a model directory, so that nobody ever loads a mixture of the two.

Everything is made in a folder inside the directory. Then, while signals wait: config.json is taken away, the files are
moved, the new config.json is put in place. Whatever ends the process in between leaves a directory without config.json,
which nothing loads; a full disk or any other error puts back what was there.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsd_serve.errors import CheckpointError

PREFIX = ".dsd-export-"
CONFIG = "config.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """An empty folder inside `target`, which is made where it is missing. Neither outlives an error or an interrupt.

    Raises CheckpointError while another process exports to the same directory.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with locked(target):
            for left in target.glob(PREFIX + "*"):  # of one that was killed
                shutil.rmtree(left, ignore_errors=True)
            draft = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target))
            try:
                yield draft
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    finally:
        if made and not any(target.iterdir()):
            target.rmdir()


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it however that process ends."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another dsd-export is writing {target}; wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


def commit(draft: Path, target: Path, names: Sequence[str], obsolete: Sequence[str] = ()) -> None:
    """Move the files `names` of the draft, config.json among them, to `target`; remove the `obsolete` ones there."""
    for name in names:
        sync(draft / name)
    old = draft / "replaced"
    old.mkdir()
    others = [name for name in names if name != CONFIG]
    # What config.json vouches for changes; adding a file, or a card, does not touch what is loaded.
    replaces = any((target / name).exists() and name != "card.md" for name in (*others, *obsolete))
    moves = [(target / CONFIG, old / CONFIG)] if replaces else []
    for name in (*others, *obsolete):
        moves.append((target / name, old / name))
        if name in others:
            moves.append((draft / name, target / name))
    moves.append((draft / CONFIG, target / CONFIG))
    with held_signals():
        done: list[tuple[Path, Path]] = []
        try:
            for source, destination in moves:
                if source.exists():
                    os.replace(source, destination)
                    done.append((source, destination))
                    if CONFIG in (source.name, destination.name):
                        sync(target)
        except OSError:
            for source, destination in reversed(done):
                os.replace(destination, source)
            raise
        sync(target)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Ctrl-C and kill wait until the block is done. Not by a mask: threads of others would still take the signal."""
    if threading.current_thread() is not threading.main_thread():  # Python's signals reach the main thread only
        yield
        return
    waiting: list[int] = []
    before = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for number in waiting:
            signal.raise_signal(number)


class Stoppable:
    """`with Stoppable() as stoppable`: SIGINT and SIGTERM raise KeyboardInterrupt in the block, so that it clears up.

    `stoppable.check()` raises it again if it was lost: Python drops what is raised in a destructor or a callback of a
    weak reference, and torch has many of these while it exports.
    """

    def __init__(self) -> None:
        self.caught = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stoppable":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stop(self, *_: object) -> None:
        self.caught = True
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.caught:
            raise KeyboardInterrupt


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
