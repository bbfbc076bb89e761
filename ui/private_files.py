"""Files that visitors upload and files that the page makes for them: one private folder, one place that checks paths.

Gradio takes a file as a path in the JSON of an event, so a visitor can name any file of the machine. Here every path
that arrives must be one that this page handed out: a regular file in the folder of this process, of the same session.
"""

import asyncio
import atexit
import contextlib
import functools
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsd_serve.errors import DSDError, InputError
from dsd_serve.locked_folders import delete_abandoned, new_locked_folder
from ui.regularly import regularly

KIND = "page"  # of its folder, among locked folders
KEEP_S = 3600.0  # lifetime of a file
MAX_FILE = 40_000_000  # bytes of one upload
MAX_TOTAL = 200_000_000  # bytes of all files of visitors
MAX_SHARE = 0.5  # of MAX_TOTAL, for the uploads of one address, and for the files that the page makes
MIN_CHARGE = 4096  # bytes that the shortest file takes on disk
MAX_NAME = 80  # characters of a file's name
MAX_DEPTH = 16  # of lists and dictionaries in the values of an event
SWEEP_S = 60.0
UNKNOWN_S = 300.0  # lifetime of a file that no answer names
MAX_SESSIONS = 100  # recorded for one file
NOT_YOURS = (
    "this file was not uploaded in this session, or has expired after an hour: upload it again on this page, and send "
    "the path that the upload returned"
)


class FolderFullError(DSDError):
    """The visitors' files have reached their limit."""


@dataclass
class Entry:
    """A file in the folder.

    owner: the address that uploaded it, empty for a file that the page made. sessions: those that may use it; an upload
    belongs to the first session that uses it.
    """

    size: int
    owner: str
    sessions: set[str]
    since: float  # time.monotonic()


@functools.cache
def private_folder() -> Path:
    """The folder of this process, readable by its user only and deleted when the process ends. Gradio uses it too.

    Folders that killed processes left behind are deleted first.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    os.makedirs(parent, exist_ok=True)
    delete_abandoned(KIND, parent)
    folder = new_locked_folder(KIND, parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # Gradio reads it at every use and takes it from nowhere else
    return folder


class Uploads:
    """The files of all visitors. One event loop."""

    def __init__(self, max_total: int = MAX_TOTAL) -> None:
        self.folder = private_folder()
        self.max_total = max_total
        self.entries: dict[str, Entry] = {}  # oldest first
        self.incoming: dict[str, int] = {}  # bytes of unfinished uploads, by address

    @property
    def total(self) -> int:
        return sum(entry.size for entry in self.entries.values()) + sum(self.incoming.values())

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """Delete old files while the context is open, and all files at its end."""
        try:
            async with regularly(self.sweep, SWEEP_S):
                yield
        finally:
            self.sweep(0)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def sweep(self, seconds: float = KEEP_S) -> None:
        """Delete the files that are older than `seconds`."""
        now, oldest = time.monotonic(), time.time() - min(seconds, UNKNOWN_S)
        for path in [path for path, entry in self.entries.items() if now - entry.since >= seconds]:
            self.delete(path)
        for directory, folders, files in os.walk(self.folder, topdown=False):
            for name in files:  # also those that Gradio wrote for failed events
                path = os.path.join(directory, name)
                with contextlib.suppress(OSError):
                    if path not in self.entries and os.lstat(path).st_mtime <= oldest:
                        os.unlink(path)
            for name in folders:
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(directory, name))

    def delete(self, path: str) -> None:
        del self.entries[path]
        with contextlib.suppress(OSError):
            os.unlink(path)
            os.rmdir(os.path.dirname(path))

    # Uploads.

    @contextlib.contextmanager
    def receiving(self, address: str) -> Iterator["Receiving"]:
        """Count the bytes of a request from `address` while they arrive."""
        receiving = Receiving(self, address)
        try:
            yield receiving
        finally:
            receiving.take(-receiving.size)

    def room(self, address: str, more: int) -> None:
        """Raises FolderFullError if `more` bytes from this address would be too many."""
        own = self.incoming.get(address, 0) + sum(e.size for e in self.entries.values() if e.owner == address)
        for used, most, whose in (
            (own, int(MAX_SHARE * self.max_total), "your uploads"),
            (self.total, self.max_total, "the uploads of all visitors"),
        ):
            if used + more > most:
                raise FolderFullError(
                    f"{whose} take {used / 1e6:.0f} of {most / 1e6:.0f} MB; files are deleted after an hour: try "
                    "again later, or send a smaller file"
                )

    async def keep(self, source: Any, name: str, size: int, address: str) -> str:
        """Copy an uploaded file object of `size` bytes into the folder. Returns its path. Raises FolderFullError."""
        path = await asyncio.to_thread(copy_into, self.folder / secrets.token_hex(16), safe_name(name), source)
        self.entries[path] = Entry(max(size, MIN_CHARGE), address, set(), time.monotonic())
        return path

    # Files that the page makes.

    def record(self, value: Any, session: str) -> None:
        """Record the files in an event's output, so that the same session may send them back."""
        for reference in references(value):
            path = str(reference.get("path"))
            if not is_inside(path, self.folder) or (size := size_of(path)) is None:
                continue
            entry = self.entries.setdefault(path, Entry(max(size, MIN_CHARGE), "", set(), time.monotonic()))
            if not entry.owner and len(entry.sessions) < MAX_SESSIONS:
                entry.sessions.add(session)  # several, because equal images are one file
        made = [(path, entry.size) for path, entry in self.entries.items() if not entry.owner]
        excess = sum(size for _, size in made) - MAX_SHARE * self.max_total
        for path, size in made:  # the oldest first
            if excess <= 0:
                break
            self.delete(path)
            excess -= size

    # Files in the input of events.

    def admit(self, value: Any, session: str, depth: int = 0) -> Any:
        """An event's input with every file in it checked. Raises InputError for a file that may not be used.

        A dictionary with a path or a URL counts as a file, whatever component it is for and whatever else it contains.
        Only the file's place, name and size are passed on.
        """
        if depth > MAX_DEPTH:
            raise InputError(f"the values of an event may be nested at most {MAX_DEPTH} deep, these are deeper")
        if isinstance(value, list):
            return [self.admit(item, session, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if "path" not in value and "url" not in value:
            return {key: self.admit(item, session, depth + 1) for key, item in value.items()}
        path = self.claim(value.get("path"), session)
        name = value.get("orig_name")
        return {
            "path": path,
            "orig_name": safe_name(name) if isinstance(name, str) else os.path.basename(path),
            "size": self.entries[path].size,
            "meta": {"_type": "gradio.FileData"},
        }

    def claim(self, path: Any, session: str) -> str:
        """The path of a file that this session may use. Raises InputError for any other."""
        entry = self.entries.get(path) if isinstance(path, str) else None
        claimable = entry is not None and bool(entry.owner) and not entry.sessions
        if entry is None or not session or not (claimable or session in entry.sessions) or size_of(path) is None:
            raise InputError(NOT_YOURS)
        entry.sessions.add(session)
        return str(path)

    def may_fetch(self, path: str) -> bool:
        """Whether a path was handed out by the page. It cannot be guessed, so whoever has it may read the file."""
        return path in self.entries and size_of(path) is not None


class Receiving:
    """The bytes of one upload."""

    def __init__(self, uploads: Uploads, address: str) -> None:
        self.uploads, self.address, self.size = uploads, address, 0

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises FolderFullError."""
        if size > 0:
            self.uploads.room(self.address, size)
        self.size += size
        incoming = self.uploads.incoming
        incoming[self.address] = incoming.get(self.address, 0) + size
        if not incoming[self.address]:
            del incoming[self.address]


def copy_into(directory: Path, name: str, source: Any) -> str:
    """Copy an open file into a new directory. Returns its path. Raises FolderFullError if the disk is full."""
    path = directory / name
    try:
        directory.mkdir(mode=0o700, parents=True)
        with open(path, "xb") as file:
            shutil.copyfileobj(source, file)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise FolderFullError(f"the file cannot be stored on the server ({error.strerror}); try again later") from None
    return str(path)


def read_upload(path: str) -> bytes:
    """The bytes of an admitted file. Raises InputError if it is gone."""
    try:
        return Path(path).read_bytes()
    except OSError:
        raise InputError("this file is no longer on the server: upload it again") from None


def references(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries with a path in a value made by Gradio."""
    if isinstance(value, dict):
        if "path" in value:
            yield value
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)


def safe_name(name: str) -> str:
    """The last part of a file name, with harmless characters only."""
    last = name.replace("\\", "/").rpartition("/")[2]
    kept = "".join(letter if letter.isalnum() or letter in "._- ()" else "_" for letter in last)[-MAX_NAME:]
    return kept.strip(". ") or "file"


def is_inside(path: str, folder: Path) -> bool:
    return os.path.realpath(path).startswith(f"{folder}{os.sep}")


def size_of(path: str) -> int | None:
    """Bytes of a regular file; None for anything else, including a link to one. Nothing is opened."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
