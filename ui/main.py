"""dsd-ui: start the page. It draws nothing itself; it asks a server, by default on localhost:8000."""

import argparse
import sys
from collections.abc import Sequence

from dsd_serve.client import Client
from dsd_serve.errors import DSDError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dsd-ui", description=__doc__)
    parser.add_argument("--server", default="http://localhost:8000", help="address of dsd-serve (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        from ui.page import build_page
    except ImportError as error:
        sys.exit(f"dsd-ui: the page needs gradio ({error}): pip install 'dsd-serve[ui]'")
    try:
        page = build_page(Client(options.server))
        page.queue(default_concurrency_limit=8, max_size=64)
        page.launch(server_name=options.host, server_port=options.port, ssr_mode=False)
    except (DSDError, OSError) as error:
        sys.exit(f"dsd-ui: {error}")


if __name__ == "__main__":
    main()
