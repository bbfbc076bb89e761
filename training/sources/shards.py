"""Webdataset shards: tar files whose members KEY.jpg and KEY.cls are an image and its class.

A class is a number or a name, from KEY.cls or from a key of KEY.json; shards with neither hold images without classes.
The names of numbers may stand in classnames.txt beside the shards or one folder up, one a line.

Shards are read in place. One scan of their headers gives the offset of each image, so access is random and the order of
training stays a function of (seed, step): a run resumes in the middle of an epoch without reading what precedes it. The
offsets are cached next to the shards in `.dsd-index.npz`, where that is writable.
"""

import json
import logging
import re
import tarfile
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.config import MOST, MOST_NAME
from dsd_serve.errors import CheckpointError, shown
from dsd_serve.files import atomic
from training.classes import NO_CLASSES, clean
from training.run_config import DataSection
from training.sources.columns import CLASS_COLUMNS, choose, named, numbered

log = logging.getLogger(__name__)

IMAGE_KINDS = {"jpg", "jpeg", "png", "webp"}
INDEX = ".dsd-index.npz"
NAMES_FILES = ("classnames.txt", "classes.txt")
MAX_IMAGE = 200_000_000  # bytes of a member
MAX_LABEL = 4 * MOST_NAME  # bytes of a .cls
MAX_JSON = 1_000_000  # bytes of a .json, and of a file of names ten times as many
MAX_HEADER = 16_384  # bytes of an extended header: long names and pax records
MAX_FILES = 1_000_000  # of one brace pattern
NAMES = "/names"  # after the stamp of a shard in the index: its names of classes


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


@dataclass(frozen=True)
class Shard:
    """The images of a tar file. rows int64 [N, 3]: offset, length and class of each.

    names: a class is a place in this list; None: it is a number; empty: there are no classes.
    """

    rows: NDArray[np.int64]
    names: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        return "numbers" if self.names is None else "names" if self.names else "no classes"


class TarSource:
    """Encoded images by index, in the order of the shards. shards [N]: the shard of each image."""

    def __init__(self, files: Sequence[Path], data: DataSection) -> None:
        self.files, self.remarks = list(files), list[str]()
        found = read_index(self.files, data.label_column)
        self.shards = np.repeat(np.arange(len(found)), [len(shard.rows) for shard in found])
        rows = np.concatenate([shard.rows for shard in found])
        self.offsets, self.lengths = rows[:, 0], rows[:, 1]
        first, place = found[0], str(files[0] if len(files) == 1 else files[0].parent)
        for file, shard in zip(files, found, strict=True):
            if shard.kind != first.kind and data.labels != "none":
                raise CheckpointError(
                    f"{place}: {files[0].name} has {first.kind} and {file.name} has {shard.kind} as classes"
                )
        self.table, self.labels = NO_CLASSES, np.zeros(len(rows), np.int64)
        if data.labels == "none" or first.kind == "no classes":
            return
        if first.names is None:
            self.table, self.labels = numbered(
                np.ascontiguousarray(rows[:, 2]), names_beside(files[0]), data.labels, place
            )
        else:
            texts = [shard.names[label] for shard in found if shard.names for label in shard.rows[:, 2]]
            self.table, self.labels = named(texts, data.labels, place)

    def read(self, index: int) -> tuple[bytes, str]:
        file, offset = self.files[self.shards[index]], int(self.offsets[index])
        with file.open("rb") as data:
            data.seek(offset)
            return data.read(int(self.lengths[index])), f"at byte {offset} of {file.name}"


def names_beside(file: Path) -> list[str] | None:
    """The names of numeric classes, from a file beside a shard or, as in CLIP's benchmarks, one folder up."""
    folder = file.resolve().parent
    for place in (*(folder / name for name in NAMES_FILES), folder.parent / NAMES_FILES[0]):
        if place.is_file():
            try:
                with place.open("rb") as opened:
                    text = opened.read(10 * MAX_JSON).decode("utf-8-sig")
            except (OSError, UnicodeDecodeError):
                raise CheckpointError(f"{place} must name the classes as text in UTF-8, one a line") from None
            return [clean(line) for line in text.rstrip().splitlines()]
    return None


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


def read_index(files: Sequence[Path], label_key: str = "") -> list[Shard]:
    """The shards, from the index where they are unchanged. label_key: of the .json members; empty: the usual ones."""
    mark = f"{label_key}:" if label_key else ""
    stamps = {file: f"{mark}{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    kept, found = load_index(files[0].parent / INDEX, stamps.values()), {}
    new = [file for file in files if stamps[file] not in kept]
    if new:
        log.info("reading the headers of %d tar files", len(new))
        with ThreadPoolExecutor() as pool:
            scanned = pool.map(partial(scan, label_key=label_key), new)
            found = dict(zip((stamps[file] for file in new), scanned, strict=True))
        known = {stamp: kept[stamp] for stamp in stamps.values() if stamp in kept}
        save_index(files[0].parent / INDEX, {**known, **found})
    found = {**kept, **found}
    return [found[stamps[file]] for file in files]


def load_index(path: Path, stamps: Collection[str]) -> dict[str, Shard]:
    """The shards of these stamps in the index; none if the file is damaged or not one of `save_index`."""
    try:
        if not path.exists():
            return {}
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            whole = sum(entry.file_size for entry in entries) <= path.stat().st_size
            if not whole or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it would be larger in memory than on disk")
        with np.load(path, allow_pickle=False) as stored:
            held = set(stored.files)
            tables = {name: stored[name] for name in held & set(stamps)}
            names = {name: stored[name + NAMES] for name in tables if name + NAMES in held}
        for name, table in tables.items():
            size = int(name.split(":")[-2])
            if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3 or not len(table) or table.min() < 0:
                raise ValueError("a table does not describe images")
            if table[:, 1].max() > MAX_IMAGE or (table[:, 0] > size - table[:, 1]).any():
                raise ValueError("an image ends beyond its shard")
            if name in names and (names[name].ndim != 1 or names[name].dtype.kind != "U"):
                raise ValueError("names of classes are not texts")
            if name in names and table[:, 2].max() >= max(1, len(names[name])):
                raise ValueError("a class has no name")
        return {
            name: Shard(table, tuple(names[name].tolist()) if name in names else None) for name, table in tables.items()
        }
    except Exception:  # zip, numpy and the file system raise many kinds; a broken index is rebuilt
        log.info("%s cannot be read and is rebuilt", path)
        return {}


def save_index(path: Path, shards: dict[str, Shard]) -> None:
    arrays: dict[str, NDArray[Any]] = {stamp: shard.rows for stamp, shard in shards.items()}
    for stamp, shard in shards.items():
        if shard.names is not None:
            arrays[stamp + NAMES] = np.array(shard.names, np.str_)
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its other argument is a bool
    except OSError as error:
        log.info("%s cannot be written (%s), so the next start reads the headers again", path, error.strerror)


def scan(file: Path, label_key: str = "") -> Shard:
    """The images of a shard in file order, with their classes."""
    rows: dict[str, list[int]] = {}
    classes: dict[str, str] = {}
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:", tarinfo=Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all of them, a kilobyte each
                if not member.isfile():
                    continue
                check_member(member, size)
                folder, _, name = member.name.rpartition("/")
                if name.startswith("."):  # what macOS adds to archives
                    continue
                key, _, kind = name.partition(".")
                key = f"{folder}/{key}"
                if kind.lower() in IMAGE_KINDS:
                    rows[key] = [member.offset_data, member.size]
                elif kind == "cls" and not label_key:
                    classes[key] = read_class(tar, member)
                elif kind == "json" and (label_key or key not in classes):
                    classes.update(json_class(tar, member, key, label_key))
            check_end(file, tar.offset)
    except CheckpointError:
        raise
    except Exception as error:  # tarfile raises anything on broken files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{file} is not a readable tar file: {reason}; a compressed one must be unpacked first"
        ) from None
    if not rows:
        raise CheckpointError(f"{file} holds no images; it needs members KEY.jpg and KEY.cls")
    return with_classes(file, rows, classes)


def with_classes(file: Path, rows: dict[str, list[int]], classes: dict[str, str]) -> Shard:
    """The images with their classes; raises CheckpointError if only some have one."""
    texts = [classes.get(key, "") for key in rows]
    if not any(texts):
        return Shard(np.array([[*row, 0] for row in rows.values()], np.int64), ())
    if "" in texts:
        name = quoted(list(rows)[texts.index("")].lstrip("/"))
        raise CheckpointError(f"{file}: image {name} needs a member {name}.cls with its class, as others have")
    if all(text.isascii() and text.isdecimal() for text in texts):
        longest = max(texts, key=len)
        if len(longest) > 9:
            raise CheckpointError(f"{file} has a class of the number {quoted(longest)}; at most {10**9 - 1} is allowed")
        numbers = map(int, texts)
        return Shard(np.array([[*row, n] for row, n in zip(rows.values(), numbers, strict=True)], np.int64))
    names = sorted(set(texts))
    if len(names) > MOST["num_classes"]:
        raise CheckpointError(f"{file} has {len(names):,} classes; at most {MOST['num_classes']:,} are allowed")
    place = {name: number for number, name in enumerate(names)}
    table = np.array([[*row, place[text]] for row, text in zip(rows.values(), texts, strict=True)], np.int64)
    return Shard(table, tuple(names))


def check_member(member: tarfile.TarInfo, size: int) -> None:
    """Raises ReadError for a member that does not lie within a shard of `size` bytes. `Member` checks the plain header
    only; a pax header may then have changed the size."""
    if member.issparse():
        raise tarfile.ReadError(f"member {quoted(member.name)} is a sparse file, which is not supported")
    if not 0 <= member.size <= min(MAX_IMAGE, size - member.offset_data):
        raise tarfile.ReadError(f"member {quoted(member.name)} has a size of {member.size} bytes, of {size} in all")


def read_class(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The text of a .cls member. Raises ReadError for one that cannot be a class."""
    if member.size > MAX_LABEL:
        raise tarfile.ReadError(f"member {quoted(member.name)} has a size of {member.size} bytes; it must name a class")
    text = clean(tar.extractfile(member).read().decode())  # type: ignore[union-attr]  # it is a file
    if not text or len(text) > MOST_NAME or not text.isprintable():
        raise tarfile.ReadError(
            f"member {quoted(member.name)} must name a class or give its number, got {quoted(text)}"
        )
    return text


def json_class(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str, label_key: str) -> dict[str, str]:
    """The class in a .json member by `key` of the image; nothing if it holds none."""
    if member.size > MAX_JSON:
        raise tarfile.ReadError(f"member {quoted(member.name)} has a size of {member.size} bytes")
    values = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]  # it is a file
    if not isinstance(values, dict):
        return {}
    column = choose([*values], label_key if label_key in values else "", CLASS_COLUMNS, "label_column", member.name)
    value = values.get(label_key or column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return {}
    text = clean(str(value))
    if not text or len(text) > MOST_NAME or not text.isprintable():
        raise tarfile.ReadError(f"member {quoted(member.name)} must name a class, got {quoted(text)}")
    return {key: text}


def check_end(file: Path, offset: int) -> None:
    """Raises ReadError unless a shard ends in zeros or with the file: tarfile also stops at damaged headers."""
    with file.open("rb") as data:
        data.seek(offset)
        block = data.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is damaged at byte {offset}")
