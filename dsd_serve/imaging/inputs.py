"""Images as arguments in Python: a path, bytes, a PIL image or an array."""

from pathlib import Path

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
