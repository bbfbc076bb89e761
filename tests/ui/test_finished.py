"""Finished images and links: what is kept, what is drawn again from a link, and what an update of a board sends."""

import asyncio
import io
import zipfile

import pytest
from gradio.utils import diff

from dsd_serve.client import AsyncClient, Client
from dsd_serve.errors import InputError, ServerError
from ui import html, links
from ui.finished import FinishedImages, zipped
from ui.photo_formats import read_photo
from ui.requests import Drawing, DrawnImage
from ui.words import in_page_words

SETTINGS = {
    "seed": 7,
    "index": 0,
    "steps": 3,
    "sampler": "euler",
    "guidance": 1.5,
    "guidance_start": 0.0,
    "guidance_stop": 1.0,
}


def settings(seed):
    return {**SETTINGS, "seed": seed, "class": {"index": 207, "name": "dog"}, "fingerprint": "f"}


def test_the_least_recently_used_images_are_dropped():
    kept = FinishedImages(None, max_bytes=1000)
    images = [kept.keep(bytes([seed]) * 300, "dog", settings(seed)) for seed in range(3)]
    assert kept.get(images[0].id)  # now the latest used
    images.append(kept.keep(bytes([9]) * 300, "dog", settings(9)))
    assert [kept.get(one.id) is not None for one in images] == [True, False, True, True]
    assert kept.drawn_with(settings(9)) == images[3]
    assert kept.drawn_with(settings(1)) is None
    assert kept.keep(bytes([9]) * 300, "dog", settings(9)) == images[3]
    assert kept.size == 900
    kept.sweep(0)
    assert (kept.size, kept.images, kept.used, kept.by_settings) == (0, {}, {}, {})


def test_an_image_is_drawn_again_from_its_address(server_url):
    async def run():
        client = AsyncClient(server_url)
        kept = FinishedImages(client)
        link = links.read("class=207&n=2&seed=7&steps=3&sampler=euler&guidance=1.5")
        image = await kept.of_link(link)
        data = kept.data(image)
        kept.sweep(0)
        again = await kept.find(image.id, image.query)
        assert kept.data(again) == data
        with pytest.raises(ServerError, match="another model drew this image"):
            await kept.find("0" * 32, image.query)
        with pytest.raises(ServerError, match="no longer on the server"):
            await kept.find("0" * 32)
        with pytest.raises(ServerError, match="seed in the link must be a number"):
            await kept.find("0" * 32, "class=207&seed=x")
        await client.close()
        return data

    with Client(server_url) as client:
        size = {} if client.model()["image_size"] >= 256 else {"size": 256}
        assert asyncio.run(run()) == client.generate(207, seed=7, steps=3, sampler="euler", guidance=1.5, **size)


def test_links_are_short_where_a_value_says_nothing():
    unguided = links.Link((207,), 1, "", {**SETTINGS, "guidance": 1.0})
    assert "index" not in unguided.query and "guidance_" not in unguided.query
    guided = links.Link((207,), 1, "", {**SETTINGS, "guidance": 2.0})
    assert "guidance_start=0&guidance_stop=1" in guided.query, "the model may recommend another interval"


def test_links_keep_all_settings():
    link = links.Link((207, 1), 4, "b", {**SETTINGS, "index": 3, "guidance_start": 0.25})
    read = links.read(link.query)
    assert (read.classes, read.n, read.model) == ((207, 1), 4, "b")
    assert read.settings == link.settings
    assert links.read("utm_source=x&tab=walk") == links.Link()


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("class=1&seed=-1", "seed in the link must be from 0 to"),
        ("class=dog", "class in the link must be a number, got 'dog'"),
        ("seed=1&steps=1001", "steps must be a whole number from 1 to 1000, got 1001"),
        ("sampler=ddim", "sampler must be one of"),
        ("guidance=nan", "guidance must be between 0 and 100, got nan"),
        ("n=0", "n in the link must be from 1 to"),
        (f"seed=1&index={2**53 - 1}&n=2", f"index . n - 1 in the link must be at most {2**53 - 1}, got {2**53}"),
        ("class=" + ",".join(map(str, range(17))), "at most 16 classes, this one has 17"),
        ("x=" + "y" * 2000, "at most 2000 characters"),
    ],
)
def test_wrong_links_get_a_sentence(query, sentence):
    with pytest.raises(InputError, match=sentence):
        links.read(query)


def test_an_update_of_a_board_sends_only_the_cards_that_changed():
    kept = FinishedImages(None)
    images = [DrawnImage("dog", 9, finished=kept.keep(bytes([n]) * 1000, "dog", settings(n))) for n in range(160)]
    drawing = Drawing([*images[:-2], DrawnImage("dog", 9), DrawnImage("dog", 9)], "seed=7")
    before = html.board(drawing)
    drawing.images[-2].preview, drawing.images[-2].step = bytes(3000), 4
    edits = diff(before, html.board(drawing))
    assert len(edits) == 2  # the progress, and one card
    assert len(str(edits)) < 6000
    assert len(str(before)) < 160 * 1000  # finished images are addresses


def test_a_zip_file_has_every_image_once():
    kept = FinishedImages(None)
    images = [kept.keep(bytes([n]) * 50, "dog", settings(7)) for n in range(2)]
    with zipfile.ZipFile(io.BytesIO(zipped([(one, kept.data(one)) for one in images]))) as file:
        assert sorted(file.namelist()) == sorted([f"{images[1].id[:8]}-dog-7-0.png", "dog-7-0.png"])
        assert file.read("dog-7-0.png") == bytes(50)


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("steps must be at most 250, got 999", "Steps must be at most 250, got 999"),
        ("guidance_start and guidance_stop must be times", "Guidance start and Guidance stop must be times"),
        ("from.class must be an index", "From must be an index"),
        ("a link may have", "a link may have"),
        ("seeds must", "seeds must"),
    ],
)
def test_errors_use_the_labels_of_the_page(sentence, words):
    assert in_page_words(sentence) == words


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "this file is empty"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC file, which cannot be read here: share or export it as JPEG"),
        (b"\0\0\0\x1cftypavif\0\0", "an AVIF file"),
        (b"GIF89a", "a GIF file"),
        (b"BM\x36\0", "a BMP file, which cannot be read here: save it as PNG, JPEG or WebP"),
    ],
)
def test_other_formats_are_named(tmp_path, data, sentence):
    (tmp_path / "photo").write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        read_photo(str(tmp_path / "photo"))


def test_a_photo_that_is_gone_is_to_be_uploaded_again(tmp_path):
    with pytest.raises(InputError, match="no longer on the server: upload it again"):
        read_photo(str(tmp_path / "photo"))
