"""Atomic updates of directories: new files replace old ones, and a mixture of the two is never loaded.

All files are first made in a draft, a folder inside the target. Then, with signals deferred, they are moved into place.
In a model directory config.json is removed before the first move and the new one is put in place by the last, so a
process that dies in between leaves a directory without config.json, which is never loaded. A full disk or any other
error undoes the moves.
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
REJECTED = "rejected"  # the folder of plans that failed their checks
CONFIG = "config.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def drafting(target: Path) -> Iterator[Path]:
    """An empty folder inside `target`, which is created if it is missing. The folder is always removed at the end, and
    `target` too if it was created and is still empty.

    Raises CheckpointError while another process exports to the same directory.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with locked(target):
            for leftover in target.glob(PREFIX + "*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
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
    """A lock on a directory, for one process at a time. The system releases it when the process ends, in any way."""
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
    # config.json goes first only if a file whose sha256 it holds changes; a new file or another card is harmless.
    replaces = any((target / name).exists() and name != "card.md" for name in (*others, *obsolete))
    moves = [(target / CONFIG, old / CONFIG)] if replaces else []
    for name in (*others, *obsolete):
        moves.append((target / name, old / name))
        if name in others:
            moves.append((draft / name, target / name))
    moves.append((draft / CONFIG, target / CONFIG))
    move(moves)


def move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename (source, destination) one after another; a source that does not exist is left out.

    Signals wait until the end. An OSError undoes the renames that were done.
    """
    with held_signals():
        done: list[tuple[Path, Path]] = []
        try:
            for source, destination in moves:
                if source.exists():
                    os.replace(source, destination)
                    done.append((source, destination))
                    if CONFIG in (source.name, destination.name):
                        sync(destination.parent)
                        sync(source.parent)
        except OSError:
            for source, destination in reversed(done):
                os.replace(destination, source)
            raise
        for folder in {destination.parent for _, destination in done}:
            sync(folder)


@contextlib.contextmanager
def held_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block. A signal mask is not enough: other threads would still receive
    them."""
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
    """`with Stoppable() as stoppable`: SIGINT and SIGTERM raise KeyboardInterrupt in the block, so that it cleans up.

    `stoppable.check()` raises it again if it was lost: Python drops what is raised in a destructor or in the callback
    of a weak reference, and torch has many of these during an export.
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
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
