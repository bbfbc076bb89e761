"""Speed of the page without a server: from opening it to its first image, and the bytes that a visitor fetches.

python -m benchmarks.web_speed [--visits N]    make export/npm/node_modules/.done installs the runtime first

Chromium opens the page of the demo model on this machine with an empty cache. Exits with 1 if a limit is exceeded.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.page_speed import ROOT, chromium
from dsd_serve.files import demo_model
from export.web_folder import write_web

FIRST_SECONDS = 3.0
MOST_MB = 25.0
# The page says how long an image takes as soon as it has drawn one.
DRAWN = """() => new Promise((done) => {
  const look = () => {
    const said = document.getElementById('engine')?.textContent ?? '';
    if (said.includes('an image')) done([performance.now(), said]);
    else requestAnimationFrame(look);
  };
  look();
})"""


class Handler(SimpleHTTPRequestHandler):
    """A static host that counts the bytes of its answers."""

    sent = 0

    def send_header(self, keyword: str, value: str) -> None:
        if keyword.lower() == "content-length":
            Handler.sent += int(value)
        super().send_header(keyword, value)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def host(folder: Path) -> Iterator[str]:
    """The address of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.web_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--visits", type=int, default=6, metavar="N", help="openings of the page (default 6)")
    options = parser.parse_args()
    first, painted, fetched = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        write_web(demo_model(), Path(folder) / "site", ROOT / "export/npm")
        with host(Path(folder) / "site") as url:
            for _ in range(options.visits):
                with chromium() as browser:
                    Handler.sent = 0
                    page = browser.new_page(viewport={"width": 1280, "height": 900})
                    page.goto(url, wait_until="commit")
                    milliseconds, said = page.evaluate(DRAWN)
                    entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                    painted.append(page.evaluate(entry) / 1000)
                    first.append(milliseconds / 1000)
                    fetched.append(Handler.sent / 1e6)
                    print(f"first image after {first[-1]:.2f} s; the page says: {said}")
    for name, values in (("first contentful paint", painted), ("first image", first)):
        print(f"{name}: median {statistics.median(values):.2f} s, at worst {max(values):.2f} s")
    print(f"fetched: {max(fetched):.1f} MB")
    if max(first) > FIRST_SECONDS or max(fetched) > MOST_MB:
        raise SystemExit(f"web: the limits are {FIRST_SECONDS} s and {MOST_MB} MB")


if __name__ == "__main__":
    main()
