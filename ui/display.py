"""Images and latents as the page shows them: enlarged, as principal components, as an animation."""

import io
import json
from collections.abc import Sequence

import numpy as np

from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.imaging.provenance import settings_of
from dsd_serve.rows import Latents, Pixels

SHOWN = 256  # pixels a side of the images that are shown and saved; those of smaller networks are enlarged to it
FRAME_MS = 120
HOLD_MS = 700  # at both ends of an animation


def enlarged(data: bytes, size: int) -> bytes:
    """A PNG of the server at `size`, with its settings: byte for byte the server's answer to size=`size`.

    An image that is that large already is returned as it is.
    """
    pixels = codec.read_image(data)
    if pixels.shape[-1] >= size:
        return data
    settings = settings_of(data)
    return codec.write_image(codec.resize(pixels, size), settings=json.dumps(settings) if settings else None)


def principal_components(z: Latents) -> Pixels:
    """Latents [L, C] of a square image as colours, uint8 [3, g, g] with g = sqrt(L).

    Red, green and blue are the first three principal components of the tokens, each scaled to the whole range.
    """
    grid = round(len(z) ** 0.5)
    if grid * grid != len(z):
        raise InputError(f"latents must have a square number of tokens to be shown as an image, got {len(z)}")
    _, _, directions = np.linalg.svd(z - z.mean(0), full_matrices=False)
    parts = (z - z.mean(0)) @ directions[:3].T  # [L, 3]
    parts -= parts.min(0)
    parts /= np.maximum(parts.max(0), 1e-6)
    return np.ascontiguousarray((255 * parts).astype(np.uint8).T.reshape(-1, grid, grid))


def animation(pngs: Sequence[bytes], size: int) -> bytes:
    """An endless WebP that plays forwards and backwards and pauses at both ends. (GIF has 256 colours, which shows.)"""
    frames = [codec.to_pil(codec.resize(codec.read_image(png), size)) for png in pngs]
    order = [*frames, *frames[-2:0:-1]]
    holds = [HOLD_MS if frame in (frames[0], frames[-1]) else FRAME_MS for frame in order]
    buffer = io.BytesIO()
    order[0].save(buffer, "WEBP", save_all=True, append_images=order[1:], duration=holds, loop=0, quality=90, method=2)
    return buffer.getvalue()
