"""Webdataset shards: tar files whose members KEY.jpg and KEY.cls are an image and its label.

Shards are read in place. One scan of their headers gives the offset of each image, so access is random and the order of
training stays a function of (seed, step): a run resumes in the middle of an epoch without reading what precedes it. The
offsets are cached next to the shards in `.dsd-index.npz`, where that is writable.
"""

import logging
import re
import tarfile
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError, shown
from dsd_serve.files import atomic

log = logging.getLogger(__name__)

IMAGE_KINDS = {"jpg", "jpeg", "png", "webp"}
INDEX = ".dsd-index.npz"
MAX_IMAGE = 200_000_000  # bytes of a member
MAX_LABEL = 20  # bytes of a .cls
MAX_HEADER = 16_384  # bytes of an extended header: long names and pax records
MAX_FILES = 1_000_000  # of one brace pattern


class Member(tarfile.TarInfo):
    """An untrusted header. Without these checks `tarfile` reads a negative size backwards for ever, loads a long name
    of any size into memory, and reads the map of a sparse file beyond the end."""

    def _proc_member(self, tar: tarfile.TarFile) -> "Member":
        most = MAX_HEADER if self.type in EXTENDED else MAX_IMAGE if self.isreg() else self.size
        if not 0 <= self.size <= most:
            raise tarfile.ReadError(f"member {quoted(self.name)} has a size of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # a hook of tarfile's, which the stubs leave out

    def refuse_sparse(self, *_: object) -> "Member":
        raise tarfile.ReadError(f"member {quoted(self.name)} is a sparse file, which is not supported")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = refuse_sparse


EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def quoted(name: str) -> str:
    """A name from a shard for an error message: short, and without control characters."""
    return shown(name)[1:-1]


class TarSource:
    """Encoded images by index, in the order of the shards. shards [N]: the shard of each image."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        tables = read_index(self.files)
        self.shards = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        rows = np.concatenate(tables)
        self.offsets, self.lengths, self.labels = rows[:, 0], rows[:, 1], np.ascontiguousarray(rows[:, 2])

    def read(self, index: int) -> tuple[bytes, str]:
        file, offset = self.files[self.shards[index]], int(self.offsets[index])
        with file.open("rb") as data:
            data.seek(offset)
            return data.read(int(self.lengths[index])), f"at byte {offset} of {file.name}"


def expand(pattern: str) -> list[str]:
    """The names of a brace pattern, as in shells and webdataset: a-{000..002}.tar, {train,more}.tar."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    if interval := re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", braces[1]):
        first, last = interval[1], interval[2]
        if int(last) - int(first) >= MAX_FILES:
            raise CheckpointError(f"the pattern {shown(pattern)} names more than {MAX_FILES} files")
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = braces[1].split(",")
    rest = expand(pattern[braces.end() :])
    if len(choices) * len(rest) > MAX_FILES:
        raise CheckpointError(f"the pattern {shown(pattern)} names more than {MAX_FILES} files")
    return [pattern[: braces.start()] + choice + end for choice in choices for end in rest]


def read_index(files: Sequence[Path]) -> list[NDArray[np.int64]]:
    """(offset, length, label) of the images of each shard, [N, 3]; from the index where the shard is unchanged."""
    stamps = {file: f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    kept, tables = load_index(files[0].parent / INDEX, stamps.values()), {}
    new = [file for file in files if stamps[file] not in kept]
    if new:
        log.info("reading the headers of %d tar files", len(new))
        with ThreadPoolExecutor() as pool:
            tables = dict(zip((stamps[file] for file in new), pool.map(scan, new), strict=True))
        known = {stamp: kept[stamp] for stamp in stamps.values() if stamp in kept}
        save_index(files[0].parent / INDEX, {**known, **tables})
    tables = {**kept, **tables}
    return [tables[stamps[file]] for file in files]


def load_index(path: Path, stamps: Collection[str]) -> dict[str, NDArray[np.int64]]:
    """The tables of these stamps in the index; none if the file is damaged or not one of `save_index`."""
    try:
        if not path.exists():
            return {}
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            whole = sum(entry.file_size for entry in entries) <= path.stat().st_size
            if not whole or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it would be larger in memory than on disk")
        with np.load(path, allow_pickle=False) as stored:
            tables = {name: stored[name] for name in set(stored.files) & set(stamps)}
        for name, table in tables.items():
            size = int(name.split(":")[-2])
            if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3 or not len(table) or table.min() < 0:
                raise ValueError("a table does not describe images")
            if table[:, 1].max() > MAX_IMAGE or (table[:, 0] > size - table[:, 1]).any():
                raise ValueError("an image ends beyond its shard")
        return tables
    except Exception:  # zip, numpy and the file system raise many kinds; a broken index is rebuilt
        log.info("%s cannot be read and is rebuilt", path)
        return {}


def save_index(path: Path, tables: dict[str, NDArray[np.int64]]) -> None:
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **tables)  # type: ignore[arg-type]  # its other argument is a bool
    except OSError as error:
        log.info("%s cannot be written (%s), so the next start reads the headers again", path, error.strerror)


def scan(file: Path) -> NDArray[np.int64]:
    """(offset, length, label) of the images of a shard, [N, 3], in file order."""
    rows: dict[str, list[int]] = {}
    labels: dict[str, int] = {}
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:", tarinfo=Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all of them, a kilobyte each
                if not member.isfile():
                    continue
                check_member(member, size)
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if kind.lower() in IMAGE_KINDS:
                    rows[key] = [member.offset_data, member.size]
                elif kind == "cls":
                    labels[key] = read_label(tar, member)
            check_end(file, tar.offset)
    except CheckpointError:
        raise
    except Exception as error:  # tarfile raises anything on broken files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{file} is not a readable tar file: {reason}; a compressed one must be unpacked first"
        ) from None
    for key in rows:
        if labels.get(key, -1) < 0:
            name = quoted(key.lstrip("/"))
            raise CheckpointError(f"{file}: image {name} needs a member {name}.cls with its label")
    if not rows:
        raise CheckpointError(f"{file} holds no images; it needs members KEY.jpg and KEY.cls")
    return np.array([[*row, labels[key]] for key, row in rows.items()], np.int64)


def check_member(member: tarfile.TarInfo, size: int) -> None:
    """Raises ReadError for a member that does not lie within a shard of `size` bytes. `Member` checks the plain header
    only; a pax header may then have changed the size."""
    if member.issparse():
        raise tarfile.ReadError(f"member {quoted(member.name)} is a sparse file, which is not supported")
    if not 0 <= member.size <= min(MAX_IMAGE, size - member.offset_data):
        raise tarfile.ReadError(f"member {quoted(member.name)} has a size of {member.size} bytes, of {size} in all")


def read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """The label in a .cls member; -1 if it is not a label."""
    if member.size > MAX_LABEL:
        return -1
    text = tar.extractfile(member).read().strip()  # type: ignore[union-attr]  # it is a file
    return int(text) if text.isdigit() and len(text) < 10 else -1


def check_end(file: Path, offset: int) -> None:
    """Raises ReadError unless a shard ends in zeros or with the file: tarfile also stops at damaged headers."""
    with file.open("rb") as data:
        data.seek(offset)
        block = data.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is damaged at byte {offset}")
