"""Images of a model's classes, drawn once by dsd-export: a grid in one file, described in config.json."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsd_serve.errors import CheckpointError, shown

FILE = "classes.webp"  # in a model directory
MAX_BYTES = 4_000_000  # of the file
MOST = 10_000  # columns, and images of a class


@dataclass(frozen=True)
class Grid:
    """The grid of classes.webp: square images, row by row. Those of a class follow one another, the most typical one
    first; the classes are in the order of the training classes.

    columns: images in a row. per_class: images of each class. sha256: of the file. made_from: what dsd-export made it
    from.
    """

    columns: int
    per_class: int
    sha256: str
    made_from: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: object) -> "Grid":
        """The grid that a config.json describes. Raises CheckpointError."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"class_images must be an object, got {shown(values)}")
        for name in ("columns", "per_class"):
            number = values.get(name)
            if type(number) is not int or not 1 <= number <= MOST:
                raise CheckpointError(f"{name} of class_images must be a whole number from 1, got {shown(number)}")
        sha256 = values.get("sha256")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise CheckpointError(f"sha256 of class_images must be 64 hexadecimal digits, got {shown(sha256)}")
        made_from = values.get("made_from", {})
        if not isinstance(made_from, Mapping):
            raise CheckpointError(f"made_from of class_images must be an object, got {shown(made_from)}")
        return cls(values["columns"], values["per_class"], sha256, made_from)


@dataclass(frozen=True)
class ClassImages:
    """The grid and its file, as plain values that can travel. webp: the bytes of the file in base64."""

    grid: Grid
    webp: str

    @property
    def data(self) -> bytes:
        return base64.b64decode(self.webp)

    @classmethod
    def of(cls, grid: Grid, data: bytes) -> "ClassImages":
        return cls(grid, base64.b64encode(data).decode())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClassImages":
        """The inverse of dataclasses.asdict. Raises CheckpointError, KeyError or TypeError for impossible values."""
        webp = values["webp"]
        if not isinstance(webp, str) or len(webp) > 4 * MAX_BYTES // 3 + 4:
            raise CheckpointError("the images of the classes must be base64 of a file of at most 4 MB")
        try:
            data = base64.b64decode(webp, validate=True)
        except binascii.Error:
            data = b""
        if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
            raise CheckpointError("the images of the classes must be a WebP file")
        return cls(Grid.from_dict(values["grid"]), webp)
