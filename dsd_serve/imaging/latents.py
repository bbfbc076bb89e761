"""Bytes <-> latents float32 [L, C]: .npy, safetensors or JSON, never a pickle.

safetensors is read and written here in a few lines, because serving does not need that package otherwise.
"""

import io
import json
import math
import re
import struct
from typing import Any

import numpy as np

from dsd_serve.errors import InputError, shown
from dsd_serve.rows import Array, Latents
from dsd_serve.strict_json import BYTE_ORDER_MARK, read_json

MEDIA_TYPES = {"npy": "application/x-npy", "safetensors": "application/x-safetensors", "json": "application/json"}
NAME = "latents"  # of the tensor in a safetensors file, of the key in JSON
NPY = b"\x93NUMPY"
MAX_HEADER = 10_000  # bytes; ours have about a hundred
SAFETENSORS_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


def read_latents(data: bytes, shape: tuple[int, int]) -> Latents:
    """Latents of `shape` from a file in any of the three formats; its first bytes tell which.

    Numbers may be float16, float32 or float64. Raises InputError with the rule and the value.
    """
    if data[:6] == NPY:
        array = read_npy(data, shape)
    elif data[8:9] == b"{" and b"\0" in data[:8]:  # the length of the header, which may begin with the byte of a brace
        array = read_safetensors(data, shape)
    elif data.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"["):
        array = read_json_latents(data, shape)
    else:
        raise InputError(f"the bytes are not readable latents: {expected(shape)}, as .npy, safetensors or JSON")
    with np.errstate(over="ignore"):  # overflows become infinite and are rejected
        latents = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(latents).all():
        raise InputError("the latents must be finite numbers of float32, got NaN, infinity or a number beyond it")
    return latents


def write_latents(z: Latents, form: str) -> bytes:
    """Latents as a file: form is npy, safetensors or json."""
    z = np.ascontiguousarray(z, "<f4")
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, z, allow_pickle=False)
        return buffer.getvalue()
    if form == "safetensors":
        entry = {"dtype": "F32", "shape": list(z.shape), "data_offsets": [0, z.nbytes]}
        header = json.dumps({NAME: entry}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # so that the numbers are aligned
        return struct.pack("<Q", len(header)) + header + z.tobytes()
    if form == "json":
        return json.dumps({NAME: z.tolist()}).encode()
    raise InputError(f"format must be one of {', '.join(MEDIA_TYPES)}, got {shown(form)}")


def expected(shape: tuple[int, int]) -> str:
    return f"latents of this model are floats of shape {list(shape)}"


def checked(shape: tuple[int, int], kind: object, found: Any, size: int) -> None:
    """Raise InputError for a wrong type, shape or number of bytes, before any memory is allocated for it."""
    if kind not in ("<f2", "<f4", "<f8"):
        raise InputError(
            f"{expected(shape)}; the type must be float16, float32 or float64, little-endian, got {kind!s:.40}"
        )
    if tuple(found) != shape:
        raise InputError(f"{expected(shape)}, got shape {shown(list(found))}")
    needed = math.prod(shape) * np.dtype(str(kind)).itemsize
    if size != needed:
        raise InputError(
            f"{expected(shape)}, which is {needed} bytes of data, got {size}; the file is cut off or too long"
        )


def read_npy_of_any_shape(data: bytes) -> Latents:
    """Latents [L, C] of the shape that a .npy file has. Raises InputError."""
    (found, _, _), _ = read_npy_header(data)
    if len(found) != 2:
        raise InputError(f"latents have a shape [tokens, channels], got {str(list(found))[:80]}")
    return read_latents(data, (found[0], found[1]))


def read_npy_header(data: bytes) -> tuple[tuple[tuple[int, ...], bool, Any], int]:
    """((shape, whether in Fortran order, dtype), offset of the numbers in bytes)."""
    stream = io.BytesIO(data)
    try:
        if re.search(rb"[0-9]L", data[: data.find(b"\n", 0, MAX_HEADER)]):
            raise ValueError("numbers as Python 2 wrote them, which numpy reads with a warning in our log")
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        return read(stream, max_header_size=MAX_HEADER), stream.tell()
    except Exception:  # numpy parses the header as a Python literal, which fails in many ways
        raise InputError("the .npy header cannot be read; write the file with numpy.save") from None


def read_npy(data: bytes, shape: tuple[int, int]) -> Array:
    (found, fortran, dtype), begin = read_npy_header(data)
    checked(shape, dtype.str, found, len(data) - begin)
    return np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")


def read_safetensors(data: bytes, shape: tuple[int, int]) -> Array:
    (length,) = struct.unpack_from("<Q", data)  # there are at least nine bytes
    if length > min(MAX_HEADER, len(data) - 8):
        raise InputError(f"the safetensors header must end within the file and have at most {MAX_HEADER} bytes")
    header = json_object(data[8 : 8 + length], "the safetensors header")
    header.pop("__metadata__", None)
    entry = header.get(NAME)
    if len(header) != 1 or not isinstance(entry, dict):
        raise InputError(f"the safetensors file must have one tensor, named {NAME}, got {shown(list(header))}")
    found, offsets = entry.get("shape"), entry.get("data_offsets")
    if not whole_numbers(found) or not whole_numbers(offsets) or offsets != [0, len(data) - 8 - length]:
        raise InputError(f"the tensor must have a shape and lie at data_offsets [0, {len(data) - 8 - length}]")
    kind = SAFETENSORS_TYPES.get(str(entry.get("dtype")), entry.get("dtype"))
    checked(shape, kind, found, len(data) - 8 - length)
    return np.frombuffer(data, str(kind), offset=8 + length).reshape(shape)


def read_json_latents(data: bytes, shape: tuple[int, int]) -> Array:
    most = 32 * math.prod(shape) + 1000  # a number of 17 digits with sign, exponent and comma has up to 26
    if len(data) > most:
        raise InputError(f"{expected(shape)}, whose JSON has at most {most:,} bytes, got {len(data):,}")
    content = json_object(data, "the JSON of the latents", 2 * math.prod(shape) + 100)
    if set(content) != {NAME}:
        raise InputError(f'the JSON must be {{"{NAME}": [[...], ...]}}, got the keys {shown(list(content))}')
    rows = content[NAME]
    if not isinstance(rows, list):
        raise InputError(f"{NAME} must be a list of {shape[0]} lists of numbers, got {shown(rows)}")
    found = [len(rows), *{len(row) if isinstance(row, list) else 0 for row in rows}]
    if tuple(found) != shape:
        raise InputError(f"{expected(shape)}, got {len(rows)} rows" + (f" of {found[1]}" if len(found) == 2 else ""))
    if not all(type(value) in (int, float) for row in rows for value in row):
        raise InputError(f"{expected(shape)}; every value in the JSON must be a number")
    try:
        return np.array(rows, np.float64)
    except OverflowError:  # a whole number beyond float64
        return np.full(shape, np.inf)


def json_object(data: bytes, what: str, most: int = MAX_HEADER) -> dict[str, Any]:
    content = read_json(data, what, most)
    if not isinstance(content, dict):
        raise InputError(f'{what} must be an object with the key "{NAME}", got {shown(content)}')
    return content


def whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
