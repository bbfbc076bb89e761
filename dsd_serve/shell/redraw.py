"""Drawing an image again from the settings in its file, and comparing the two."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.imaging.provenance import is_drawn, settings_of
from dsd_serve.imaging.sanitize import inspect
from dsd_serve.model import Model
from dsd_serve.params import from_api
from dsd_serve.programs import Generate

MAX_IMAGES = 1000  # in one file
MAX_SIDE = 16_384  # pixels of an image in it


@dataclass(frozen=True)
class Comparison:
    """A file against the image that its settings draw. difference: the largest, of 255, and psnr in dB."""

    identical_bytes: bool
    difference: int
    psnr: float

    @property
    def same(self) -> bool:
        """Whether file or pixels are the same."""
        return self.identical_bytes or not self.difference

    def __str__(self) -> str:
        if self.identical_bytes:
            return "identical bytes"
        if not self.difference:
            return "same pixels"
        return f"not the same: values differ by up to {self.difference} of 255, PSNR {self.psnr:.1f} dB"


def compare(model: Model, data: bytes) -> Comparison:
    """Draw the image of a PNG, JPEG or WebP file again. Raises InputError if its settings cannot tell how."""
    pixels = codec.read_image(data)
    settings = settings_of(data)
    if settings is None:
        raise InputError("has no settings of DSD: it was made by another program, or they were removed")
    media = inspect(data).format.lower()
    image = redraw(model, settings, *pixels.shape[:0:-1])
    codec.attach_settings(image, settings)
    again = codec.encode(image, media, image.info["dsd"])
    drawn = codec.read_image(again)
    difference = int(np.abs(drawn.astype(np.int16) - pixels).max())
    return Comparison(again == data, difference, codec.psnr(drawn[None], pixels[None]))


def redraw(model: Model, settings: Mapping[str, Any], width: int, height: int) -> Image.Image:
    """The image or sheet of images that these settings draw, [height, width]. Raises InputError."""
    if not is_drawn(settings):
        raise InputError("was made from another image or from latents, which its settings do not hold")
    if "seed" not in settings or isinstance(settings.get("class"), list):
        raise InputError("shows a walk or several classes; only files of single images can be checked")
    if settings.get("fingerprint") != model.info.fingerprint:
        theirs = f"{shown(settings.get('model'))}, fingerprint {str(settings.get('fingerprint'))[:12]!r}"
        raise InputError(
            f"was drawn by another model ({theirs}) than {model.info.name} ({model.info.fingerprint[:12]}): "
            "give the one that drew it as --model"
        )
    target, count, side = settings.get("class"), settings.get("n", 1), settings.get("size", width)
    index = target.get("index") if isinstance(target, Mapping) else None
    sane = type(count) is int and 1 <= count <= MAX_IMAGES and type(side) is int and 1 <= side <= MAX_SIDE
    columns = width // side if sane else 0
    if not sane or not columns or (columns * side, -(-count // columns) * side) != (width, height):
        raise InputError("has settings of an image of another size")
    label = model.info.label_of(None if target is None else model.info.find_class(index))
    first = from_api(settings, model.info.defaults)
    tasks = [Generate(label, replace(first, index=first.index + number)) for number in range(count)]
    images = model.run(tasks)
    return codec.resized(images[0], side) if count == 1 else codec.sheet(images, side, columns)
