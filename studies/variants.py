"""Studies of variants: the command line, and the results that are kept from one run of the command to the next."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import add_flag

Results = dict[str, dict[str, Any]]


def arguments_parser(program: str, description: str | None, config: Path) -> argparse.ArgumentParser:
    """The options that studies of variants share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{program}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of Tiny-ImageNet parquet files, or another source")
    add_flag(parser, "studies/results")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so many minutes")
    parser.add_argument("--variants", nargs="*", help="names of variants (default: all)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help=f"values that replace those of {config.name}"
    )
    return parser


def chosen(program: str, options: argparse.Namespace, variants: Collection[str]) -> Sequence[str]:
    """The variants that the options name, or all. Exits with a sentence if there is no such variant."""
    if unknown := sorted(set(options.variants or ()) - set(variants)):
        sys.exit(f"{program}: --variants must be of {', '.join(variants)}; got {unknown[0]!r}")
    return options.variants or list(variants)


def run_missing(
    file: Path,
    runs: Mapping[str, Mapping[str, Any]],
    run: Callable[[str], dict[str, Any]],
    order: Callable[[Results], Results],
    write: Callable[[Results], None],
    minutes: float,
) -> Results:
    """The results in `file`, with those of `runs` (name -> conditions) that it lacks under these conditions.

    write: called after each run, so that nothing is lost, and at the end. No run starts after `minutes`.
    """
    start = time.monotonic()
    results: Results = json.loads(file.read_text()) if file.exists() else {}
    for name, conditions in runs.items():
        if name in results and conditions.items() <= results[name].items():
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        results[name] = {**conditions, **run(name)}
        results = order(results)
        write(results)
    write(results)
    return results
