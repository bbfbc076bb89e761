"""Bytes <-> uint8 pixels [3, H, W], by Pillow, within limits."""

import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL import __version__ as PILLOW

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging.png import write_png
from dsd_serve.imaging.provenance import TEXT_KEY, texts_of, xmp_of
from dsd_serve.imaging.sanitize import ImageFile, inspect

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
MAX_PIXELS = 40_000_000
MAX_SIDES = {"jpeg": 65_500, "webp": 16_383}  # largest width and height in pixels; that of png is far larger
QUALITY = 92
# Above the largest block that glibc takes from its heap, so that the memory of a large image returns to the system.
Image.core.set_block_size(64 * 2**20)  # type: ignore[attr-defined]
GAP = 3  # a large image is averaged down to this multiple of the target size before it is resampled
DRAFT_GAP = 16  # as GAP, for a JPEG decoded at a lower resolution: cruder, so more is left to average
BAND_PIXELS = 500_000
TURNS = {  # EXIF orientation -> the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def outdated() -> str:
    """A warning if the installed Pillow has known vulnerabilities, else "". overrides.txt says how it is replaced."""
    if int(PILLOW.partition(".")[0]) >= 13:
        return ""
    return f"Pillow {PILLOW} has known vulnerabilities, which 13 fixes: pip install --no-deps 'pillow>=13'"


def read_image(data: bytes, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Pixels:
    """Decode a PNG, JPEG or WebP of at most `max_pixels`, upright and in RGB: uint8 [3, H, W].

    size: decode only the centre square, [3, size, size], which takes a fraction of the memory.
    Everything is checked before anything is decoded. Raises InputError with the reason.
    """
    return decode(open_file(data, max_pixels), size)


def open_file(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """The PNG, JPEG or WebP image of a file, not yet decoded. Raises InputError, also for more than `max_pixels`."""
    source = inspect(data)
    if source.width * source.height > max_pixels:
        raise InputError(
            f"the image has {source.width} x {source.height} pixels; at most {max_pixels:,} are allowed: use a smaller "
            "copy"
        )
    return source


def decode(source: ImageFile, size: int | None = None, *, opacity: bool = False) -> Pixels:
    """The pixels of an image, upright and in RGB; with `size` those of its centre square, [3, size, size].

    opacity: return the opacity as greys instead of the colours: 0 is transparent, 255 opaque.
    """
    try:
        file = Image.open(io.BytesIO(source.data), formats=[source.format])
        if size is not None:
            file.draft(
                None, (DRAFT_GAP * size, DRAFT_GAP * size)
            )  # a JPEG of many pixels is decoded at 1/2, 1/4 or 1/8
        if source.format == "PNG":
            scale_transparency(file, source.data)
        file.load()
        to_rgb = opacity_of if opacity else flatten
        image = to_rgb(file) if size is None else centre(file, size, to_rgb)
    except Exception as error:  # decoders raise anything on broken input
        log.debug("an image cannot be decoded: %r", error)  # its words may hold addresses of memory
        raise InputError("the image is broken and cannot be decoded; save it again with another program") from None
    turn = TURNS.get(source.orientation)
    return to_pixels(image if turn is None else image.transpose(turn))


def decode_memory(source: ImageFile, size: int) -> int:
    """Bytes that `decode(source, size)` takes at most."""
    if source.format != "JPEG":
        return source.memory()
    gap = min(source.width, source.height) // (DRAFT_GAP * size)
    return source.memory(next(shrink for shrink in (8, 4, 2, 1) if shrink <= max(gap, 1)))


def centre(image: Image.Image, size: int, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The centre square of an image in any mode, [size, size] in RGB, as by `fit`.

    A large image is first averaged over blocks down to GAP times the target size, as by Pillow's `reducing_gap`; in
    bands, so that there is never a second image of the same size.
    """
    side = min(image.size)
    factor = max(1, side // (GAP * size))
    margin = 3 * (side // size + 1)  # the reach of the resampling filter beyond the square
    left, top = ((length - side) / 2 for length in image.size)
    x, y = (max(0, int(start) - margin) for start in (left, top))
    width, height = (length - 2 * start for length, start in zip(image.size, (x, y), strict=True))
    sheet = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    step = factor * max(1, BAND_PIXELS // (width * factor))
    for row in range(0, height, step):
        band = to_rgb(image.crop((x, y + row, x + width, y + min(row + step, height))))
        sheet.paste(band if factor == 1 else band.reduce(factor), (0, row // factor))
    box = ((left - x) / factor, (top - y) / factor, (left - x + side) / factor, (top - y + side) / factor)
    return sheet.resize((size, size), Image.Resampling.LANCZOS, box=box)


def scale_transparency(file: Image.Image, data: bytes) -> None:
    """Scale the transparent colour of a PNG to 8 bits, as Pillow scales its pixels of 2, 4 or 16 bits.

    That of 16-bit grey stays, because Pillow does not scale those pixels.
    """
    depth, transparent = data[24], file.info.get("transparency")
    most = (1 << depth) - 1
    if isinstance(transparent, tuple):
        file.info["transparency"] = tuple(value >> 8 if depth == 16 else value & most for value in transparent)
    elif isinstance(transparent, int) and file.mode == "L":
        file.info["transparency"] = (transparent & most) * (255 // most)


def opacity_of(image: Image.Image) -> Image.Image:
    return eight_bits(image).convert("RGBA").getchannel("A").convert("RGB")


def flatten(image: Image.Image) -> Image.Image:
    """A Pillow image in any mode -> RGB, on white where it is transparent."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """The same image with at most 8 bits a sample and the same transparency.

    Pillow would clip 16 bits to 8 instead of scaling them, and it ignores the transparent colour of floats.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        opaque = None if transparent is None else np.where(values == transparent, np.uint8(0), np.uint8(255))
    elif image.mode in ("I", "F"):
        values, grey = np.asarray(image), image.convert("L")
        grey.info.pop("transparency", None)
        opaque = None if transparent is None else np.where(values == transparent, np.uint8(0), np.uint8(255))
    else:
        return image.convert("LA") if image.mode == "La" else image  # the only conversion that Pillow has
    return grey if opaque is None else Image.merge("LA", (grey, Image.fromarray(opaque)))


def to_pixels(image: Image.Image) -> Pixels:
    """A Pillow image in any mode -> uint8 [3, H, W], on white where it is transparent."""
    return np.ascontiguousarray(np.asarray(flatten(image)).transpose(2, 0, 1))


def to_pil(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def fit(pixels: Pixels, size: int) -> Pixels:
    """The centre square of an image, resized to [3, size, size]."""
    return to_pixels(ImageOps.fit(to_pil(pixels), (size, size), Image.Resampling.LANCZOS))


def fit_as_adm(pixels: Pixels, size: int) -> Pixels:
    """`fit` as ADM prepares ImageNet (arXiv 2105.05233), for comparison with published FID statistics.

    Halved by box filters while the shorter side is at least twice `size`, then bicubic, then cropped; it aliases as
    ADM's does.
    """
    image = to_pil(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return to_pixels(image.crop((left, top, left + size, top + size)))


def resize(pixels: Pixels, size: int) -> Pixels:
    """A square image at another size, [3, size, size]."""
    return to_pixels(resized(pixels, size))


def resized(pixels: Pixels, size: int | None) -> Image.Image:
    """A square image at another size, if one is given."""
    image = to_pil(pixels)
    return image if size in (None, image.width) else image.resize((size, size), Image.Resampling.LANCZOS)


def sheet_shape(count: int, columns: int | None = None) -> tuple[int, int]:
    """Columns and rows of a grid of `count` images; nearly square unless the columns are given."""
    columns = columns or math.ceil(math.sqrt(count))
    return columns, -(-count // columns)


def sheet(images: Sequence[Pixels], size: int | None = None, columns: int | None = None) -> Image.Image:
    """Images of one size side by side, row by row, with no gap, each scaled to `size`; the rest is white.

    They are scaled one after another to save memory.
    """
    width, height = (size, size) if size else images[0].shape[:0:-1]
    columns, rows = sheet_shape(len(images), columns)
    made = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        made.paste(resized(image, size), (number % columns * width, number // columns * height))
    return made


def grid(images: Sequence[Pixels], columns: int | None = None) -> Pixels:
    """`sheet` as pixels [3, H, W]."""
    return to_pixels(sheet(images, columns=columns))


def check_fits(media: str, n: int, size: int, columns: int | None = None) -> None:
    """Raise InputError when a file of format `media` cannot hold `n` square images of `size` pixels side by side."""
    columns, rows = sheet_shape(n, columns)
    most = MAX_SIDES.get(media, size * max(rows, columns))
    if size * max(rows, columns) > most:
        got, instead = f"{size:,}", "png"
        if n > 1:
            got, instead = f"{columns} x {rows} images of {size:,} pixels side by side", "format=zip"
        rule = f"a {media} file must be at most {most:,} pixels wide and high"
        raise InputError(f"{rule}, got {got}; ask for {instead} or a smaller size")


def psnr(pixels: Pixels, others: Pixels) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; uint8 [N, 3, H, W] both."""
    error = ((pixels.astype(np.float64) - others.astype(np.float64)) ** 2).reshape(len(pixels), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-3))))


def attach_settings(image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Put the settings that draw an image again into its `info`, from which `to_png` takes them."""
    image.info[TEXT_KEY] = json.dumps(settings)


def to_png(image: Image.Image) -> bytes:
    """The PNG file of an image, with the settings in its `info["dsd"]`: the bytes that a server sends of it."""
    return encode(image, "png", image.info.get(TEXT_KEY))


def write_image(pixels: Pixels, media: str = "png", settings: str | None = None, quality: int = QUALITY) -> bytes:
    """`encode` of pixels [3, H, W]."""
    return encode(to_pil(pixels), media, settings, quality)


def encode(image: Image.Image, media: str = "png", settings: str | None = None, quality: int = QUALITY) -> bytes:
    """Encode an image in RGB as `media` (png, jpeg or webp).

    settings: those that draw it again, as JSON. They and a mark that a model made the image go into the file. quality:
    of jpeg and webp, 0 to 100.
    """
    if media == "png":
        return write_png(image, {} if settings is None else texts_of(settings))
    buffer = io.BytesIO()
    xmp = {} if settings is None else {"xmp": xmp_of(settings, whole=True).encode()}
    if media == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0, **xmp)
    elif media == "webp":
        image.save(buffer, "WEBP", quality=quality, **xmp)
    else:
        raise InputError(f"format must be one of {', '.join(MEDIA_TYPES)}, got {shown(media)}")
    return buffer.getvalue()
