"""Samples as ADM's .npz (arXiv 2105.05233): arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N], the labels.

The pixels are appended to a raw file next to it, one record an image, which is what a stopped run goes on from. At the
end it is copied into the .npz in constant memory, so twice its size must be free on the disk. The .npz is not
compressed and has no dates: the same samples are the same bytes.
"""

import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from glob import escape
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.files import atomic
from dsd_serve.shell.manifest import OF_A_SHARD, check_same, read_manifest, write_manifest
from dsd_serve.shell.sample_set import Sample, SampleSet, Shard, label_of

BLOCK = 1 << 20  # bytes of pixels, or labels, at a time


class SampleArrays:
    """FILE.npz; a shard of several has a file of its own, FILE-3-of-8.npz, and `merge` joins them."""

    unit = 1

    def __init__(self, whole: Path, shard: Shard) -> None:
        self.target = whole.with_stem(whole.stem + shard.suffix)
        self.manifest = whole.with_name(f"{self.target.stem}-manifest.json")
        self.part = whole.with_name(f".{self.target.name}.part")

    def others(self) -> Sequence[Path]:
        return ()

    def check_new(self, numbers: range) -> None:
        """Raises InputError if there is a file that is not of this run."""
        if self.target.exists():
            raise InputError(f"{self.target} already exists; give another -o, or delete it")
        self.part.unlink(missing_ok=True)

    def begin(self, samples: SampleSet, numbers: range, size: int) -> Iterator[int]:
        """The numbers whose pixels are not there yet."""
        self.samples, self.numbers, self.size = samples, numbers, size
        if self.target.exists():
            return iter(())
        record = 3 * size * size
        self.file: IO[bytes] = self.part.open("ab")
        done = min(self.file.tell() // record, len(numbers))
        self.file.truncate(done * record)
        self.file.seek(0, 2)
        return iter(numbers[done:])

    def encode(self, sample: Sample, image: Image.Image) -> bytes:
        return image.tobytes()

    def write(self, sample: Sample, data: bytes) -> None:
        self.file.write(data)
        self.file.flush()

    def finish(self) -> Sequence[Path]:
        if not self.target.exists():
            self.file.close()
            with self.part.open("rb") as pixels:
                write_arrays(self.target, len(self.numbers), self.size, [pixels], labels(self.samples, self.numbers))
        self.part.unlink(missing_ok=True)
        return [self.target]


def labels(samples: SampleSet, numbers: range) -> Iterator[bytes]:
    """The labels of samples as int64, block by block."""
    order = np.array([label_of(target) for target in samples.classes], "<i8")
    for start in range(0, len(numbers), BLOCK):
        block = np.arange(numbers[start], numbers[start] + min(BLOCK, len(numbers) - start))
        yield order[(block + samples.params.index) % len(order)].tobytes()


def write_arrays(path: Path, count: int, size: int, pixels: Sequence[IO[bytes]], labels: Iterable[bytes]) -> None:
    """Write an .npz atomically, of the files of pixels one after another and of blocks of labels."""
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with entry(archive, "arr_0.npy", (count, size, size, 3), "|u1") as file:
            for one in pixels:
                shutil.copyfileobj(one, file, BLOCK)
        with entry(archive, "arr_1.npy", (count,), "<i8") as file:
            for block in labels:
                file.write(block)


def entry(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: str) -> IO[bytes]:
    """A new file of an .npz with the header of its array; the numbers follow."""
    info = zipfile.ZipInfo(name)  # its date is 1980-01-01
    info.create_system = 3
    file = archive.open(info, "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file


def merge(target: Path) -> Path:
    """Join the shards of FILE.npz, FILE-1-of-N.npz and so on, into FILE.npz: the bytes that one run writes.

    They stay. Returns the manifest of the whole. Raises InputError if a shard is missing, unfinished or of another run.
    """
    found = list(target.parent.glob(f"{escape(target.stem)}-*-of-*-manifest.json"))
    counts = {path.name.removesuffix("-manifest.json").rpartition("-")[2] for path in found}
    if len(counts) != 1 or not (count := counts.pop()).isdecimal():
        what = f"shards of {' and of '.join(sorted(counts))} parts" if found else "no shards"
        raise InputError(f"there are {what} next to {target}; --merge takes {target.stem}-1-of-N.npz to N-of-N")
    shards = [SampleArrays(target, Shard(number, int(count))) for number in range(1, int(count) + 1)]
    plans = [read_finished(shard.manifest) for shard in shards]
    for shard, plan in zip(shards, plans, strict=True):
        check_same(shard.manifest, plan, plans[0], OF_A_SHARD)
    whole = {**plans[0], "shard": 1, "shards": 1, "count": sum(plan["count"] for plan in plans)}
    merged = SampleArrays(target, Shard())
    for path in (target, merged.manifest):
        if path.exists():
            raise InputError(f"{path} already exists; give another -o, or delete it")
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(shard.target)) for shard in shards]
        pixels, numbers = (
            [stack.enter_context(numbers_of(archive, name)) for archive in archives]
            for name in ("arr_0.npy", "arr_1.npy")
        )
        blocks = (block for file in numbers for block in iter(partial(file.read, BLOCK), b""))
        write_arrays(target, whole["count"], whole["size"], pixels, blocks)
    write_manifest(merged.manifest, whole)
    return merged.manifest


def numbers_of(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """A file of an .npz after the header of its array."""
    file = archive.open(name)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return file


def read_finished(path: Path) -> dict[str, Any]:
    """The manifest of a shard that is complete. Raises InputError."""
    plan = read_manifest(path)
    if plan is None or not plan.get("complete"):
        raise InputError(f"the shard of {path} is {'missing' if plan is None else 'not finished'}; draw it first")
    return plan
