"""Bytes <-> uint8 pixels [3, H, W]: the only file that knows Pillow, and the limits on what it is given."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from dsd_serve.errors import InputError

Pixels = NDArray[np.uint8]

READABLE = ("PNG", "JPEG", "WEBP")  # what decoders are tried on untrusted bytes
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_PIXELS = 40_000_000
QUALITY = 92


def read_image(data: bytes, max_pixels: int = MAX_PIXELS, *, opacity: bool = False) -> Pixels:
    """Decode a PNG, JPEG or WebP of at most `max_pixels`, upright and in RGB: uint8 [3, H, W].

    opacity: not its colours are wanted, but how opaque it is, as greys: 0 is transparent, 255 opaque.
    The size is checked on the header, before anything is decoded. Raises InputError with what is wrong.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures; ours is a limit, not a warning
            image = Image.open(io.BytesIO(data), formats=READABLE)
            width, height = image.size
            if width * height > max_pixels:
                raise InputError(f"the picture has {width} x {height} pixels; at most {max_pixels:,} are allowed")
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise InputError(f"the picture is animated ({frames} frames); send a single picture")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return to_pixels(upright.convert("RGBA").getchannel("A") if opacity else upright)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("the bytes are no picture that can be read: send a PNG, JPEG or WebP") from None
    except Exception as error:  # decoders raise anything on broken input
        raise InputError(f"the picture is broken and cannot be decoded ({type(error).__name__}: {error})") from None


def to_pixels(image: Image.Image) -> Pixels:
    """A Pillow image in any mode -> uint8 [3, H, W]; transparency is laid on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def to_pil(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def fit(pixels: Pixels, size: int) -> Pixels:
    """The centre square of a picture, resized to [3, size, size]."""
    return to_pixels(ImageOps.fit(to_pil(pixels), (size, size), Image.Resampling.LANCZOS))


def resize(pixels: Pixels, size: int) -> Pixels:
    """A square picture at another size, [3, size, size]."""
    return to_pixels(to_pil(pixels).resize((size, size), Image.Resampling.LANCZOS))


def grid(pictures: list[Pixels], columns: int | None = None) -> Pixels:
    """Pictures of one size side by side, row by row, with no gap; the last row is filled with white."""
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    _, height, width = pictures[0].shape
    sheet = np.full((3, rows * height, columns * width), 255, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = number // columns * height, number % columns * width
        sheet[:, y : y + height, x : x + width] = picture
    return sheet


def psnr(pixels: Pixels, others: Pixels) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; uint8 [N, 3, H, W] both."""
    error = ((pixels.astype(np.float64) - others.astype(np.float64)) ** 2).reshape(len(pixels), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def write_image(
    pixels: Pixels, media: str = "png", text: dict[str, str] | None = None, quality: int = QUALITY
) -> bytes:
    """Encode pixels [3, H, W] as `media` (png, jpeg or webp); `text` goes into a PNG's text chunks.

    quality: of jpeg and webp, 0 to 100.
    """
    buffer = io.BytesIO()
    image = to_pil(pixels)
    if media == "png":
        info = PngImagePlugin.PngInfo()
        for key, value in (text or {}).items():
            info.add_itxt(key, value)
        image.save(buffer, "PNG", pnginfo=info, compress_level=4)
    elif media == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif media == "webp":
        image.save(buffer, "WEBP", quality=quality)
    else:
        raise InputError(f"format must be one of {', '.join(MEDIA_TYPES)}, got {media!r}")
    return buffer.getvalue()
