"""Webdataset shards, the order in which they are read, and interrupted runs over them."""

import contextlib
import io
import json
import os
import random
import signal
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd_serve.checkpoint import read_checkpoint
from dsd_serve.errors import CheckpointError
from dsd_serve.imaging.codec import fit_as_adm, write_image
from tests.support.data import CLASSES, ROOT, sample_image, train_arguments
from tests.support.runs import assert_same, launch
from training.dataset import Images
from training.order import Order
from training.run_config import load_config
from training.sources.shards import INDEX, expand
from training.train import train


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, count=3, each=12):
    """`count` tar files of `each` images, of the classes in turn."""
    folder.mkdir()
    for shard in range(count):
        members = []
        for number in range(each):
            label = CLASSES[number % 3]
            members += [(f"{shard}/{number:04d}.png", write_image(sample_image(label, shard * each + number)))]
            members += [(f"{shard}/{number:04d}.cls", str(label).encode())]
        write_shard(folder / f"train-{shard:03d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("tars") / "shards")


def test_images_are_those_of_the_shards(shards):
    images = Images(str(shards), 24, classes=(207, 950))
    assert len(images) == 24
    pixels, label = images[8]  # the second class of three, so image 13 of all: shard 1, number 1
    assert label == 207
    assert np.array_equal(pixels.numpy(), sample_image(207, 13))
    assert images.shards().tolist() == [0] * 8 + [1] * 8 + [2] * 8
    some = Images(str(shards / "train-{000..001}.tar"), 24)
    assert len(some) == 24 and np.array_equal(some[20][0].numpy(), Images(str(shards), 24)[20][0].numpy())


def test_brace_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand("plain.tar") == ["plain.tar"]


def test_headers_are_read_once_and_again_where_a_shard_changed(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = write_shards(tmp_path / "shards", count=2, each=3)
    write_shard(folder / "val-0.tar", [("a.png", b""), ("a.cls", b"1")])
    Images(str(folder), 24)
    assert "headers of 2 tar files" in caplog.text, "validation is not mixed in"
    caplog.clear()
    before = Images(str(folder), 24)[5]
    assert caplog.text == "" and (folder / INDEX).exists()
    write_shard(folder / "train-000.tar", [("a.png", write_image(sample_image(1, 99))), ("a.cls", b"1\n")])
    after = Images(str(folder), 24)
    assert "headers of 1 tar files" in caplog.text
    assert len(after) == 4
    assert np.array_equal(after[0][0].numpy(), sample_image(1, 99))
    assert torch.equal(after[3][0], before[0])
    (folder / INDEX).write_bytes(b"broken")
    assert len(Images(str(folder), 24)) == 4
    assert "is rebuilt" in caplog.text


def test_wrong_shards_get_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"names .*b-1\.tar, which does not exist"):
        Images(str(tmp_path / "b-{1..2}.tar"), 16)
    for members, named in (
        ([("a.png", b"x"), ("b.png", b"x"), ("b.cls", b"dog")], r"image a needs a member a\.cls with its class"),
        ([("a.png", b"x"), ("a.cls", b"")], r"member a\.cls must name a class"),
        ([("a.txt", b"x")], "holds no images"),
    ):
        write_shard(tmp_path / "x.tar", members)
        with pytest.raises(CheckpointError, match=named):
            Images(str(tmp_path / "x.tar"), 16)
    (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(CheckpointError, match=r"x\.tar is not a readable tar file"):
        Images(str(tmp_path), 16)
    write_shard(tmp_path / "x.tar", [("a.png", b"no image"), ("a.cls", b"1")])
    with pytest.raises(CheckpointError, match=r"no image of class 1 \(goldfish\) can be read: at byte 512 of x\.tar"):
        Images(str(tmp_path), 16)[0]


# Damaged and malicious shards.


def header(name, size, kind=tarfile.REGTYPE, **fields):
    """A header block; size: an integer, or the bytes of its field."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % 512)


def member(name, data, size=None):
    return header(name, len(data) if size is None else size) + padded(data)


def pax(records, kind=tarfile.XHDTYPE):
    data = b"".join(records)
    return header("pax", len(data), kind) + padded(data)


def record(key, value):
    text = f" {key}={value}\n"
    length = len(text) + len(str(len(text) + 2))
    return f"{length}{text}".encode()


IMAGE = write_image(sample_image(1, 1))
GOOD = member("a.png", IMAGE) + member("a.cls", b"1")
END = bytes(1024)
SPARSE_10 = [record("GNU.sparse.major", 1), record("GNU.sparse.minor", 0), record("GNU.sparse.name", "a.cls")]

BROKEN = {
    "a negative size": GOOD + header("b.png", -1024) + END,
    "a negative size that leads back": header("b.png", -(10**6)) + GOOD + END,
    "a size beyond the end": GOOD + header("b.png", 10**6) + END,
    "a size of many octets": GOOD + header("b.png", 2**80) + END,
    "a size that is not a number": GOOD + header("b.png", b"not a number") + END,
    "a label of megabytes": member("a.png", IMAGE) + member("a.cls", b"1" * 2_000_000) + END,
    "a label of many digits": member("a.png", IMAGE) + member("a.cls", b"9" * 20) + END,
    "a label that is not text": member("a.png", IMAGE) + member("a.cls", b"\xff\xfe") + END,
    "a label with a control character": member("a.png", IMAGE) + member("a.cls", b"a\x1bb") + END,
    "json that is not json": member("a.png", IMAGE) + member("a.json", b"{") + END,
    "json of megabytes": member("a.png", IMAGE) + header("a.json", 2_000_000) + bytes(2_000_000) + END,
    "json nested too deeply": member("a.png", IMAGE) + member("a.json", b"[" * 100_000) + END,
    "a class in only one of two": GOOD + member("b.png", IMAGE) + END,
    "a negative size by pax": pax([record("size", -5)]) + GOOD + END,
    "a size by pax that leads back": GOOD + pax([record("size", -1536)]) + member("b.png", b"x") + END,
    "a size by pax beyond the end": pax([record("size", 10**13)]) + GOOD + END,
    "a size by pax for all": pax([record("size", 10**13)], tarfile.XGLTYPE) + GOOD + END,
    "pax of megabytes": header("pax", 10**6, tarfile.XHDTYPE) + bytes(10**6) + GOOD + END,
    "pax of a negative size": header("pax", -512, tarfile.XHDTYPE) + GOOD + END,
    "a long name of megabytes": header("x", 10**6, tarfile.GNUTYPE_LONGNAME) + b"x" * (10**6) + GOOD + END,
    "long names of long names": (header("x", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"a.png")) * 3000 + GOOD + END,
    "an old sparse file": header("a.png", 512, tarfile.GNUTYPE_SPARSE) + bytes(512) + END,
    "a sparse file by pax 1.0": pax([*SPARSE_10, record("GNU.sparse.realsize", 10**10)])
    + member("a.cls", b"99999999999\n")
    + END,
    "a sparse file by pax 0.1": pax([record("GNU.sparse.map", "0,1"), record("GNU.sparse.size", 10**10)]) + GOOD + END,
    "a sparse file by pax 0.0": pax([record("GNU.sparse.size", 10**10)]) + GOOD + END,
    "only a link": header("a.png", 0, tarfile.SYMTYPE) + END,
    "only a device": header("a.png", 0, tarfile.CHRTYPE) + END,
    "garbage between members": GOOD + b"x" * 512 + GOOD + END,
    "half a header": GOOD + header("b.png", 3)[:100],
    "half an image": (GOOD + member("b.png", bytes(5000)))[:-2000],
    "nothing": b"",
    "zeros": END,
    "text": b"hello" * 300,
    "a gzip file": b"\x1f\x8b\x08" + bytes(1000),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.timeout(20)
def test_a_shard_that_is_damaged_is_refused_in_a_sentence_at_once(tmp_path, what):
    (tmp_path / "x.tar").write_bytes(BROKEN[what])
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.tar") as error:
            Images(str(tmp_path / "x.tar"), 16)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 500 + len(str(tmp_path)) and str(error.value).isprintable()
    assert not isinstance(error.value.__cause__, BaseException)


def test_links_devices_and_strange_members_are_skipped(tmp_path):
    others = [header(f"b{kind.decode()}.png", 0, kind) for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)]
    long = header("x", 300, tarfile.GNUTYPE_LONGNAME) + padded(b"d/" + b"x" * 298)
    text = pax([record("path", "größe.txt"), record("mtime", "1.5")]) + member("x", b"read me")
    (tmp_path / "x.tar").write_bytes(
        b"".join(others) + long + member("y", b"") + text + GOOD
    )  # without zeros at its end
    pixels, label = Images(str(tmp_path / "x.tar"), 24)[0]
    assert label == 1 and np.array_equal(pixels.numpy(), sample_image(1, 1))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, len(GOOD)),
)
def test_bytes_changed_anywhere(tmp_path, changes, cut):
    data = bytearray(GOOD + END)
    for place, value in changes:
        data[place] = value
    (tmp_path / "x.tar").write_bytes(data[: len(data) - cut])
    (tmp_path / INDEX).unlink(missing_ok=True)
    with contextlib.suppress(CheckpointError):
        images = Images(str(tmp_path / "x.tar"), 16)
        for index in range(len(images)):
            images[index]


@pytest.mark.timeout(20)
def test_a_false_or_huge_index_is_rebuilt(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "x.tar"
    file.write_bytes(GOOD + END)
    stamp = f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
    good = np.array([[512, len(IMAGE), 1]])
    forgeries = [
        lambda: np.savez_compressed(tmp_path / INDEX, **{stamp: np.zeros((2_000_000, 3), np.int64)}),
        *(
            lambda table=table: np.savez(tmp_path / INDEX, **{stamp: table})
            for table in (
                np.array([[512, 10**12, 1]]),
                np.array([[-5, 5, 1]]),
                np.array([[2**62, 2**62, 1]]),
                np.array([[0, 1, -1]]),
                good.astype(np.float64),
                good.astype("U5"),
                np.empty((0, 3), np.int64),
                good[0],
            )
        ),
    ]
    for forge in forgeries:
        forge()
        caplog.clear()
        tracemalloc.start()
        images = Images(str(file), 24)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
        tracemalloc.stop()
        assert "is rebuilt" in caplog.text
        assert np.array_equal(images[0][0].numpy(), sample_image(1, 1))
    caplog.clear()
    assert len(Images(str(file), 24)) == 1 and caplog.text == "", "the index is used again"


def test_patterns_that_name_too_much():
    for pattern in ("{0..99999999}.tar", "{0..999}{0..999}{0..999}.tar", "{1..999999999999}.tar"):
        with pytest.raises(CheckpointError, match="names more than 1000000 files"):
            expand(pattern)
    assert expand("{9..1}") == [] and expand("{" + "9" * 5000 + "..1}") == ["9" * 5000 + "..1"]


def test_shards_are_shuffled_a_few_at_a_time_and_every_image_comes_once():
    shards = np.repeat(np.arange(10), 7)
    order = Order(70, 14, 3, shards, together=2)
    epochs = np.concatenate([order.indices(step) for step in range(10)]).reshape(2, 70)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(70))
        groups = [set(shards[part]) for part in epoch.reshape(5, 14)]
        assert all(len(group) == 2 for group in groups) and len(set().union(*groups)) == 10
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(Order(70, 14, 3, shards, together=2).indices(7), order.indices(7))


def test_resizing_as_adm_does():
    """Halved by 2 x 2 means as often as possible, then resized, then cropped in the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 96)).astype(np.uint8)
    means = pixels.reshape(3, 32, 2, 48, 2).mean((2, 4))
    halved = np.floor(means + 0.5)[:, :, 8:40]
    assert np.abs(fit_as_adm(pixels, 32).astype(int) - halved).max() <= 1
    assert fit_as_adm(pixels, 48).shape == (3, 48, 48)
    assert np.array_equal(fit_as_adm(pixels[:, :, 16:80], 64), pixels[:, :, 16:80])


STREAMED = ["data.memory_gb=0", "data.num_workers=2", "data.shuffle_shards=2"]
STREAMED += ["optim.steps=30", "run.save_every=2", "run.log_every=1", "run.eval_every=1000", "run.samples_per_class=0"]


def streamed(folder):
    return [*train_arguments(folder), *STREAMED, "run.precision=fp32"]


def stop_at_some_moment(process, folder, step, number):
    """Send a signal a random moment after `step` was logged; returns the steps of the checkpoint and of the log."""
    journal, deadline = folder / "metrics.jsonl", time.monotonic() + 90
    while not journal.exists() or f'"step": {step},' not in journal.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    for pid in [*workers, process.pid]:  # as Ctrl-C does, or a signal to the process group
        os.kill(int(pid), number)
    process.communicate(timeout=60)
    logged = json.loads(journal.read_text().splitlines()[-1])["step"]
    return read_checkpoint(folder / "checkpoint.pt")["step"], logged


@pytest.mark.thorough
def test_a_streamed_run_stopped_at_any_moment_loses_little_and_ends_the_same(tmp_path):
    """144 images, 8 a step: stops are in the middle of an epoch. kill -9 loses at most the
    steps since the last save, SIGTERM none, and the final state is bit-exactly that of an uninterrupted run."""
    shards = write_shards(tmp_path / "shards", count=4, each=36)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = load_config(ROOT / "training/configs/demo.toml", [*streamed(shards), f"run.dir={tmp_path}/whole"])
        train(whole)
    finally:
        torch.set_num_threads(threads)
    part = tmp_path / "part"
    saved, logged = stop_at_some_moment(launch(1, streamed(shards), part), part, 5, signal.SIGKILL)
    assert logged - 3 <= saved <= logged + 1 and saved % 2 == 0
    (part / ".checkpoint.pt.1.tmp").write_bytes(b"half of one")
    saved, logged = stop_at_some_moment(launch(1, streamed(shards), part), part, saved + 5, signal.SIGTERM)
    assert not list(part.glob(".checkpoint*"))
    assert saved == logged or saved == 30
    rest = launch(1, streamed(shards), part)
    _, output = rest.communicate(timeout=90)
    assert rest.returncode == 0, output
    assert_same(tmp_path / "whole/checkpoint.pt", part / "checkpoint.pt")
