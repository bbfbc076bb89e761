"""What files say of their origin: settings and IPTC's mark in all formats, read back from untrusted files."""

import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from dsd_serve.imaging import png
from dsd_serve.imaging.codec import read_image, write_image
from dsd_serve.imaging.png import write_png
from dsd_serve.imaging.provenance import DRAWN, EDITED, IPTC, RDF, settings_of, xmp_of
from tests.support.data import sample_image

PIXELS = sample_image(1, 0)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def source_in(data):
    """The IPTC term in a file."""
    info = Image.open(io.BytesIO(data)).info
    packet = ElementTree.fromstring(info.get("xmp") or info["XML:com.adobe.xmp"])
    (description,) = packet.iter(f"{{{RDF}}}Description")
    return description.attrib[f"{{{IPTC}}}DigitalSourceType"]


@pytest.mark.parametrize("media", ["png", "jpeg", "webp"])
@given(settings=st.dictionaries(st.text(max_size=20), VALUES, max_size=5))
def test_settings_come_back_from_every_format(media, settings):
    assert settings_of(write_image(PIXELS, media, json.dumps(settings))) == settings


@pytest.mark.parametrize("media", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    ("settings", "term"),
    [
        ({"class": {"index": 1}, "seed": 3}, DRAWN),
        ({"from": {"seed": 1}, "to": {"seed": 2}, "n": 3}, DRAWN),
        ({"class": None, "seed": 3, "strength": 0.5}, EDITED),
        ({"psnr": 20.0}, EDITED),
        ({}, EDITED),
    ],
)
def test_every_format_has_the_mark_of_iptc(media, settings, term):
    assert source_in(write_image(PIXELS, media, json.dumps(settings))) == term


def test_images_without_settings_have_no_mark():
    for media in ("png", "jpeg", "webp"):
        data = write_image(PIXELS, media)
        assert settings_of(data) is None
        assert not {"xmp", "XML:com.adobe.xmp"} & set(Image.open(io.BytesIO(data)).info)


def with_packet(packet):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", xmp=packet)
    return buffer.getvalue()


def test_files_that_are_not_ours_have_no_settings():
    ours = xmp_of('{"seed": 3}', whole=True).encode()
    laughs = b'<!DOCTYPE a [<!ENTITY b "' + b"c" * 1000 + b'">]>' + ours.replace(b"{", b"&b;{")
    text = PngImagePlugin.PngInfo()
    text.add_itxt("dsd", "[1")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=text)
    assert settings_of(with_packet(ours)) == {"seed": 3}
    for data in (
        b"",
        b"not an image",
        buffer.getvalue(),
        with_packet(b"no XML"),
        with_packet(laughs),
        with_packet(b"<a>" * 10_000),
        with_packet(ours.replace(b"seed", b"\xff")),
        with_packet(ours.replace(b"{", b"[").replace(b"}", b"]")),
    ):
        assert settings_of(data) is None


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_pngs_lose_nothing(width, height, seed, flat):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 2 if flat else 256, (height, width, 3), dtype=np.uint8)
    file = Image.open(io.BytesIO(write_png(Image.fromarray(pixels), {"keyword": "text é 犬"})))
    assert np.array_equal(np.asarray(file), pixels)
    assert file.text == {"keyword": "text é 犬"}


def test_bands_meet(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 11, 3), dtype=np.uint8)
    whole = write_png(Image.fromarray(pixels), {})
    for pixels_at_a_time in (1, 30, 11 * 36, 11 * 37):
        monkeypatch.setattr(png, "BAND_PIXELS", pixels_at_a_time)
        assert write_png(Image.fromarray(pixels), {}) == whole


def test_pngs_of_photos_are_hardly_larger_than_pillows(real_data):
    for path in sorted(real_data.glob("photos/*.jpg"))[:5]:
        pixels = read_image(path.read_bytes(), size=256).transpose(1, 2, 0)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
        assert len(write_png(Image.fromarray(pixels), {})) < 1.1 * len(buffer.getvalue())
