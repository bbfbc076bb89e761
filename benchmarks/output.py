"""Where benchmarks and studies write: numbers as JSON beside them, a page for people in docs/."""

import argparse
from dataclasses import dataclass
from pathlib import Path

PAGES = Path("docs")


@dataclass(frozen=True)
class Output:
    """results: folder of the JSON. pages: folder of Markdown and figures."""

    results: Path
    pages: Path


def add_flag(parser: argparse.ArgumentParser, results: str) -> None:
    """Add -o/--output, a folder for everything; without it numbers go to `results` and pages to docs/."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"folder for numbers and page (default: numbers in {results}, the page in {PAGES})",
    )
    parser.set_defaults(results=Path(results))


def output_of(options: argparse.Namespace) -> Output:
    """The folders that the options name, created if they are missing."""
    output = Output(options.output or options.results, options.output or PAGES)
    for folder in (output.results, output.pages):
        folder.mkdir(parents=True, exist_ok=True)
    return output
