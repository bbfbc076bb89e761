"""Arguments in Python: images as a path, bytes, a PIL image or an array, and numbers of numpy."""

from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.rows import Pixels

ImageInput = str | Path | bytes | Image.Image | NDArray[np.uint8]


def read_input(image: ImageInput, size: int) -> Pixels:
    """The centre square of an image, uint8 [3, size, size]. Raises InputError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(
                f"an image as an array must be uint8 [H, W, 3], got {image.dtype.name} {shown(list(image.shape))}"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return codec.to_pixels(codec.centre(image, size, codec.flatten))
    if isinstance(image, str | Path):
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the image {shown(str(image))} cannot be read: {reason}") from None
    if not isinstance(image, bytes | bytearray):
        raise InputError(f"an image must be a path, bytes, a PIL image or uint8 [H, W, 3], got {type(image).__name__}")
    return codec.read_image(bytes(image), size=size)


def read_mask(mask: ImageInput | NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """Where to redraw, bool [size, size]: the bright part of an image, or what is True in an array bool [H, W].

    Raises InputError.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2:
        mask = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    bright: NDArray[np.bool_] = read_input(cast(ImageInput, mask), size).mean(0) >= 128
    return bright


def plain(value: Any) -> Any:
    """A number of numpy as one of Python; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value
