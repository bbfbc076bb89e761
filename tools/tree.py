"""Write the tree of files into docs/architecture.md, with the first sentence of each module. --check only compares."""

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
MARK = "<!-- tools/tree.py writes this from the first sentence of each module. -->\n"
PACKAGES = ("dsd_serve", "training", "export", "server", "ui", "benchmarks", "studies", "tools")


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, without the final period."""
    paragraph = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=[a-z0-9)`])\. |\.$", " ".join(paragraph.split()))[0]
    return sentence.rstrip(".")


def escaped(text: str) -> str:
    """Plain text as a cell of a Markdown table."""
    return re.sub(r"([|\[\]<>])", r"\\\1", text)


def tree(root: Path) -> str:
    """A Markdown table for each package: file and first sentence."""
    parts = []
    for package in PACKAGES:
        files = sorted(file for file in (root / package).rglob("*.py") if first_sentence(file))
        # the modules of a folder before its folders
        files.sort(key=lambda file: file.parent.parts)
        rows = [f"| `{file.relative_to(root)}` | {escaped(first_sentence(file))} |" for file in files]
        parts.append(f"### {package}\n\n| file | |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not current")
    options = parser.parse_args()
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    text = f"{head}{mark}\n{tree(ROOT)}"
    if options.check:
        if text != PAGE.read_text(encoding="utf-8"):
            sys.exit(f"{PAGE.relative_to(ROOT)} is not current: python tools/tree.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
