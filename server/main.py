"""dsd-serve: start the server."""

import logging
import signal
import sys
from collections.abc import Sequence

from dsd_serve.errors import DSDError
from server.settings import parse_settings


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        settings = parse_settings(arguments)
        logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
        import uvicorn

        from server.app import create_app
        from server.service import Service

        app = create_app(Service(settings))
    except DSDError as error:
        sys.exit(f"dsd-serve: {error}")
    # Uvicorn drains at a signal and then raises it again; a drained server has ended in order.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        timeout_graceful_shutdown=int(settings.grace) or None,
    )


if __name__ == "__main__":
    main()
