"""Arrays of .npz files, read piece by piece, so that a file of any size takes little memory.

`numpy.load` reads a whole array, and takes the size in its header at its word. Here the header of a member is checked
against the size that the zip directory states, pickled objects are refused, and only as many bytes are unpacked as the
array has.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError, shown

MAX_MEMBERS = 1000
MAX_HEADER = 10_000  # bytes of the header of an array, numpy's own limit
MAX_ARRAY = 100_000_000  # bytes of an array that is read whole; 2048 x 2048 float64 is a third of it
BLOCK = 1 << 20  # bytes unpacked at a time
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError, SyntaxError)


@dataclass(frozen=True)
class Header:
    """Shape and type of an array, and the byte of its member at which its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    begin: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Npz:
    """An open .npz file: `with Npz(path) as arrays`. All methods raise CheckpointError with the fault of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {path}") from None
        except IsADirectoryError:
            raise CheckpointError(f"{path} is a folder, not an .npz file") from None
        except BROKEN as error:
            raise self.fault(error) from None
        self.members = {
            entry.filename.removesuffix(".npy"): entry
            for entry in self.archive.infolist()[:MAX_MEMBERS]
            if entry.filename.endswith(".npy")
        }

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.archive.close()

    def fault(self, error: Exception) -> CheckpointError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return CheckpointError(f"{self.path} is not a readable .npz file: {reason}")

    def header(self, name: str) -> Header:
        """The header of an array. The array is not a pickle, is in C order, and has the size of its member."""
        entry = self.members[name]
        try:
            with self.archive.open(entry) as member:
                start = io.BytesIO(member.read(MAX_HEADER + 100))
            version = npy.read_magic(start)
            reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = reader(start, max_header_size=MAX_HEADER)
        except BROKEN as error:
            raise self.fault(error) from None
        if dtype.hasobject:
            raise CheckpointError(f"{self.path}: array {shown(name)} holds Python objects, a pickle; it is not loaded")
        if is_fortran and len(shape) > 1:
            raise CheckpointError(f"{self.path}: array {shown(name)} is in Fortran order; save it in C order")
        header = Header(shape, dtype, start.tell())
        if entry.file_size != header.begin + header.num_bytes:
            raise CheckpointError(
                f"{self.path} is damaged: array {shown(name)} of shape {shape} and type {dtype} needs "
                f"{header.num_bytes} bytes, and there are {entry.file_size - header.begin}"
            )
        return header

    def array(self, name: str) -> NDArray[Any]:
        """A whole array, of at most MAX_ARRAY bytes."""
        header = self.header(name)
        if header.num_bytes > MAX_ARRAY:
            raise CheckpointError(
                f"{self.path}: array {shown(name)} has {header.num_bytes} bytes; at most {MAX_ARRAY} are read whole"
            )
        (whole,) = self.pieces(name, max(header.shape[0], 1)) if header.shape else self.pieces(name, 1)
        return whole

    def pieces(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """An array in pieces of `rows` entries of its first axis; the last one is smaller."""
        header = self.header(name)
        count = header.shape[0] if header.shape else 1
        each = header.num_bytes // max(count, 1)
        try:
            with self.archive.open(self.members[name]) as member:
                read_exactly(member, header.begin)
                for begin in range(0, max(count, 1), rows):
                    here = min(rows, count - begin)
                    values = np.frombuffer(read_exactly(member, here * each), header.dtype)
                    yield values.reshape(here, *header.shape[1:]) if header.shape else values.reshape(())
                member.read(1)  # reaches the end, where zipfile compares the checksum
        except BROKEN as error:
            raise self.fault(error) from None


def read_exactly(member: IO[bytes], count: int) -> bytearray:
    """The next `count` bytes of a member; EOFError if it ends before."""
    found = bytearray(count)
    view, done = memoryview(found), 0
    while done < count:
        block = member.read(min(BLOCK, count - done))
        if not block:
            raise EOFError(f"it ends {count - done} bytes early")
        view[done : done + len(block)] = block
        done += len(block)
    return found
