"""Hooks for schemathesis: valid images, latents and class names, and two more checks.

schemathesis loads this file in its own process, see schemathesis.toml.
"""

import io
import json

import numpy as np
import schemathesis
from hypothesis import strategies as st
from PIL import Image

from dsd_serve.imaging.latents import write_latents

SHAPE = (4, 8)  # latents of the tiny model of conftest.py

# Errors for requests that the document allows, because a schema cannot express rules between parameters or for bytes.
REASONS = (
    "guidance needs a class to guide to",
    "must be times from 0 to 1 in this order",
    "index must be a whole number from 0 to",
    "the bytes are not a readable image",
    "not readable latents",
    "the latents must be finite numbers",
    "the settings are in the JSON body here",
)


def sample_image(mode: str, size: tuple[int, int], media: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else (200, 100, 50)).save(buffer, media)
    return buffer.getvalue()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
images = {
    media: st.builds(sample_image, st.sampled_from(["RGB", "L"] if media != "webp" else ["RGB"]), sizes, st.just(media))
    for media in ("png", "jpeg", "webp")
}
numbers = st.floats(-5, 5, width=32)
latents = st.lists(numbers, min_size=SHAPE[0] * SHAPE[1], max_size=SHAPE[0] * SHAPE[1]).map(
    lambda values: np.array(values, np.float32).reshape(SHAPE)
)
for media, strategy in images.items():
    schemathesis.openapi.media_type(f"image/{media}", strategy)
for form in ("npy", "safetensors"):
    schemathesis.openapi.media_type(f"application/x-{form}", latents.map(lambda z, form=form: write_latents(z, form)))
schemathesis.openapi.format(
    "class-name", st.sampled_from(["1", "207", "950", "n02099601", "golden retriever", "Goldfish", "retriev"])
)


@schemathesis.check
def no_refusal_without_reason(ctx, response, case):
    """Requests that fit the document are accepted, or rejected for one of REASONS. Under /v1 any text is a prompt."""
    if (
        case.path.startswith("/v1")
        or case.meta is None
        or not case.meta.generation.mode.is_positive
        or response.status_code not in (400, 415, 422)
    ):
        return
    detail = json.loads(response.content)["detail"]
    assert any(reason in detail for reason in REASONS), f"refused although the document allows it: {detail}"


@schemathesis.check
def late_only_with_timeout(ctx, response, case):
    """504 only answers requests with a timeout."""
    if response.status_code == 504:
        assert "timeout" in f"{case.query} {case.body}", "504 without a timeout"
