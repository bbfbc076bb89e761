"""dsd-verify: files of the server, of the shell and of Python, whole, changed, and of others."""

import io
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dsd_serve.imaging.codec import write_image
from dsd_serve.shell import generate_command
from dsd_serve.shell.verify_command import main
from tests.support.data import sample_image

DRAW = {"class": 207, "seed": 5, "index": 2, "steps": 3}


@pytest.fixture
def verify(tiny_dir, tmp_path, monkeypatch, capsys):
    """Runs dsd-verify on bytes by file name: (exit status, what it says of each file)."""
    monkeypatch.chdir(tmp_path)

    def run(model=tiny_dir, **files):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        status = 0
        capsys.readouterr()
        try:
            main([*files, "--model", str(model), "--row-budget", "8"])
        except SystemExit as end:
            status = end.code
        lines = capsys.readouterr().out.splitlines()
        return status, {name: line.removeprefix(f"{name}: ") for name, line in zip(files, lines, strict=True)}

    return run


def resaved(data, change=None):
    """A PNG written again by Pillow, with the settings, and perhaps with changed pixels."""
    image = Image.open(io.BytesIO(data))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("dsd", image.text["dsd"])
    pixels = np.array(image)
    if change is not None:
        change(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def with_settings(**settings):
    return write_image(sample_image(1, 0), settings=json.dumps(settings))


@pytest.mark.parametrize("media", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("more", [{}, {"size": 50}, {"n": 5}, {"n": 3, "size": 20}])
def test_files_of_the_server_are_identical(verify, http, media, more):
    data = http.get("/generate", params={**DRAW, **more, "format": media}).content
    assert verify(file=data) == (0, {"file": "identical bytes"})


def test_files_of_the_shell_are_identical(verify, tiny_dir, tmp_path):
    generate_command.main(["207", "1", "-n", "2", "--seed", "3", "--model", str(tiny_dir), "-o", "drawn"])
    generate_command.main(["207", "-n", "3", "--seed", "3", "--model", str(tiny_dir), "--grid", "grid.png"])
    files = {path.name: path.read_bytes() for path in [*(tmp_path / "drawn").iterdir(), tmp_path / "grid.png"]}
    status, said = verify(**files)
    assert (status, set(said.values()), len(said)) == (0, {"identical bytes"}, 5)


def test_the_same_pixels_in_another_file(verify, http):
    data = http.get("/generate", params=DRAW).content
    assert verify(file=resaved(data)) == (0, {"file": "same pixels"})


def test_changed_pixels(verify, http):
    def change(pixels):
        pixels[3, 4, 1] ^= 64

    data = http.get("/generate", params=DRAW).content
    status, said = verify(good=data, changed=resaved(data, change))
    assert (status, said["good"]) == (1, "identical bytes")
    assert said["changed"].startswith("not the same: values differ by up to 64 of 255, PSNR ")


def test_settings_of_another_image(verify, http):
    settings = json.loads(Image.open(io.BytesIO(http.get("/generate", params=DRAW).content)).text["dsd"])
    status, said = verify(file=with_settings(**{**settings, "seed": 6}))
    assert status == 1 and said["file"].startswith("not the same: ")


def test_files_that_settings_cannot_draw(verify, http, tiny_dir, tmp_path):
    drawn = http.get("/generate", params=DRAW).content
    settings = json.loads(Image.open(io.BytesIO(drawn)).text["dsd"])
    edited = http.post("/edit", params={"class": 1}, content=write_image(sample_image(1, 0))).content
    walk = with_settings(**{"from": {"class": 1, "seed": 0}, "to": {"class": 207, "seed": 0}, "n": 3})
    status, said = verify(
        bare=write_image(sample_image(1, 0)),
        edited=edited,
        walk=walk,
        text=b"hello",
        cut=drawn[:-20],
        other=with_settings(**{**settings, "fingerprint": "0" * 64}),
        shape=with_settings(**{**settings, "n": 7}),
        many=with_settings(**{**settings, "n": 10**9}),
        label=with_settings(**{**settings, "class": {"index": 10**9}}),
        steps=with_settings(**{**settings, "steps": -1}),
        types=with_settings(**{**settings, "class": 3, "steps": "x"}),
    )
    assert status == 1
    for name, words in {
        "bare": "has no settings of DSD: it was made by another program, or they were removed",
        "edited": "was made from another image or from latents, which its settings do not hold",
        "walk": "shows a walk or several classes",
        "text": "the bytes are not a readable image: send a PNG, JPEG or WebP",
        "cut": "the image is broken: the file is truncated; send the whole file",
        "other": "was drawn by another model (",
        "shape": "has settings of an image of another size",
        "many": "has settings of an image of another size",
        "label": "class must be",
        "steps": "steps must be",
        "types": "class",
    }.items():
        assert said[name].startswith(words), (name, said[name])
