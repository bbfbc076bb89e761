"""Samples of any model, from files: a folder of images, an .npz file or tar files, read in batches of constant memory.

- a folder of PNG, JPEG or WebP files; the name of the folder that holds an image is its class;
- an .npz file as ADM's scripts write them: arr_0 uint8 [N, H, W, 3], and labels arr_1 [N] if there are any;
- a tar file, a folder of them, or a pattern like samples-{00..07}.tar: members KEY.png, and KEY.cls if there are
  labels.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError, InputError, shown
from dsd_serve.imaging import codec
from training.evaluation.npz import Npz
from training.sources.shards import IMAGE_KINDS, MAX_LABEL, Member, check_end, check_member, expand, quoted

MAX_SAMPLES = 10_000_000
MAX_SIDE = 2048  # pixels
MAX_FILE = 32_000_000  # bytes of an image file
Encoded = tuple[str, str | None, Callable[[], bytes]]  # name, class, and reader of the bytes of an image


@dataclass
class SampleFiles:
    """A set of images in files. count: of images. formats: png, jpeg ..., or raw pixels. name, kind: for the report.

    `batches` may be iterated more than once; `classes` counts the images of each class that the last one yielded.
    """

    name: str
    kind: str
    count: int
    read: Callable[[int], Iterator[tuple[list[NDArray[np.uint8]], list[str | None]]]]
    formats: Counter[str] = field(default_factory=Counter)
    classes: Counter[str | None] = field(default_factory=Counter)

    def batches(self, rows: int) -> Iterator[list[NDArray[np.uint8]]]:
        """Images uint8 [3, H, W] in lists of `rows`; the last list is shorter. Raises CheckpointError."""
        self.formats.clear()
        self.classes.clear()
        for pixels, labels in self.read(rows):
            self.classes.update(labels)
            yield pixels

    def describe(self) -> dict[str, Any]:
        """What `batches` yielded last in plain values, for the report."""
        known = [count for label, count in self.classes.items() if label is not None]
        return {
            "name": self.name,
            "kind": self.kind,
            "formats": dict(sorted(self.formats.items())),
            "classes": {
                "classes": len(known),
                "fewest": min(known, default=0),
                "most": max(known, default=0),
                "unlabelled": self.classes[None],
            },
        }


def open_samples(place: str) -> SampleFiles:
    """The samples at a place. Raises CheckpointError, which says what there is instead."""
    path = Path(place).expanduser()
    if "{" in place:
        files = [Path(name).expanduser() for name in expand(place)]
        if missing := [file for file in files if not file.is_file()]:
            raise CheckpointError(f"--samples {shown(place)} names {missing[0]}, which does not exist")
        return tar_samples(place, files)
    if path.is_file() and path.suffix == ".npz":
        return npz_samples(path)
    if path.is_file() and path.suffix == ".tar":
        return tar_samples(path.name, [path])
    if path.is_dir():
        if files := sorted(path.glob("*.tar")):
            return tar_samples(path.name, files)
        return folder_samples(path)
    rule = "--samples must be a number of images to draw, or a folder, an .npz or a .tar file of images"
    raise CheckpointError(f"{rule}; there is no {shown(place)}" if not path.exists() else f"{rule}, got {shown(place)}")


def npz_samples(path: Path) -> SampleFiles:
    with Npz(path) as arrays:
        count = image_array(arrays)
        if has_labels := "arr_1" in arrays.members:
            header = arrays.header("arr_1")
            if header.shape != (count,) or header.dtype.kind not in "iu":
                raise CheckpointError(
                    f"{path}: arr_1 must hold the labels of {count} images, whole numbers of shape ({count},), got "
                    f"{header.dtype} of shape {header.shape}"
                )

    def read(rows: int) -> Iterator[tuple[list[NDArray[np.uint8]], list[str | None]]]:
        with Npz(path) as arrays:
            labels = arrays.pieces("arr_1", rows) if has_labels else None
            for piece in arrays.pieces("arr_0", rows):
                names: list[str | None] = [None] * len(piece)
                if labels is not None:
                    names = [str(label) for label in next(labels).tolist()]
                files.formats["pixels"] += len(piece)
                yield list(np.ascontiguousarray(piece.transpose(0, 3, 1, 2))), names

    files = SampleFiles(path.name, "npz", count, read)
    return files


def image_array(arrays: Npz) -> int:
    """The number of images of arr_0. Raises CheckpointError if it does not hold images."""
    if "arr_0" not in arrays.members:
        found = ", ".join(shown(name) for name in list(arrays.members)[:5]) or "none"
        raise CheckpointError(f"{arrays.path} must hold images as an array 'arr_0'; its arrays: {found}")
    header = arrays.header("arr_0")
    shape = header.shape
    is_batch = header.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3
    if not is_batch or min(shape) < 1 or max(shape[1:]) > MAX_SIDE:
        raise CheckpointError(
            f"{arrays.path}: arr_0 must hold images uint8 [N, H, W, 3] of at most {MAX_SIDE} pixels a side, got "
            f"{header.dtype} of shape {shape}"
        )
    check_count(arrays.path, shape[0])
    return shape[0]


def check_count(place: object, count: int) -> None:
    if not 1 <= count <= MAX_SAMPLES:
        raise CheckpointError(f"{place} holds {count} images; 1 to {MAX_SAMPLES} can be evaluated")


def folder_samples(folder: Path) -> SampleFiles:
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower()[1:] in IMAGE_KINDS and path.name[0] != "." and path.is_file()
    )
    names = sorted(str(path.relative_to(folder)) for path in islice(found, MAX_SAMPLES + 1))
    check_count(folder, len(names))

    def encoded() -> Iterator[Encoded]:
        for name in names:
            path = folder / name
            yield str(path), path.parent.name if "/" in name else None, partial(read_file, path)

    files = SampleFiles(folder.name or str(folder), "folder", len(names), lambda rows: decoded(encoded(), rows, files))
    return files


def read_file(path: Path) -> bytes:
    """At most MAX_FILE + 1 bytes of a file."""
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)


def tar_samples(name: str, paths: list[Path]) -> SampleFiles:
    count = 0
    for path in paths:
        count += sum(kind in IMAGE_KINDS for _, kind, _, _ in tar_members(path))
        if count > MAX_SAMPLES:
            break
    check_count(name, count)

    def encoded() -> Iterator[Encoded]:
        for path in paths:
            yield from tar_images(path)

    files = SampleFiles(name, "tar", count, lambda rows: decoded(encoded(), rows, files))
    return files


def tar_members(path: Path) -> Iterator[tuple[str, str, tarfile.TarFile, tarfile.TarInfo]]:
    """Key, suffix, file and header of the images and labels of a tar file."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:", tarinfo=Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all of them, a kilobyte each
                folder, _, last = member.name.rpartition("/")
                key, _, kind = last.partition(".")
                if member.isfile() and kind.lower() in (*IMAGE_KINDS, "cls"):
                    check_member(member, size)
                    yield f"{folder}/{key}", kind.lower(), tar, member
            check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path} is not a readable tar file: {reason}; a compressed one must be unpacked first"
        ) from None


def tar_images(path: Path) -> Iterator[Encoded]:
    """The images of a tar file. Members with one key follow one another, as webdataset requires."""
    key, data, label = "", None, None
    for member_key, kind, tar, member in tar_members(path):
        if member_key != key:
            if data is not None:
                yield f"{quoted(key.lstrip('/'))} of {path}", label, partial(bytes, data)
            key, data, label = member_key, None, None
        content = tar.extractfile(member).read(MAX_FILE + 1)  # type: ignore[union-attr]  # it is a file
        if kind == "cls":
            label = content[:MAX_LABEL].decode("ascii", "replace").strip()
        else:
            data = content
    if data is not None:
        yield f"{quoted(key.lstrip('/'))} of {path}", label, partial(bytes, data)


def decoded(
    images: Iterable[Encoded], rows: int, files: SampleFiles
) -> Iterator[tuple[list[NDArray[np.uint8]], list[str | None]]]:
    """Batches of pixels and classes, decoded by several threads. Counts the formats in `files`."""
    waiting: Iterator[Encoded] = iter(images)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(waiting, rows)):
            results: list[Any] = list(pool.map(decode, batch))
            files.formats.update(kind for kind, _ in results)
            yield [pixels for _, pixels in results], [label for _, label, _ in batch]


def decode(image: Encoded) -> tuple[str, NDArray[np.uint8]]:
    """The format and the pixels uint8 [3, H, W] of an image."""
    name, _, read = image
    try:
        data = read()
        if len(data) > MAX_FILE:
            raise InputError(f"the file has more than {MAX_FILE:,} bytes")
        source = codec.open_file(data, MAX_SIDE**2)
        return source.format.lower(), codec.decode(source)
    except InputError as error:
        raise CheckpointError(f"{name}: {error}") from None
