"""A folder of images: with a folder for each class, or without classes."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsd_serve.errors import CheckpointError, shown
from training.classes import NO_CLASSES, clean, some, table_of
from training.run_config import DataSection

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}  # in any case; the contents decide the format
OTHER_IMAGES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".dng", ".cr2"}
NOT_DATA = {"__MACOSX", "@eaDir"}  # what macOS and network drives leave in folders
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
MAX_FILE = 200_000_000  # bytes of one image

Identity = tuple[int, int]  # of a folder, however it is reached


class FolderSource:
    """The images in a folder, in the order of their paths. skipped: the number of files of other formats, by ending."""

    def __init__(self, folder: Path, data: DataSection) -> None:
        self.folder, self.skipped = folder, Counter[str]()
        around = {identity(place) for place in (folder.resolve(), *folder.resolve().parents)}
        top = sorted(self.images_in(folder))
        found = {sub: sorted(self.images_below(sub, set(around))) for sub in folders_in(folder)}
        full = sorted((sub for sub, files in found.items() if files), key=lambda sub: (clean(sub.name), sub.name))
        empty = [clean(sub.name) for sub in found if sub not in full]
        if not top and not full:
            self.refuse_empty()
        if data.labels == "none" or not full:
            self.files = sorted([*top, *(file for files in found.values() for file in files)])
            self.table, self.labels = NO_CLASSES, np.zeros(len(self.files), np.int64)
        else:
            self.check_layout(top, full)
            self.table, labels = table_of([sub.name for sub in full], data.labels, str(folder))
            self.files = [file for sub in full for file in found[sub]]
            self.labels = np.repeat(labels, [len(found[sub]) for sub in full])
        self.remarks = self.left_out([] if data.labels == "none" else sorted(empty))

    def images_below(self, folder: Path, seen: set[Identity]) -> Iterator[Path]:
        """The images of a folder and those in it. seen: folders that are not entered, so that links cannot loop."""
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            if (who := identity(current)) not in seen:
                seen.add(who)
                yield from self.images_in(current)
                waiting += reversed(folders_in(current))

    def images_in(self, folder: Path) -> Iterator[Path]:
        for entry in entries(folder):
            suffix = Path(entry.name).suffix.lower()
            if suffix in IMAGE_SUFFIXES and (entry.is_file() or is_dead_link(entry)):
                yield Path(entry.path)
            elif suffix in OTHER_IMAGES and entry.is_file():
                self.skipped[suffix] += 1

    def refuse_empty(self) -> None:
        others = f"; of other formats there are {self.counts()}" if self.skipped else ""
        raise CheckpointError(f"{self.folder} holds neither parquet nor tar files nor PNG, JPEG or WebP images{others}")

    def check_layout(self, top: list[Path], full: list[Path]) -> None:
        """Raises CheckpointError where folders and files do not say what the classes are."""
        if top:
            raise CheckpointError(
                f"{self.folder} has images both at its top ({shown(top[0].name)[1:-1]}) and in folders "
                f"({shown(full[0].name)[1:-1]}): move them into folders of their classes, or train without classes by "
                "data.labels=none"
            )
        names = [sub.name for sub in full]
        if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
            training = next((name for name in names if name.lower().startswith("train")), names[0])
            other = next(name for name in names if name != training)
            raise CheckpointError(
                f"{self.folder} holds parts of a data set ({', '.join(names)}), not classes: give "
                f"data.path={self.folder / training} and data.validation={self.folder / other}"
            )

    def left_out(self, empty: list[str]) -> list[str]:
        remarks = [f"left out: {self.counts()}, formats that are not read"] if self.skipped else []
        if empty:
            folders = "a folder" if len(empty) == 1 else f"{len(empty)} folders"
            remarks.append(f"left out: {folders} without images ({some(empty)})")
        return remarks

    def counts(self) -> str:
        return ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.skipped.items()))

    def read(self, index: int) -> tuple[bytes, str]:
        return read_file(self.files[index]), str(self.files[index])


def read_file(file: Path) -> bytes:
    """The bytes of an image file. Raises CheckpointError for a larger one or no regular file, OSError."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("it is not a file")
    if status.st_size > MAX_FILE:
        raise CheckpointError(f"it is larger than {MAX_FILE // 1_000_000} MB")
    return file.read_bytes()


def entries(folder: Path) -> list["os.DirEntry[str]"]:
    """The contents of a folder, without hidden files and files that are not data. Raises CheckpointError."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".") and entry.name not in NOT_DATA]
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be read: {error.strerror}") from None


def folders_in(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(folder) if entry.is_dir())


def identity(folder: Path) -> Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def is_dead_link(entry: "os.DirEntry[str]") -> bool:
    """A link to a file that is gone counts as an image that cannot be read."""
    return entry.is_symlink() and not os.path.exists(entry.path)
