"""dsd-image: encode, decode, reconstruct and edit image files, and walk between classes or images.

dsd-image edit photo.jpg alp --strength 0.6 -o edited.png
dsd-image reconstruct photo.jpg
dsd-image encode photo.jpg -o z.npy                              latents: .npy, .safetensors or .json
dsd-image decode z.npy -o photo.png
dsd-image walk goldfish 970 -n 8 --grid walk.png                 or between two image files

For a seed the bytes equal those of the server and of Python. No file is replaced without --force.
"""

import argparse
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_serve.errors import InputError
from dsd_serve.shell.arguments import (
    Parser,
    add_model_flags,
    add_sampling_flags,
    ending,
    load_model,
    number,
    parser_of,
    whole_number,
)

if TYPE_CHECKING:
    from PIL import Image

    from dsd_serve.model import Model

MAX_IMAGES = 1000
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
LATENTS = (".npy", ".safetensors", ".json")


def arguments_parser() -> Parser:
    parser = parser_of("dsd-image", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, about: str, output: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=about, description=about)
        made.add_argument("-o", "--output", metavar="PATH", help=output)
        made.add_argument("--force", action="store_true", help="replace files that exist")
        return made

    images = "FILE.png, a folder, or - for stdout (default: this folder)"
    encode = verb(
        "encode", "write the latents of an image", "FILE.npy, FILE.safetensors or FILE.json (default: IMAGE.npy)"
    )
    encode.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP")
    decode = verb("decode", "draw the image of latents", images)
    decode.add_argument("latents", type=Path, metavar="LATENTS", help="a .npy, .safetensors or .json file")
    reconstruct = verb("reconstruct", "encode an image and decode its latents", images)
    reconstruct.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP")
    for made in (decode, reconstruct):
        made.add_argument("--size", type=whole_number(8, 16_384), metavar="N", help="side of the image in pixels")
    edit = verb("edit", "redraw an image, towards a class if one is given", images)
    edit.add_argument("image", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP")
    edit.add_argument("class_", nargs="?", metavar="CLASS", help="index, wnid or name of a class")
    edit.add_argument(
        "--strength",
        default="0.6",
        metavar="X",
        help="amount of noise, above 0 and at most 1, and the share of the steps that run (0.6)",
    )
    edit.add_argument(
        "--mask", type=Path, metavar="IMAGE", help="mask, white where the image is redrawn (default: everywhere)"
    )
    edit.add_argument("-n", type=whole_number(1, MAX_IMAGES), default=1, metavar="N", help="variants (1)")
    walk = verb("walk", "draw the images between two classes or two image files", images)
    walk.add_argument("start", metavar="START", help="a class, or an image file")
    walk.add_argument("end", metavar="END", help="a class, or an image file")
    walk.add_argument(
        "-n", type=whole_number(2, MAX_IMAGES), default=8, metavar="N", help="number of images, both ends included (8)"
    )
    walk.add_argument("--end-seed", type=whole_number(0, 2**63 - 1), metavar="N", help="seed of END (default: --seed)")
    walk.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help="write all images into one file, in a row; without -o only this file",
    )
    for made in (edit, walk):
        add_sampling_flags(made)
    for made in (encode, decode, reconstruct, edit, walk):
        add_model_flags(made)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with ending("dsd-image"):
        options = arguments_parser().parse_args(arguments)
        run: Callable[[Model, argparse.Namespace], None] = VERBS[options.verb]
        with load_model(options) as model:
            run(model, options)


def encode(model: "Model", options: argparse.Namespace) -> None:
    from dsd_serve.files import atomic
    from dsd_serve.imaging.latents import write_latents
    from dsd_serve.shell.image_files import check_free

    path = Path(options.output or f"{options.image.stem}.npy")
    if path.suffix not in LATENTS:
        raise InputError(f"-o must be a file that ends in {', '.join(LATENTS)}, got {path}")
    check_free([path], options.force)
    data = write_latents(model.encode(options.image), path.suffix[1:])
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    print(path)


def decode(model: "Model", options: argparse.Namespace) -> None:
    from dsd_serve.imaging.latents import read_latents

    try:
        data = options.latents.read_bytes()
    except OSError as error:
        raise InputError(f"the latents {options.latents} cannot be read: {error.strerror}") from None
    z = read_latents(data, model.info.config.latent_shape)
    write(model, options, [options.latents.stem], lambda: [model.decode(z, size=options.size)])


def reconstruct(model: "Model", options: argparse.Namespace) -> None:
    name = f"{options.image.stem}-reconstructed"
    write(model, options, [name], lambda: [model.reconstruct(options.image, size=options.size)])


def edit(model: "Model", options: argparse.Namespace) -> None:
    settings = settings_of(options)
    seed = settings.setdefault("seed", secrets.randbelow(2**32))
    first = settings.get("index", 0)
    names = [f"{options.image.stem}-edited-{seed}-{first + i:06}" for i in range(options.n)]

    def make() -> "list[Image.Image]":
        strength = number(options.strength, float)
        given = {"strength": strength, "mask": options.mask, "n": options.n, "size": options.size}
        return model.edit(options.image, options.class_, **given, **settings)

    write(model, options, names, make)


def walk(model: "Model", options: argparse.Namespace) -> None:
    start, end = (Path(one) if Path(one).suffix.lower() in IMAGES else one for one in (options.start, options.end))

    def make() -> "list[Image.Image]":
        given = {"n": options.n, "end_seed": options.end_seed, "size": options.size}
        return model.walk(start, end, **given, **settings_of(options))

    write(model, options, [f"walk-{i:03}" for i in range(options.n)], make)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that are given, by field name."""
    from dsd_serve.params import API_NAMES

    values = vars(options)
    return {name: values[api] for name, api in API_NAMES.items() if values.get(api) is not None}


def write(
    model: "Model", options: argparse.Namespace, names: Sequence[str], make: "Callable[[], list[Image.Image]]"
) -> None:
    """Make images and write them. names: of their files in a folder."""
    from dsd_serve.shell.image_files import ImageFiles, check_grid, write_grid

    grid = getattr(options, "grid", None)
    files = ImageFiles(options.output or ".", names, options.force) if options.output or not grid else None
    if grid:
        check_grid(grid, len(names), options.size or model.info.config.image_size, options.force, len(names))
    images = make()
    if grid:
        write_grid(grid, images, columns=len(images))
    for place, image in enumerate(images if files else ()):
        assert files is not None
        files.write(place, image)
    if files:
        files.show()


VERBS = {"encode": encode, "decode": decode, "reconstruct": reconstruct, "edit": edit, "walk": walk}


if __name__ == "__main__":
    main()
