"""Pictures and latents as the page shows them: data URIs, settings in PNG files, principal components, animations."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.params import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, SAMPLER_NAMES
from dsd_serve.rows import Latents, Pixels

SHOWN = 256  # side of the pictures that are shown and saved; smaller networks' pictures are scaled up to it
FRAME_MS = 120
HOLD_MS = 700  # at both ends of an animation


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def settings_of(data: bytes) -> dict[str, Any] | None:
    """The settings that the server wrote into a PNG; None where there are none that can be read."""
    try:
        file = Image.open(io.BytesIO(data), formats=["PNG"])
        found = json.loads(file.info.get("dsd", "null"))  # of the chunks before the pixels; nothing is decoded
    except Exception:  # a decoder raises anything on broken input
        return None
    return found if isinstance(found, dict) else None


def drawn_settings(data: bytes) -> dict[str, Any] | None:
    """The settings of an image of a class, all that draws it again; None where they are missing or make no sense.

    A file can claim anything, so types and ranges are checked.
    """
    found = settings_of(data) or {}
    label = found.get("class")
    numbers = (label.get("index") if isinstance(label, dict) else None, found.get("seed"), found.get("index"))
    times = (found.get("guidance_start"), found.get("guidance_stop"))
    sensible = (
        "strength" not in found
        and all(type(number) is int and 0 <= number <= MAX_SEED for number in (*numbers, found.get("steps")))
        and 1 <= found["steps"] <= MAX_STEPS
        and found.get("sampler") in SAMPLER_NAMES
        and all(isinstance(time, int | float) and 0 <= time <= 1 for time in times)
        and isinstance(found.get("guidance"), int | float)
        and 0 <= found["guidance"] <= MAX_GUIDANCE
    )
    return found if sensible else None


def enlarged(data: bytes, size: int) -> bytes:
    """A PNG of the server at `size`, with its settings: what the server answers for size=`size`, to the byte.

    A picture that is that large already stays as it is.
    """
    pixels = codec.read_image(data)
    if pixels.shape[-1] >= size:
        return data
    settings = settings_of(data)
    return codec.write_image(codec.resize(pixels, size), "png", {"dsd": json.dumps(settings)} if settings else None)


def principal_components(z: Latents) -> Pixels:
    """Latents [L, C] of a square picture as colours, uint8 [3, g, g]: red, green and blue are the three directions in
    which its tokens differ most, each stretched over the whole range."""
    grid = round(len(z) ** 0.5)
    if grid * grid != len(z):
        raise InputError(f"latents of {len(z)} tokens are no square picture")
    _, _, directions = np.linalg.svd(z - z.mean(0), full_matrices=False)
    parts = (z - z.mean(0)) @ directions[:3].T  # [L, 3]
    parts -= parts.min(0)
    parts /= np.maximum(parts.max(0), 1e-6)
    return np.ascontiguousarray((255 * parts).astype(np.uint8).T.reshape(-1, grid, grid))


def effective_rank(latents: Sequence[Latents]) -> float:
    """In how many directions the tokens of pictures lie: RankMe (arXiv 2210.02885), as training/monitor.py has it.

    latents: [L, C] of each picture -> a number from 1 to C.
    """
    values = np.linalg.svd(np.concatenate(latents).astype(np.float64), compute_uv=False)
    share = values / max(values.sum(), 1e-12)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def animation(pngs: Sequence[bytes], size: int) -> bytes:
    """A WebP that goes there and back for ever, with a rest at both ends. (GIF has 256 colours, which shows.)"""
    frames = [codec.to_pil(codec.resize(codec.read_image(png), size)) for png in pngs]
    order = [*frames, *frames[-2:0:-1]]
    holds = [HOLD_MS if frame in (frames[0], frames[-1]) else FRAME_MS for frame in order]
    buffer = io.BytesIO()
    order[0].save(buffer, "WEBP", save_all=True, append_images=order[1:], duration=holds, loop=0, quality=90, method=2)
    return buffer.getvalue()
