"""dsd-verify: check the origin of image files by drawing them again.

dsd-verify dog.png --model my-model

Each file is one of:
  identical bytes   the model draws exactly this file from the settings in it
  same pixels       the model draws this image; another program, or another version, has rewritten the file
  not the same      the settings give another image; another kind of CPU or GPU can cause small differences

The exit status is 0 if every file is one of the first two.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsd_serve.errors import InputError
from dsd_serve.files import sentence_of
from dsd_serve.shell.arguments import Parser, add_model_flags, ending, load_model, parser_of

MAX_BYTES = 200_000_000  # of a file


def arguments_parser() -> Parser:
    parser = parser_of("dsd-verify", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG, JPEG or WebP files")
    add_model_flags(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    with ending("dsd-verify"):
        options = arguments_parser().parse_args(arguments)
        if not verify(options):
            sys.exit(1)


def verify(options: argparse.Namespace) -> bool:
    """Print a line for each file; True if all are what their settings draw."""
    from dsd_serve.shell.redraw import compare

    good = True
    with load_model(options, len(options.files)) as model:
        for path in options.files:
            try:
                found = compare(model, read(path))
            except InputError as error:
                good = False
                print(f"{path}: {error}", flush=True)
            else:
                good = good and found.same
                print(f"{path}: {found}", flush=True)
    return good


def read(path: Path) -> bytes:
    """The bytes of a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(sentence_of(error)) from None
    if len(data) > MAX_BYTES:
        raise InputError(f"has more than {MAX_BYTES:,} bytes")
    return data


if __name__ == "__main__":
    main()
