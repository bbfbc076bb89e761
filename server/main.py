"""dsd-serve: start the server."""

import gc
import logging
import sys
from collections.abc import Sequence

from dsd_serve.errors import DSDError
from server.settings import Settings, parse_settings


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        serve(parse_settings(arguments))
    except DSDError as error:
        sys.exit(f"dsd-serve: {error}")
    except KeyboardInterrupt:  # while it started; a running server handles the signal itself
        sys.exit(130)


def serve(settings: Settings) -> None:
    """Serve until a signal ends it. Raises DSDError when it cannot start."""
    import uvicorn
    from fastapi import FastAPI  # here and not above: --help needs none of it

    from dsd_serve import images
    from server import logs
    from server.app import create_app
    from server.drain import LAST_ANSWERS, DrainingServer
    from server.opening import Opening
    from server.protocol import BoundedProtocol
    from server.service import Service

    logs.configure(settings.log_level, settings.log_format)
    if sentence := images.outdated():
        logging.getLogger("server.main").warning(sentence)
    service = Service(settings)
    opening: Opening | None = None
    if settings.triton:

        def make() -> FastAPI:
            service.wait_for_triton()
            return create_app(service)

        opening = Opening(make, lambda: service.batcher.not_ready, service.batcher.close)
    config = uvicorn.Config(
        opening or create_app(service),
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,  # its lines go through ours
        access_log=False,
        timeout_graceful_shutdown=LAST_ANSWERS,
        reset_contextvars=True,
    )
    gc.collect()
    gc.freeze()  # what is there by now stays: a full collection looks at requests only, so it comes sooner and is short
    DrainingServer(config, service.drain, service.batcher, settings.grace).run()
    if opening is not None and opening.failed is not None:
        raise opening.failed


if __name__ == "__main__":
    main()
