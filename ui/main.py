"""dsd-ui: start the page. It draws nothing itself; it asks a server, by default on localhost:8000."""

import argparse
import os
import sys
from collections.abc import Sequence

from dsd_serve import __version__
from dsd_serve.client import AsyncClient
from dsd_serve.errors import DSDError, shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dsd-ui", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--server", default="http://localhost:8000", help="address of dsd-serve (default %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port of the page (default %(default)s)")
    parser.epilog = (
        "For a server with API keys put one into the environment variable DSD_API_KEY; everybody who can open the "
        "page then draws with it."
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        sys.exit(f"dsd-ui: port must be an integer from 0 to 65535, got {shown(options.port)}")
    try:
        import uvicorn

        from ui.app import create_page
    except ImportError as error:
        sys.exit(f"dsd-ui: the page needs gradio ({error}): pip install 'dsd-serve[ui]'")
    try:
        page = create_page(AsyncClient(options.server, api_key=os.environ.get("DSD_API_KEY", "")))
        uvicorn.run(page, host=options.host, port=options.port, access_log=False, timeout_graceful_shutdown=1)
    except (DSDError, OSError) as error:
        sys.exit(f"dsd-ui: {error}")


if __name__ == "__main__":
    main()
