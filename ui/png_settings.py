"""Settings in the text chunk of a PNG."""

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.params import MAX_SEED, SamplingParams, from_api, to_api
from ui.server_info import NO_CLASS


def settings_of(data: bytes) -> dict[str, Any] | None:
    """The settings that the server wrote into a PNG; None if there are none that can be read."""
    try:
        file = Image.open(io.BytesIO(data), formats=["PNG"])
        found = json.loads(file.info.get("dsd", "null"))  # of the chunks before the pixels; nothing is decoded
    except Exception:  # a decoder raises anything on broken input
        return None
    return found if isinstance(found, dict) else None


def drawn_settings(data: bytes) -> dict[str, Any] | None:
    """The settings of a drawn image, all that is needed to draw it again; None if any is missing or invalid.

    A file can claim anything, so types and ranges are checked.
    """
    found = settings_of(data) or {}
    label = found.get("class", "missing")
    index = label.get("index") if isinstance(label, dict) else None
    is_class = type(index) is int and 0 <= index <= MAX_SEED
    if "strength" in found or not (is_class or label is None):
        return None
    if any(found.get(name) is None for name in to_api(SamplingParams())):
        return None
    try:
        from_api(found, SamplingParams())
    except InputError:
        return None
    return found


def label_of(settings: Mapping[str, Any]) -> int:
    """The class in the settings of an image, NO_CLASS for one that was drawn without."""
    return NO_CLASS if settings["class"] is None else int(settings["class"]["index"])
