"""The settings of a drawn image, read from its file."""

from collections.abc import Mapping
from typing import Any

from dsd_serve.errors import InputError, shown
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


def restorable_settings(data: bytes) -> dict[str, Any]:
    """`drawn_settings`. Raises InputError, which says why the file has none."""
    if (found := drawn_settings(data)) is not None:
        return found
    claimed = settings_of(data)
    if claimed is None:
        raise InputError("this file has no DSD settings: choose a PNG that was saved from this page or by /generate")
    if "strength" in claimed:
        raise InputError(
            "this image is an edit of a photo, which its file does not contain, so its settings are not enough to draw "
            'it again: open that photo on "Your photo" and edit it there with seed '
            f"{shown(claimed.get('seed'))} and strength {shown(claimed.get('strength'))}"
        )
    if "from" in claimed:
        raise InputError("this image is part of a walk: its ends are on Walk, and it cannot be drawn alone")
    raise InputError("the DSD settings in this file are incomplete or out of range: choose another PNG")


def label_of(settings: Mapping[str, Any]) -> int:
    """The class in the settings of an image, NO_CLASS for one that was drawn without."""
    return NO_CLASS if settings["class"] is None else int(settings["class"]["index"])
