"""Many samples: shards of any number are the same bytes, stopped runs go on, and two runs are never mixed."""

import errno
import itertools
import json
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dsd_serve
from dsd_serve.errors import InputError
from dsd_serve.shell import sample_folder
from dsd_serve.shell.generate_command import main
from dsd_serve.shell.sample_set import Shard
from dsd_serve.shell.sample_tars import whole_samples
from tests.support.servers import until
from tests.support.shell import GENERATE, files_of, finish, start

KINDS = {"folder": "d", "npz": "a.npz", "tar": "t-%03d.tar"}
PER_CLASS = 100  # of three classes


@pytest.fixture(scope="module")
def flags(tiny_dir):
    return ["--per-class", str(PER_CLASS), "--steps", "2", "--model", str(tiny_dir), "--row-budget", "32"]


def generate(flags, kind, folder, *more):
    per_tar = ["--per-tar", "40"] if kind == "tar" else []
    main(["all", *flags, *per_tar, "-o", str(folder / KINDS[kind]), *map(str, more)])


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The files of one run for each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        generate(flags, kind, folder)
    return {kind: files_of(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_bytes_of_one_run(flags, whole, tmp_path, kind):
    for number in (2, 3, 1):
        generate(flags, kind, tmp_path, "--shard", f"{number}/3")
    if kind == "npz":
        main(["--merge", "-o", str(tmp_path / KINDS[kind])])
        for path in tmp_path.glob("*-of-*"):
            path.unlink()
        manifest = json.loads((tmp_path / "a-manifest.json").read_text())
        assert (manifest["count"], manifest["images"], manifest["complete"]) == (300, 300, True)
    assert files_of(tmp_path) == whole[kind]


def test_each_image_is_the_servers_for_its_seed_and_index(whole, http):
    for number, label in ((0, 1), (1, 207), (299, 950)):
        answer = http.get("/generate", params={"class": label, "seed": 0, "index": number, "steps": 2})
        assert whole["folder"][f"d/{label}/{label}-0-{number:06}.png"] == answer.content


def test_all_kinds_hold_the_same_images(whole, tmp_path):
    (tmp_path / "a.npz").write_bytes(whole["npz"]["a.npz"])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (300, 16, 16, 3))
    assert labels.dtype == np.int64 and labels.tolist() == [1, 207, 950] * 100
    for name, data in whole["tar"].items():
        (tmp_path / name).write_bytes(data)
    tars = [tmp_path / name for name in sorted(whole["tar"])]
    assert len(tars) == 8
    members = {}
    for path in tars:
        with tarfile.open(path) as tar:
            members |= {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert [int(data) for name, data in members.items() if name.endswith(".cls")] == labels.tolist()
    for number in (0, 39, 40, 299):
        label = labels[number]
        data = members[f"{label}-0-{number:06}.png"]
        assert data == whole["folder"][f"d/{label}/{label}-0-{number:06}.png"]
        (tmp_path / "one.png").write_bytes(data)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), pixels[number])
    with tarfile.open(tars[0]) as tar:
        assert tar.getnames()[:4] == ["1-0-000000.cls", "1-0-000000.json", "1-0-000000.png", "207-0-000001.cls"]
        assert json.load(tar.extractfile("207-0-000001.json"))["index"] == 1


class Stop(Exception):
    pass


def stopped(flags, kind, folder, monkeypatch, after):
    """Run until `after` images are written."""
    from dsd_serve.shell import bulk

    output_of, count = bulk.output_of, itertools.count(1)

    def counted(*arguments):
        output = output_of(*arguments)
        write = output.write

        def counted_write(sample, data):
            write(sample, data)
            if next(count) == after:
                raise Stop

        output.write = counted_write
        return output

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(bulk, "output_of", counted)
        generate(flags, kind, folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("after", "cut"), [(1, 0), (40, 0), (97, 1), (150, 600), (300, 5000)])
def test_a_run_that_was_cut_anywhere_goes_on(flags, whole, tmp_path, monkeypatch, kind, after, cut):
    stopped(flags, kind, tmp_path, monkeypatch, after)
    for path in tmp_path.glob(".*.part"):  # as if the last bytes had not been written
        with path.open("rb+") as file:
            file.truncate(max(0, path.stat().st_size - cut))
    for path in sorted(tmp_path.glob("d/*/*.png"))[:2]:
        path.write_bytes(path.read_bytes()[: -cut or None])
    generate(flags, kind, tmp_path)
    assert files_of(tmp_path) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_and_redoes_nothing(flags, tmp_path, kind, capsys):
    slow = [*flags, "--steps", "12"]
    per_tar = ["--per-tar", "40"] if kind == "tar" else []
    process = start(GENERATE, "all", *slow, *per_tar, "-o", tmp_path / "killed" / KINDS[kind])
    killed = tmp_path / "killed"

    def kept():
        if kind == "npz":
            return sum(path.stat().st_size // (3 * 16 * 16) for path in killed.glob(".*.part"))
        if kind == "folder":
            return len(list(killed.glob("d/*/[!.]*.png")))
        return sum(whole_samples(path)[0] for path in [*killed.glob("*.tar"), *killed.glob(".*.part")])

    until(lambda: kept() > 30, 60)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    left = 300 - kept()
    generate(slow, kind, killed)
    assert int(capsys.readouterr().err.split()[0]) == left > 0
    (tmp_path / "whole").mkdir()
    generate(slow, kind, tmp_path / "whole")
    assert files_of(killed) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_draws_nothing_again(flags, tmp_path, capsys, kind):
    generate(flags, kind, tmp_path, "--shard", "1/4")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in (".png", ".tar", ".npz")}
    assert capsys.readouterr().err.endswith("images were drawn\n")
    generate(flags, kind, tmp_path, "--shard", "1/4")
    assert capsys.readouterr().err == "all images already exist\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_or_other_settings_are_refused(flags, tmp_path, kind, demo_dir):
    generate(flags, kind, tmp_path, "--shard", "1/4")
    before = files_of(tmp_path)
    for more, words in [
        (["--steps", 3], "steps 2, not 3"),
        (["--seed", 1], "seed 0, not 1"),
        (["--per-class", 60], "per_class 100, not 60"),
        (["--model", demo_dir], "model 'tiny', not 'dsd-demo'"),
    ]:
        with pytest.raises(SystemExit, match=words):
            generate(flags, kind, tmp_path, "--shard", "1/4", *more)
    if kind != "npz":  # whose shards have files of their own
        for shard in ("2/3", "1/1"):
            with pytest.raises(SystemExit, match="shards 4, not"):
                generate(flags, kind, tmp_path, "--shard", shard)
    assert files_of(tmp_path) == before


def test_files_that_are_not_its_own_are_refused(flags, tmp_path):
    for kind, name in (("folder", "d/photo.png"), ("npz", "a.npz"), ("tar", "t-003.tar")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"precious")
        with pytest.raises(SystemExit, match=r"give (a new or an empty folder as -o|another -o, or delete it)"):
            generate(flags, kind, tmp_path)
        assert path.read_bytes() == b"precious"
    (tmp_path / "x-manifest.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"x-manifest\.json is not the manifest of a run"):
        main(["all", *flags, "-o", str(tmp_path / "x.npz")])


def test_merge_refuses_what_does_not_fit(flags, tmp_path):
    generate(flags, "npz", tmp_path, "--shard", "1/2")
    merge = ["--merge", "-o", str(tmp_path / "a.npz")]
    with pytest.raises(SystemExit, match=r"a-2-of-2-manifest\.json is missing; draw it first"):
        main(merge)
    generate(flags, "npz", tmp_path, "--shard", "2/2", "--seed", 5)
    with pytest.raises(SystemExit, match="seed 5, not 0"):
        main(merge)
    assert not (tmp_path / "a.npz").exists()


def test_a_full_disk_gets_a_sentence_and_the_run_goes_on(flags, whole, tmp_path, monkeypatch):
    original = sample_folder.SampleFolder.write
    count = itertools.count(1)

    def full(self, sample, data):
        if next(count) == 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, sample, data)

    with monkeypatch.context() as patched:
        patched.setattr(sample_folder.SampleFolder, "write", full)
        with pytest.raises(SystemExit, match="the disk is full; run the same command again to resume"):
            generate(flags, "folder", tmp_path)
    generate(flags, "folder", tmp_path)
    assert files_of(tmp_path) == whole["folder"]


def test_ctrl_c_says_how_to_go_on_and_one_shard_is_drawn_once_at_a_time(flags, tmp_path):
    arguments = ["all", *flags, "--steps", "40", "-o", tmp_path / "d"]
    process = start(GENERATE, *arguments)
    until(lambda: any(tmp_path.glob("d/*/*.png")), 60)
    with pytest.raises(SystemExit, match="another dsd-generate is writing"):
        main([*map(str, arguments)])
    process.send_signal(signal.SIGTERM)
    assert finish(process)[::2] == (143, "dsd-generate: stopped; run the same command again to resume\n")


def test_the_manifest_says_what_was_drawn_and_how(flags, tmp_path, tiny_dir):
    generate(flags, "tar", tmp_path, "--shard", "2/3", "--seed", 9, "--size", 24)
    manifest = json.loads((tmp_path / "t-manifest-2-of-3.json").read_text())
    with dsd_serve.load(tiny_dir, row_budget=4) as model:
        assert manifest["fingerprint"] == model.info.fingerprint
    shown = {key: manifest[key] for key in ("seed", "steps", "size", "per_class", "images", "shard", "shards", "count")}
    assert list(shown.values()) == [9, 2, 24, 100, 300, 2, 3, 120]
    assert [one["index"] for one in manifest["classes"]] == [1, 207, 950]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["t-002.tar", "t-003.tar", "t-004.tar"]


@given(total=st.integers(1, 5000), count=st.integers(1, 50), unit=st.integers(1, 100))
def test_shards_share_everything_once(total, count, unit):
    shards = [Shard(number, count) for number in range(1, count + 1)]
    if -(-total // unit) < count:
        with pytest.raises(InputError, match="are fewer than"):
            shards[0].share(total, unit)
        return
    shares = [shard.share(total, unit) for shard in shards]
    assert [number for share in shares for number in share] == list(range(total))
    assert all(share.start % unit == 0 and len(share) > 0 for share in shares)


@pytest.mark.thorough
def test_ten_thousand_images_take_the_memory_of_one_thousand(tmp_path: Path):
    """The demo model, a step each; peak memory as the system counts it."""
    peaks = []
    for per_class in (100, 1000):
        code = (
            f"import resource; from {GENERATE} import main\n"
            f"main(['all', '--per-class', '{per_class}', '--steps', '1', '--guidance', '1', '--row-budget', '32',"
            f" '-o', '{tmp_path}/{per_class}.npz'])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        status, out, said = finish(start_code(code))
        assert status == 0, said
        peaks.append(int(out.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 20


def start_code(code: str):
    import subprocess
    import sys

    from tests.support.data import ROOT

    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
