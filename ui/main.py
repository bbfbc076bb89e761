"""dsd-ui: serve the web page of a dsd-serve server, by default the one on localhost:8000."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dsd_serve import __version__

# dsd-ui is a server of its own, with the same front as dsd-serve; see pyproject.toml.
from server import front


def main(arguments: Sequence[str] | None = None) -> None:
    with front.starting("dsd-ui"):
        options = parse(arguments)

        def make() -> tuple[Any, Sequence[Callable[[], None]]]:
            from dsd_serve.client import AsyncClient
            from ui.app import create_page

            page = create_page(AsyncClient(options.server, api_key=os.environ.get("DSD_API_KEY", "")))
            return page, [page.state.stop.set]

        try:
            front.serve_page(make, options)
        except ImportError as error:
            sys.exit(f"dsd-ui: the page needs gradio ({error}): pip install '.[ui]'")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsd-ui", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--server", default="http://localhost:8000", help="URL of dsd-serve (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", default="7860", help="port of the page (default %(default)s)")
    front.add_flags(parser)
    parser.epilog = (
        "If the server has API keys, put one into the environment variable DSD_API_KEY; everyone who can open the "
        "page then uses it."
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
