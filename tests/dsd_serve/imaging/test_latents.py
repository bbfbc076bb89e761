import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsd_serve.errors import InputError
from dsd_serve.imaging.latents import MEDIA_TYPES, read_latents, write_latents

SHAPE = (4, 3)
Z = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def tensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@settings(deadline=None)
@given(z=arrays(np.float32, SHAPE, elements=floats), form=st.sampled_from(sorted(MEDIA_TYPES)))
def test_the_round_trip_is_bit_exact(z, form):
    assert np.array_equal(read_latents(write_latents(z, form), SHAPE).view(np.uint32), z.view(np.uint32))


def test_files_are_compatible_with_other_libraries():
    assert np.array_equal(safetensors.numpy.load(write_latents(Z, "safetensors"))["latents"], Z)
    assert np.array_equal(read_latents(safetensors.numpy.save({"latents": Z}, {"by": "x"}), SHAPE), Z)
    assert np.array_equal(np.load(io.BytesIO(write_latents(Z, "npy")), allow_pickle=False), Z)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_other_floats_and_orders_become_float32(dtype):
    for data in (npy(Z.astype(dtype)), npy(np.asfortranarray(Z.astype(dtype)))):
        z = read_latents(data, SHAPE)
        assert z.dtype == np.float32
        assert z.flags.c_contiguous
        assert np.array_equal(z, Z.astype(dtype).astype(np.float32))
    half = safetensors.numpy.save({"latents": Z.astype(dtype)})
    assert np.array_equal(read_latents(half, SHAPE), Z.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("length", [ord("{"), ord("[")])
def test_a_header_whose_length_looks_like_json_is_safetensors(length):
    text = json.dumps({"latents": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}, separators=(",", ":"))
    assert np.array_equal(read_latents(tensors(text.ljust(length).encode(), Z.tobytes()), SHAPE), Z)


ENTRY = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
BODY = Z.tobytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not readable latents"),
        (b"PK\x03\x04 an npz or a .pt", "not readable latents"),
        (pickle.dumps(Z), "not readable latents"),
        (npy(Z.T), r"shape \[4, 3\], got shape \[3, 4\]"),
        (npy(Z[None]), r"got shape \[1, 4, 3\]"),
        (npy(Z.astype(np.int32)), "must be float16, float32 or float64, little-endian, got <i4"),
        (npy(Z.astype(">f4")), "got >f4"),
        (npy(Z)[:-1], "48 bytes of data, got 47; the file is cut off"),
        (npy(Z) + b"x", "got 49"),
        (npy(Z)[:40], "header cannot be read"),
        (npy(Z).replace(b"(4, 3), }", b"(4L,3L),}"), "header cannot be read"),  # numpy would write a warning to the log
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "header cannot be read"),
        (b"\x93NUMPY\x09\x00", "header cannot be read"),
        (npy(np.full(SHAPE, np.nan, np.float32)), "must be finite"),
        (npy(np.full(SHAPE, 1e300)), "must be finite"),
        (tensors({"latents": ENTRY}, BODY, 2**63), "header must end within the file"),
        (tensors({"latents": ENTRY}, BODY, 0), "the safetensors header is empty"),
        (tensors({"latents": ENTRY}, BODY[:-4]), r"data_offsets \[0, 44\]"),
        (tensors({"latents": {**ENTRY, "data_offsets": [0, 2**70]}}, BODY), "data_offsets"),
        (tensors({"latents": {**ENTRY, "data_offsets": [-48, 0]}}, BODY), "data_offsets"),
        (tensors({"latents": {**ENTRY, "data_offsets": [False, 48]}}, BODY), "data_offsets"),
        (tensors({"latents": {**ENTRY, "shape": [2**62, 4]}}, BODY), "got shape"),
        (tensors({"latents": {**ENTRY, "shape": "4,3"}}, BODY), "must have a shape"),
        (tensors({"latents": {**ENTRY, "dtype": "I32"}}, BODY), "got I32"),
        (tensors({"latents": {**ENTRY, "dtype": ["F32"]}}, BODY), "float16, float32 or float64"),
        (tensors({"z": ENTRY}, BODY), "one tensor, named latents"),
        (tensors({"latents": ENTRY, "more": ENTRY}, BODY), "one tensor, named latents"),
        (tensors({"latents": []}, BODY), "one tensor, named latents"),
        (tensors(b'{"a":' * 1500), "the safetensors header is not valid JSON: it is nested too deeply"),
        (tensors(b"{" + b" " * 20_000), "at most 10000 bytes"),
        (b"[[1, 2, 3]]", r'object with the key "latents", got \[\[1, 2, 3\]\]'),
        (b'{"latents": [[1, 2, 3], [4, 5]]}', "got 2 rows"),
        (b'{"latents": [[1, 2, 3], [4, 5, 6]]}', "got 2 rows of 3"),
        (b'{"latents": [1, 2, 3, 4]}', "got 4 rows"),
        (b'{"latents": {}}', r"latents must be a list of 4 lists of numbers, got \{\}"),
        (b'{"z": []}', "got the keys"),
        (json.dumps({"latents": [[1, 2, "3"]] * 4}).encode(), "must be a number"),
        (json.dumps({"latents": [[1, 2, True]] * 4}).encode(), "must be a number"),
        (json.dumps({"latents": [[1, 2, float("nan")]] * 4}).encode(), "NaN is not a number of JSON"),
        (json.dumps({"latents": [[1, 2, 10**60]] * 4}).encode(), "must be finite"),
        (b'{"latents": ' + b"[" * 1200, "the JSON of the latents must hold at most 124 values"),
        (b'{"latents": [' + b" " * 2000, "at most 1,384 bytes"),
        (b'{"latents": "\xff"}', "it must be in UTF-8"),
        (json.dumps({"latents": Z.tolist()}).encode("utf-16"), "not readable latents"),
        (b'{"latents": [], "latents": []}', "'latents' is given twice"),
        (b'{"latents": ' + b"9" * 1000, "not valid JSON"),
    ],
)
def test_errors_name_the_fault(data, words):
    with pytest.raises(InputError, match=words):
        read_latents(data, SHAPE)


def good_or_refused(data):
    try:
        z = read_latents(data, SHAPE)
    except InputError as error:
        assert len(str(error)) < 300
    else:
        assert (z.shape, z.dtype) == (SHAPE, np.float32)
        assert np.isfinite(z).all()


starts = st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00v\x00{", b"{", b'{"latents":', bytes(8) + b"{"])


@settings(deadline=None)
@given(start=starts, rest=st.binary(max_size=300))
def test_any_bytes_are_latents_or_rejected(start, rest):
    good_or_refused(start + rest)


@settings(deadline=None)
@given(
    form=st.sampled_from(sorted(MEDIA_TYPES)),
    cut=st.integers(0, 200),
    flips=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 255)), max_size=4),
)
def test_damaged_files_are_latents_or_rejected(form, cut, flips):
    data = bytearray(write_latents(Z, form))
    for place, change in flips:
        data[place % len(data)] ^= change
    good_or_refused(bytes(data[: len(data) - cut]))


class Trap:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_no_pickle_is_ever_loaded(tmp_path):
    trap = tmp_path / "sprung"
    objects = np.full(SHAPE, None, object)
    objects[0, 0] = Trap(trap)
    bare = pickle.dumps(Trap(trap))
    behind = [npy(Z)[:128] + bare, tensors({"latents": ENTRY}, bare), b"\x80" + bare]
    for data in (npy(objects, allow_pickle=True), bare, *behind):
        with pytest.raises(InputError):
            read_latents(data, SHAPE)
    assert not trap.exists()
    np.load(io.BytesIO(npy(objects, allow_pickle=True)), allow_pickle=True)  # the trap does work
    assert trap.exists()
