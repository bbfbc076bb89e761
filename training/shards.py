"""Webdataset shards: tar files whose members KEY.jpg and KEY.cls are a picture and its label.

They are read where they lie. Their headers are read once, for where each picture begins, so that any picture can be
read at once and the order of training stays a function of (seed, step): a run resumes in the middle of an epoch without
reading what went before. What was found is kept beside the shards in `.dsd-index.npz`, where that can be written.
"""

import logging
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsd_serve.checkpoint import atomic
from dsd_serve.errors import CheckpointError

log = logging.getLogger(__name__)

PICTURES = {"jpg", "jpeg", "png", "webp"}
INDEX = ".dsd-index.npz"


class TarSource:
    """Encoded pictures by index, in the order of the shards. `shards` [N] tells which shard a picture is in."""

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
    """Brace patterns as shells and webdataset have them: a-{000..002}.tar, {train,more}.tar."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    if between := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = between[1], between[2]
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [path for choice in choices for path in expand(pattern[: found.start()] + choice + pattern[found.end() :])]


def read_index(files: Sequence[Path]) -> list[NDArray[np.int64]]:
    """For each shard (offset, length, label) of its pictures, [N, 3]; from the index where the shard is as it was."""
    kept, tables = load_index(files[0].parent / INDEX), {}
    stamps = {file: f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files}
    new = [file for file in files if stamps[file] not in kept]
    if new:
        log.info("reading the headers of %d tar files", len(new))
        with ThreadPoolExecutor() as pool:
            tables = dict(zip((stamps[file] for file in new), pool.map(scan, new), strict=True))
        known = {stamp: kept[stamp] for stamp in stamps.values() if stamp in kept}
        save_index(files[0].parent / INDEX, {**known, **tables})
    found = {**kept, **tables}
    return [found[stamps[file]] for file in files]


def load_index(path: Path) -> dict[str, NDArray[np.int64]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return {}
    except Exception:  # zip, numpy and the file system raise their own; a broken index is made again
        log.info("%s cannot be read and is made again", path)
        return {}


def save_index(path: Path, tables: dict[str, NDArray[np.int64]]) -> None:
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **tables)  # type: ignore[arg-type]  # its other argument is a bool
    except OSError as error:
        log.info("%s cannot be written (%s), so the next start reads the headers again", path, error.strerror)


def scan(file: Path) -> NDArray[np.int64]:
    """(offset, length, label) of the pictures of a shard, [N, 3], in their order."""
    rows: dict[str, list[int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if not member.isfile():
                    continue
                if kind.lower() in PICTURES:
                    rows[key] = [member.offset_data, member.size]
                elif kind == "cls":
                    text = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
                    labels[key] = int(text) if text.strip().isdigit() else -1
    except (tarfile.TarError, OSError) as error:
        raise CheckpointError(
            f"{file} is no tar file that can be read: {error}; compressed ones must be unpacked"
        ) from None
    for key in rows:
        if labels.get(key, -1) < 0:
            raise CheckpointError(
                f"{file}: picture {key.lstrip('/')} needs a member {key.lstrip('/')}.cls with its label"
            )
    if not rows:
        raise CheckpointError(f"{file} holds no pictures: members KEY.jpg and KEY.cls are looked for")
    return np.array([[*row, labels[key]] for key, row in rows.items()], np.int64)
