"""Check that every link of a built site leads to a file of it: python tools/site_links.py build/site.

zensical checks links between Markdown pages; this checks images, scripts and pages that other programs made, too.
"""

import argparse
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Links(HTMLParser):
    """The values of all href and src of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def target(link: str, page: Path, site: Path) -> Path | None:
    """The file that a host sends for a link; None if the link leads to another site, or within its page."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    path = unquote(parts.path)
    file = site / path.lstrip("/") if path.startswith("/") else page.parent / path
    return file / "index.html" if path.endswith("/") or file.is_dir() else file


def dead_links(site: Path) -> list[str]:
    """A line for each link that leads to no file."""
    dead = []
    for page in sorted(site.rglob("*.html")):
        links = Links()
        links.feed(page.read_text(encoding="utf-8"))
        for link in dict.fromkeys(links.found):
            file = target(link, page, site)
            if file is not None and not file.is_file():
                dead.append(f"{page.relative_to(site)}: {link} leads to no file")
    return dead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("site", type=Path, help="the folder of the site")
    site = parser.parse_args().site
    if not (site / "index.html").is_file():
        sys.exit(f"{site} is not a site: it has no index.html")
    if dead := dead_links(site):
        sys.exit("\n".join(dead))


if __name__ == "__main__":
    main()
