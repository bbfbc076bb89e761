"""The settings of a drawn image, read from its file."""

from collections.abc import Mapping
from typing import Any

from dsd_serve.errors import InputError
from dsd_serve.imaging.provenance import settings_of
from dsd_serve.params import MAX_SEED, SamplingParams, from_api, to_api
from ui.server_info import NO_CLASS


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
