"""The output folders of benchmarks and studies: JSON next to their code, pages and figures in docs/."""

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
    """Add -o/--output, a folder for everything (default: JSON in `results`, pages in docs/)."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"folder for JSON and page (default: {results} and {PAGES})",
    )
    parser.set_defaults(results=Path(results))


def output_of(options: argparse.Namespace) -> Output:
    """The folders of the parsed options, created if missing."""
    output = Output(options.output or options.results, options.output or PAGES)
    for folder in (output.results, output.pages):
        folder.mkdir(parents=True, exist_ok=True)
    return output
