"""Names of the files that the page offers for saving."""

import re
from collections.abc import Mapping
from typing import Any


def file_name(title: str, settings: Mapping[str, Any]) -> str:
    """The name of an image's file, which any file system takes; letters of any script are kept."""
    label = (settings.get("class") or {}).get("index", "image")
    words = re.sub(r"[^\w.]+", "-", title.lower()).strip("-.") or str(label)
    if not settings:
        return f"{words}.png"
    edit = "-edit" if "strength" in settings else ""
    return f"{words}{edit}-{settings['seed']}-{settings['index']}.png"
