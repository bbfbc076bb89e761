"""Atomic writing of files, errors of the system in words, and the path of the demo model."""

import errno
import os
from importlib import resources
from pathlib import Path


def demo_model() -> Path:
    """The model directory that comes with the package."""
    return Path(str(resources.files("dsd_serve").joinpath("demo")))


class atomic:
    """`with atomic(path) as temporary`: write the temporary file; it replaces `path` if no exception was raised."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        try:
            with open(self.temporary, "rb+") as file:
                os.fsync(file.fileno())
            self.temporary.replace(self.path)
        except BaseException:  # Ctrl-C too
            self.temporary.unlink(missing_ok=True)
            raise


def sentence_of(error: OSError) -> str:
    """An error of the system in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    if error.errno == errno.EFBIG:
        return "the file would exceed the file size limit"
    return f"{error.filename or 'the output'} cannot be written or read: {error.strerror or error}"
