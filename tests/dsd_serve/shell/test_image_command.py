"""dsd-image: the same bytes as the server; files and sentences."""

import numpy as np
import pytest

from dsd_serve.imaging.codec import write_image
from dsd_serve.shell.image_command import main
from tests.support.data import sample_image


@pytest.fixture
def image(tiny_dir, tmp_path, monkeypatch):
    """Runs dsd-image with the tiny model in a folder with photo.png, other.png and mask.png."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.png").write_bytes(write_image(sample_image(1, 0, size=40)))
    (tmp_path / "other.png").write_bytes(write_image(sample_image(207, 1, size=30)))
    mask = np.zeros((3, 40, 40), np.uint8)
    mask[:, 20:] = 255
    (tmp_path / "mask.png").write_bytes(write_image(mask))

    def run(*arguments):
        main([*map(str, arguments), "--model", str(tiny_dir), "--row-budget", "8"])
        return tmp_path

    return run


def test_edits_are_the_servers(image, http, capsys):
    folder = image("edit", "photo.png", 950, "--strength", 0.5, "--seed", 2, "-o", "edited.png")
    query = {"class": 950, "strength": 0.5, "seed": 2}
    photo = (folder / "photo.png").read_bytes()
    assert (folder / "edited.png").read_bytes() == http.post("/edit", params=query, content=photo).content
    image("edit", "photo.png", "950", "--strength", 0.5, "--seed", 2, "--mask", "mask.png", "-n", 2, "-o", "two")
    files = {"image": photo, "mask": (folder / "mask.png").read_bytes()}
    answer = http.post("/edit", params=query, files=files)
    assert (folder / "two/photo-edited-2-000000.png").read_bytes() == answer.content
    image("edit", "photo.png", "--steps", 1)  # towards no class
    assert len(list(folder.glob("photo-edited-*-000000.png"))) == 1


def test_latents_and_reconstructions_are_the_servers(image, http):
    folder = image("encode", "photo.png")
    photo = (folder / "photo.png").read_bytes()
    npy = http.post("/encode", content=photo).content
    assert (folder / "photo.npy").read_bytes() == npy
    for form in ("safetensors", "json"):
        image("encode", "photo.png", "-o", f"z.{form}")
        image("decode", f"z.{form}", "-o", f"{form}.png", "--size", 32)
    assert (folder / "json.png").read_bytes() == (folder / "safetensors.png").read_bytes()
    image("decode", "photo.npy", "-o", "decoded")
    answer = http.post("/decode", content=npy, headers={"content-type": "application/x-npy"})
    assert (folder / "decoded/photo.png").read_bytes() == answer.content
    image("reconstruct", "photo.png")
    answer = http.post("/reconstruct", content=photo)
    assert (folder / "photo-reconstructed.png").read_bytes() == answer.content


def test_walks_are_the_servers(image, http):
    folder = image("walk", 207, 950, "-n", 3, "--seed", 1, "--end-seed", 2, "--steps", 2, "--grid", "walk.png")
    body = {"from": {"class": 207, "seed": 1}, "to": {"class": 950, "seed": 2}, "n": 3, "steps": 2}
    assert (folder / "walk.png").read_bytes() == http.post("/interpolate", json=body).content
    image("walk", "photo.png", "other.png", "-n", 4, "--grid", "images.png", "-o", "each")
    files = {"from": (folder / "photo.png").read_bytes(), "to": (folder / "other.png").read_bytes()}
    answer = http.post("/interpolate", params={"n": 4}, files=files)
    assert (folder / "images.png").read_bytes() == answer.content
    assert sorted(path.name for path in (folder / "each").iterdir()) == [f"walk-00{i}.png" for i in range(4)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["edit", "nowhere.png"], "the image 'nowhere.png' cannot be read: No such file"),
        (["edit", "photo.png", "unicorn"], "class must be an index"),
        (["edit", "photo.png", "--strength", 2], "strength must be above 0 and at most 1, got 2.0"),
        (["edit", "photo.png", "--strength", "x"], "strength must be above 0 and at most 1, got 'x'"),
        (["edit", "photo.png", "--guidance", 3], "guidance_scale needs a class"),
        (["encode", "photo.png", "-o", "z.npz"], "-o must be a file that ends in .npy, .safetensors, .json, got z.npz"),
        (["encode", "photo.png", "-o", "there.npy"], "there.npy exists; --force replaces it"),
        (["decode", "nowhere.npy"], "the latents nowhere.npy cannot be read: No such file"),
        (["decode", "photo.png", "-o", "z.png"], "the bytes are not readable latents"),
        (["reconstruct", "photo.png", "-o", "photo.png"], "photo.png exists; --force replaces it"),
        (["walk", "207", "photo.png"], "start and end must be two classes or two images"),
        (["walk", "photo.png", "photo.png", "--seed", 1], "needs no noise, so leave out seed"),
    ],
)
def test_mistakes_get_a_sentence(image, tmp_path, arguments, words):
    (tmp_path / "there.npy").touch()
    with pytest.raises(SystemExit) as caught:
        image(*arguments)
    assert str(caught.value).startswith("dsd-image: ") and words in str(caught.value)
