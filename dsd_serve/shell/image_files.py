"""Images as PNG files: where -o puts them, their names, and the protection of existing files."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.files import atomic
from dsd_serve.imaging import codec
from dsd_serve.imaging.provenance import TEXT_KEY
from dsd_serve.shell import terminal

STDOUT = "-"
GRID_PIXELS = 100_000_000  # of a grid, 300 MB
SHOWN = 64  # images that a terminal shows side by side


class ImageFiles:
    """The PNG files of a command. target: FILE.png, a folder, or - for stdout. force: replace files.

    Raises InputError for an output that cannot be written.
    """

    def __init__(self, target: str, names: Sequence[str], force: bool) -> None:
        self.stdout = target == STDOUT
        self.paths = [] if self.stdout else paths_of(target, names)
        if self.stdout and len(names) > 1:
            raise InputError(f"-o - writes one image to stdout, but there are {len(names):,}: give a folder")
        if self.stdout and sys.stdout.isatty():
            raise InputError("-o - would write a PNG file to the terminal: send it to a file or a program")
        check_free(self.paths, force)
        self.images: list[Image.Image] = []  # those to show

    def write(self, number: int, image: Image.Image) -> None:
        """Write an image, and say where it is."""
        data = codec.to_png(image)
        if self.stdout:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        with atomic(self.paths[number]) as temporary:
            temporary.write_bytes(data)
        print(self.paths[number], flush=True)
        if len(self.images) < SHOWN:
            self.images.append(image)

    def show(self) -> None:
        """Show the images in the terminal, side by side, if it can."""
        if self.images and not self.stdout and (name := terminal.protocol(sys.stdout)):
            sheet = codec.sheet([codec.to_pixels(image) for image in self.images])
            sys.stdout.write(terminal.escape(codec.to_png(sheet), name))
            sys.stdout.flush()


def paths_of(target: str, names: Sequence[str]) -> list[Path]:
    """A path for each image: FILE.png itself, or NAME.png in a folder."""
    path = Path(target)
    if path.suffix.lower() == ".png" and not path.is_dir():
        if len(names) > 1:
            raise InputError(
                f"{path} holds one image, but there are {len(names):,}: give a folder as -o, or --grid {path} to have "
                "them side by side"
            )
        return [path]
    if path.suffix and not path.is_dir() and not target.endswith(("/", os.sep)):
        raise InputError(
            f"-o must be FILE.png, a folder, or - for stdout, got {target}; .npz and .tar need --per-class, and a new "
            "folder with a dot in its name needs a / at the end"
        )
    return [path / f"{name}.png" for name in names]


def check_free(paths: Sequence[Path], force: bool) -> None:
    """Raises InputError if a file may not be written: it exists, or its folder does not take it."""
    if len(set(paths)) < len(paths):
        raise InputError("two of the files would have the same name; give other outputs")
    for folder in {path.parent for path in paths}:
        made = next(one for one in (folder, *folder.parents) if one.exists())
        if not made.is_dir():
            raise InputError(f"{made} is a file, so nothing can be written into it; give another output")
        if not os.access(made, os.W_OK | os.X_OK):
            raise InputError(f"the folder {made} is not writable; give another output")
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path.exists() and not force:
            raise InputError(f"{path} exists; --force replaces it")


def check_grid(path: Path, count: int, size: int, force: bool, columns: int | None = None) -> None:
    """Raises InputError if a grid of `count` images cannot be written."""
    columns, rows = codec.sheet_shape(count, columns)
    if path.suffix.lower() != ".png":
        raise InputError(f"--grid must be FILE.png, got {path}")
    if columns * rows * size**2 > GRID_PIXELS:
        raise InputError(
            f"a grid must have at most {GRID_PIXELS:,} pixels, got {columns} x {rows} images of {size} x {size}: "
            "give a smaller -n or --size"
        )
    check_free([path], force)


def write_grid(path: Path, images: Sequence[Image.Image], columns: int | None = None) -> None:
    """Write images side by side, with the settings as the server gives them: those that they share, size and number."""
    sheet = codec.sheet([codec.to_pixels(image) for image in images], columns=columns)
    settings = [json.loads(image.info[TEXT_KEY]) for image in images]
    common = {**settings[0], "size": images[0].width, "n": len(images)}
    common.pop("fraction", None)  # of a walk
    classes = [one.get("class") for one in settings]
    if any(one != classes[0] for one in classes):
        common["class"] = [one for place, one in enumerate(classes) if one not in classes[:place]]
    codec.attach_settings(sheet, settings[0] if len(images) == 1 else common)
    with atomic(path) as temporary:
        temporary.write_bytes(codec.to_png(sheet))
    print(path, flush=True)
