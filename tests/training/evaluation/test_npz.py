"""Arrays of .npz files are read piece by piece; damaged and hostile files get a sentence."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from dsd_serve.errors import CheckpointError
from training.evaluation.npz import Npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f4", "f8"])
def test_pieces_are_those_of_the_array(tmp_path, save, dtype):
    values = (np.arange(7 * 5 * 2).reshape(7, 5, 2) * 3).astype(dtype)
    save(tmp_path / "a.npz", values=values, one=np.array(5), none=np.empty((0, 3)))
    with Npz(tmp_path / "a.npz") as arrays:
        for rows in (1, 3, 7, 100):
            pieces = list(arrays.pieces("values", rows))
            assert [len(piece) for piece in pieces[:-1]] == [rows] * (len(pieces) - 1)
            assert np.array_equal(np.concatenate(pieces), values)
        assert np.array_equal(arrays.array("values"), values)
        assert arrays.array("one") == 5
        assert arrays.header("none").shape == (0, 3)


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy_bytes(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def test_wrong_files_get_a_sentence(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(CheckpointError, match=r"there is no file .*a\.npz"):
        Npz(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        Npz(tmp_path)
    path.write_bytes(b"no zip" * 100)
    with pytest.raises(CheckpointError, match=r"is not a readable \.npz file: File is not a zip file"):
        Npz(path)
    np.savez(path, a=np.arange(1000))
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(CheckpointError, match="is not a readable"):
        Npz(path)
    for damaged, fault in (
        ({"a.npy": b"text"}, "is not a readable"),
        ({"a.npy": npy_bytes(np.arange(9))[:-8]}, "needs 72 bytes, and there are 64"),
        ({"a.npy": npy_bytes(np.arange(9)) + b"more"}, "needs 72 bytes, and there are 76"),
        ({"a.npy": npy_bytes(np.array([print, 3], object), allow_pickle=True)}, "holds Python objects, a pickle"),
        ({"a.npy": npy_bytes(np.asfortranarray(np.ones((3, 4))))}, "is in Fortran order"),
        ({"a.npy": npy_bytes(np.arange(9)).replace(b"(9,)", b"(-1)")}, "is not a readable"),
        ({"a.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"x" * 50}, "is not a readable"),
    ):
        write_members(path, damaged)
        with Npz(path) as arrays, pytest.raises(CheckpointError, match=fault):
            arrays.array("a")


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(100_000))
    data = bytearray(path.read_bytes())
    data[400_000] ^= 1
    path.write_bytes(data)
    with Npz(path) as arrays, pytest.raises(CheckpointError, match="Bad CRC-32"):
        list(arrays.pieces("a", 1000))


def test_a_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "a.npz"
    write_members(path, {"a.npy": npy_bytes(np.zeros(12_600_000))}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 300_000
    with Npz(path) as arrays:
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="has 100800000 bytes; at most 100000000"):
            arrays.array("a")
        next(arrays.pieces("a", 1000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4_000_000
