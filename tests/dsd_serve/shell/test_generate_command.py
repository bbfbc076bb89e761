"""dsd-generate: the same bytes as the server and Python; files, names and sentences."""

import io
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from PIL import Image

import dsd_serve
from dsd_serve.params import API_NAMES, SHOWN_WITH_IMAGE
from dsd_serve.shell.generate_command import arguments_parser, main
from tests.support.data import ROOT
from tests.support.servers import until
from tests.support.shell import GENERATE, finish, start


@pytest.fixture
def generate(tiny_dir, tmp_path, monkeypatch):
    """Runs dsd-generate with the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        main([*map(str, arguments), "--model", str(tiny_dir), "--row-budget", "8"])
        return tmp_path

    return run


def test_the_bytes_are_those_of_the_server_and_of_python(generate, http, tiny_dir):
    folder = generate(207, "-o", "dog.png", "--seed", 7)
    dog = (folder / "dog.png").read_bytes()
    assert dog == http.get("/generate", params={"class": 207, "seed": 7}).content
    with dsd_serve.load(tiny_dir, row_budget=8) as model:
        assert dog == dsd_serve.to_png(model.generate(207, seed=7))
    settings = {"steps": 3, "sampler": "heun", "guidance": 2.5, "guidance_start": 0.1, "guidance_stop": 0.8, "size": 64}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    generate("n02099601", "-o", "other.png", "--seed", 3, "--index", 4, *flags)
    answer = http.get("/generate", params={"class": 207, "seed": 3, "index": 4, **settings})
    assert (folder / "other.png").read_bytes() == answer.content


def test_files_are_named_by_class_seed_and_index(generate, http, capsys):
    folder = generate(207, 950, "-n", 2, "--seed", 3, "--steps", 2, "-o", "some")
    names = [f"some/{label}-3-{index:06}.png" for label in (207, 950) for index in (0, 1)]
    assert capsys.readouterr().out.split() == names
    for name, (label, index) in zip(names, [(207, 0), (207, 1), (950, 0), (950, 1)], strict=True):
        answer = http.get("/generate", params={"class": label, "seed": 3, "index": index, "steps": 2})
        assert (folder / name).read_bytes() == answer.content
    generate(1, "--steps", 1)  # without -o into this folder, with a random seed
    (path,) = folder.glob("1-*-000000.png")
    assert json.loads(Image.open(path).text["dsd"])["seed"] == int(path.stem.split("-")[1])


def test_a_grid_is_the_servers(generate, http):
    folder = generate(207, "-n", 3, "--seed", 3, "--steps", 2, "--size", 24, "--grid", "grid.png")
    answer = http.get("/generate", params={"class": 207, "seed": 3, "steps": 2, "n": 3, "size": 24})
    assert (folder / "grid.png").read_bytes() == answer.content
    assert [path.name for path in folder.iterdir()] == ["grid.png"]
    generate("all", "--seed", 3, "--steps", 1, "--grid", "all.png", "-o", "each")
    image = Image.open(folder / "all.png")
    assert image.size == (32, 32)
    assert [one["index"] for one in json.loads(image.text["dsd"])["class"]] == [1, 207, 950]
    assert len(list((folder / "each").iterdir())) == 3


def test_no_file_is_replaced_without_force(generate, tmp_path):
    (tmp_path / "dog.png").write_bytes(b"precious")
    for output in (["-o", "dog.png"], ["--grid", "dog.png"]):
        with pytest.raises(SystemExit, match=r"dog\.png exists; --force replaces it"):
            generate(207, *output)
    assert (tmp_path / "dog.png").read_bytes() == b"precious"
    generate(207, "-o", "dog.png", "--force")
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give at least one CLASS"),
        (["unicorn"], "class must be an index, a wnid like n02099601 or a name, got 'unicorn'"),
        ([207, "-o", "x.jpg"], "-o must be FILE.png, a folder, or - for stdout, got x.jpg"),
        ([207, "-n", 2, "-o", "x.png"], "x.png holds one image, but there are 2"),
        ([207, "-n", 2, "-o", "-"], "-o - writes one image to stdout, but there are 2"),
        ([207, "-o", "file/x.png"], "file is a file, so nothing can be written into it"),
        ([207, "--grid", "x.jpg"], "--grid must be FILE.png, got x.jpg"),
        ([207, "-n", 1000, "--size", 1000, "--grid", "x.png"], "a grid must have at most 100,000,000 pixels"),
        (["all", "-n", 1_000_000], "at most 1,000,000 images, got 3,000,000"),
        ([207, "--guidance-start", 0.9, "--guidance-stop", 0.1], "guidance_start and guidance_stop must be times"),
        ([207, "--shard", "1/2"], "--shard is for --per-class N"),
        ([207, "--per-tar", "2"], "--per-tar is for --per-class N"),
        ([207, "--per-class", 2], "--per-class needs -o: a folder, FILE.npz or out-%05d.tar"),
        ([207, "--per-class", 2, "-o", "d", "--force"], "--force is not for --per-class"),
        ([207, "--per-class", 2, "-o", "d", "--grid", "g.png"], "--grid is not for --per-class"),
        ([207, "--per-class", 2, "-o", "d", "-n", 2], "-n is not for --per-class"),
        ([207, "--per-class", 2, "-o", "d.npz", "--per-tar", 2], "--per-tar is for -o out-%05d.tar"),
        ([207, "--per-class", 2, "-o", "x.png"], "must be a folder, FILE.npz or out-%05d.tar, got x.png"),
        ([207, "--per-class", 2, "-o", "x.tar"], "must have one place for their number, as out-%05d.tar, got 'x.tar'"),
        ([207, "--per-class", 2, "-o", "%d-%d.tar"], "must have one place for their number"),
        ([207, "--per-class", 2, "-o", "d", "--shard", "0/3"], "--shard must be I/N with I from 1 to N"),
        ([207, "--per-class", 2, "-o", "d", "--shard", "1/3"], "2 images are fewer than 3 shards"),
        ([207, "--per-class", 2, "-o", "%d.tar", "--shard", "1/2"], "2 images, 1 tar files of 1,000, are fewer than 2"),
        ([207, "--per-class", 2, "-o", "d", "--index", 2**63 - 1], "the index of the last image must be at most"),
        (["--merge", "-o", "x"], "--merge needs -o FILE.npz"),
        (["--merge", "-o", "x.npz"], "there are no shards next to x.npz"),
    ],
)
def test_mistakes_get_a_sentence_and_leave_nothing(generate, tmp_path, arguments, words):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        generate(*arguments)
    assert str(caught.value).startswith("dsd-generate: ") and words in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".png", ".npz", ".tar")] == []


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--steps", "0", "argument --steps: must be a whole number from 1 to 1000, got 0"),
        ("--steps", "1_0", "argument --steps: must be a whole number from 1 to 1000, got '1_0'"),
        ("--guidance", "nan", "argument --guidance: must be between 0 and 100, got nan"),
        ("--sampler", "ddim", "argument --sampler: must be one of euler, heun, dpmpp_2m, flow_map, got 'ddim'"),
        ("--size", "x", "argument --size: must be a whole number from 8 to 16384, got 'x'"),
        ("--device", "gpu", "argument --device: must be cpu, cuda or cuda:N, got 'gpu'"),
        ("-n", "0", "argument -n: must be a whole number from 1 to 1000000, got '0'"),
    ],
)
def test_wrong_values_of_flags_get_a_sentence(capsys, flag, value, words):
    with pytest.raises(SystemExit) as caught:
        arguments_parser().parse_args(["207", flag, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"dsd-generate: {words}; dsd-generate --help lists the flags\n"


def test_every_setting_of_an_image_is_a_flag():
    parsed = vars(arguments_parser().parse_args([]))
    assert {API_NAMES[name] for name in SHOWN_WITH_IMAGE} <= set(parsed)


def test_the_demo_is_drawn_to_stdout_soon_and_without_torch(server_url):
    """In seconds of the processor, because other tests run beside this one."""
    code = (
        f"import sys; sys.modules['torch'] = None; from {GENERATE} import main; main(['207', '--seed', '7', '-o', '-'])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, b"")
    image = Image.open(io.BytesIO(done.stdout))
    assert image.size == (32, 32) and json.loads(image.text["dsd"])["seed"] == 7
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_a_full_disk_and_a_closed_pipe(tiny_dir, tmp_path):
    arguments = [207, "--model", tiny_dir, "--row-budget", 8]
    with open("/dev/full", "wb") as full:
        status, _, said = finish(start(GENERATE, *arguments, "-o", "-", stdout=full))
    assert (status, said) == (1, "dsd-generate: the disk is full\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        status, _, said = finish(start(GENERATE, *arguments, "-o", tmp_path, stdout=closed))
    assert (status, said) == (141, "")


def test_ctrl_c_ends_it_in_a_word(tiny_dir, tmp_path):
    arguments = [207, "-n", 2000, "--steps", 40, "--model", tiny_dir, "-o", tmp_path, "--row-budget", 8]
    process = start(GENERATE, *arguments)
    until(lambda: any(tmp_path.glob("*.png")), 60)
    process.send_signal(signal.SIGINT)
    status, _, said = finish(process)
    assert (status, said) == (130, "dsd-generate: stopped\n")
    assert all(Image.open(path).size == (16, 16) for path in tmp_path.glob("*.png"))
    assert not list(tmp_path.glob(".*"))
