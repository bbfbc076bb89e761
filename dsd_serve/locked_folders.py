"""Temporary folders that are locked while their process runs, so that those of killed processes can be deleted.

Process ids are not enough for that, because they are reused, and containers that share a folder have their own.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def new_locked_folder(kind: str, parent: str) -> Path:
    """A new folder, readable by its user only and locked (flock) until this process ends. kind: a part of its name.

    Raises OSError.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"dsd-{kind}-{os.getpid()}-", dir=parent)).resolve()
        try:
            fcntl.flock(os.open(folder, FOLDER), fcntl.LOCK_EX)  # stays open: closing it would release the lock
        except FileNotFoundError:  # deleted as abandoned, before it was locked
            continue
        except OSError:  # a file system without locks: under a name that is never deleted
            folder.rmdir()
            return Path(tempfile.mkdtemp(prefix=f"dsd-{kind}-", dir=parent)).resolve()
        if folder.is_dir():
            return folder


def delete_abandoned(kind: str, parent: str) -> None:
    """Delete the folders of this user that `new_locked_folder` made for processes that no longer live."""
    for name in os.listdir(parent):
        if not re.fullmatch(rf"dsd-{kind}-[0-9]+-\w+", name):
            continue
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            descriptor = os.open(path, FOLDER)
            stack.callback(os.close, descriptor)
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its process lives
                shutil.rmtree(path, ignore_errors=True)
