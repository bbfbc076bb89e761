"""The same samples from a folder, from .npz files and from tar files; wrong places get a sentence."""

import io
import tarfile
import tracemalloc

import numpy as np
import pytest

from dsd_serve.errors import CheckpointError
from dsd_serve.imaging import codec
from tests.support.data import CLASSES, sample_image
from training.evaluation.sample_files import open_samples

COUNT = 30
PIXELS = np.stack([sample_image(CLASSES[i % 3], i) for i in range(COUNT)])
LABELS = np.array([CLASSES[i % 3] for i in range(COUNT)])
NHWC = np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def tar_members(indices):
    for i in indices:
        yield f"{i:05d}.png", codec.write_image(PIXELS[i])
        yield f"{i:05d}.cls", str(LABELS[i]).encode()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same samples in every form, by name."""
    folder = tmp_path_factory.mktemp("samples")
    np.savez(folder / "plain.npz", arr_0=NHWC, arr_1=LABELS)
    np.savez_compressed(folder / "packed.npz", arr_0=NHWC, arr_1=LABELS)
    for i in range(COUNT):
        file = folder / f"by-class/{LABELS[i]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(codec.write_image(PIXELS[i]))
    (folder / "by-class/manifest.json").write_text("{}")
    write_tar(folder / "one.tar", tar_members(range(COUNT)))
    (folder / "tars").mkdir()
    write_tar(folder / "tars/a-0.tar", tar_members(range(12)))
    write_tar(folder / "tars/a-1.tar", tar_members(range(12, COUNT)))
    names = ("plain.npz", "packed.npz", "by-class", "one.tar", "tars", "tars/a-{0..1}.tar")
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize("name", ["plain.npz", "packed.npz", "by-class", "one.tar", "tars", "tars/a-{0..1}.tar"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_every_form_holds_the_same_images(places, name, rows):
    files = open_samples(places[name])
    assert files.count == COUNT
    for _ in range(2):  # they can be read again
        batches = list(files.batches(rows))
        assert {len(batch) for batch in batches[:-1]} <= {rows}
        assert sorted(image.tobytes() for batch in batches for image in batch) == sorted(x.tobytes() for x in PIXELS)
        described = files.describe()
        assert described["classes"] == {"classes": 3, "fewest": 10, "most": 10, "unlabelled": 0}
        assert sum(described["formats"].values()) == COUNT


def test_samples_without_classes(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=NHWC)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/0.jpg").write_bytes(codec.write_image(PIXELS[0], "jpeg"))
    write_tar(tmp_path / "a.tar", [("0.png", codec.write_image(PIXELS[0]))])
    for name, count, form in (("a.npz", COUNT, "pixels"), ("flat", 1, "jpeg"), ("a.tar", 1, "png")):
        files = open_samples(str(tmp_path / name))
        assert sum(map(len, files.batches(8))) == count
        assert files.describe()["classes"] == {"classes": 0, "fewest": 0, "most": 0, "unlabelled": count}
        assert files.describe()["formats"] == {form: count}


def test_the_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = []
    for count in (200, 2000):
        np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((count, 32, 32, 3), np.uint8))
        files = open_samples(str(tmp_path / "a.npz"))
        tracemalloc.start()
        assert sum(len(batch) for batch in files.batches(20)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_wrong_places_get_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 500)
    write_tar(tmp_path / "none.tar", [("a.txt", b"x")])
    for place, sentence in (
        ("nowhere", "must be a number of images to draw, or a folder, an .npz or a .tar file of images; there is no"),
        ("a.txt", "must be a number of images to draw.*, got"),
        ("empty", "holds 0 images"),
        ("none.tar", "holds 0 images"),
        ("broken.tar", "is not a readable tar file"),
        ("x-{0..1}.tar", r"names .*x-0\.tar, which does not exist"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            open_samples(str(tmp_path / place))
    with pytest.raises(CheckpointError, match=r"broken/a\.png: .*(PNG|image)"):
        list(open_samples(str(tmp_path / "broken")).batches(4))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": NHWC}, r"must hold images as an array 'arr_0'; its arrays: 'images'"),
        ({"arr_0": NHWC.astype(np.float32)}, "got float32 of shape"),
        ({"arr_0": PIXELS}, r"uint8 \[N, H, W, 3\]"),
        ({"arr_0": NHWC[:0]}, "got uint8 of shape"),
        ({"arr_0": NHWC, "arr_1": LABELS[:5]}, r"the labels of 30 images.*got int64 of shape \(5,\)"),
        ({"arr_0": NHWC, "arr_1": LABELS.astype(float)}, "whole numbers"),
        ({"arr_0": np.array([None])}, "a pickle"),
    ],
)
def test_arrays_of_something_else_get_a_sentence(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CheckpointError, match=sentence):
        open_samples(str(tmp_path / "a.npz"))
