import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsd_serve import images
from dsd_serve.errors import InputError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_is_lossless_and_keeps_its_text():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    data = images.write_image(pixels, "png", {"seed": "7"})
    assert np.array_equal(images.read_image(data), pixels)
    assert Image.open(io.BytesIO(data)).text == {"seed": "7"}


@pytest.mark.parametrize("media", ["jpeg", "webp"])
def test_lossy_formats_come_near(media):
    pixels = np.full((3, 16, 16), 90, np.uint8)
    assert abs(images.read_image(images.write_image(pixels, media)).astype(int) - 90).max() <= 3


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new("L", (4, 6), 255).convert(mode) if mode != "I;16" else Image.new(mode, (4, 6), 65535)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert images.read_image(encoded(image, kind)).shape == (3, 6, 4)


def test_transparency_is_laid_on_white():
    assert images.read_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).min() == 255


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert images.read_image(encoded(Image.new("RGB", (8, 2)), "JPEG", exif=exif)).shape == (3, 8, 2)


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(InputError, match=r"100 x 100 pixels; at most 9,999"):
        images.read_image(encoded(Image.new("RGB", (100, 100))), max_pixels=9_999)


def test_animations_are_refused():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    with pytest.raises(InputError, match="animated"):
        images.read_image(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))


def test_other_formats_are_refused():
    with pytest.raises(InputError, match="PNG, JPEG or WebP"):
        images.read_image(encoded(Image.new("RGB", (4, 4)), "BMP"))


@given(cut=st.integers(0, 300), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=8))
def test_broken_bytes_give_a_picture_or_an_input_error(cut, flips):
    data = bytearray(encoded(Image.effect_noise((32, 32), 60)))
    for place, change in flips:
        data[place % len(data)] ^= change
    try:
        pixels = images.read_image(bytes(data[: len(data) - cut]))
    except InputError as error:
        assert "picture" in str(error)
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3


def test_psnr_of_a_known_error():
    zero = np.zeros((2, 3, 4, 4), np.uint8)
    assert images.psnr(zero, zero + 10) == pytest.approx(20 * np.log10(25.5))


def test_grid_lays_pictures_row_by_row():
    pictures = [np.full((3, 2, 2), value, np.uint8) for value in (1, 2, 3)]
    sheet = images.grid(pictures, columns=2)
    assert sheet.shape == (3, 4, 4)
    assert [sheet[0, 0, 0], sheet[0, 0, 2], sheet[0, 2, 0], sheet[0, 2, 2]] == [1, 2, 3, 255]
