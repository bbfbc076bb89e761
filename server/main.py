"""dsd-serve: start the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.front import starting

if TYPE_CHECKING:
    from server.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    with starting("dsd-serve"):
        from server.settings import parse_settings

        serve(parse_settings(arguments))


def serve(settings: Settings) -> None:
    """Serve until a signal ends it. Raises DSDError when it cannot start."""
    import gc
    import logging
    import os

    from fastapi import FastAPI  # here and not above: --help needs none of it

    from dsd_serve.imaging import codec
    from server.app import create_app
    from server.connections import ConnectionLimiter
    from server.front import configure, listening
    from server.lifecycle import DrainingServer
    from server.service import Service
    from server.startup import StartupApp
    from server.stray_variables import unknown_variables
    from server.telemetry import logs

    logs.configure(settings.log_level, settings.log_format)
    for sentence in (*unknown_variables(os.environ), codec.outdated()):
        if sentence:
            logging.getLogger("server.main").warning(sentence)
    with listening(settings.host, settings.port) as sockets:  # before the model, which takes its time
        if settings.http_workers > 1:
            from server.workers import worker_group

            worker_group.serve(settings, sockets)
            return
        service = Service(settings)
        limiter = ConnectionLimiter(settings, service.metrics.connection_cut)
        service.metrics.watch_connections(limiter)
        opening: StartupApp | None = None
        if service.waits:

            def make() -> FastAPI:
                service.wait()
                return create_app(service)

            opening = StartupApp(make, lambda: service.not_ready, service.close)
        config = configure(opening or create_app(service), limiter)
        # What is there by now stays: a full collection looks at requests only, so it comes sooner and is short.
        gc.collect()
        gc.freeze()
        DrainingServer(config, limiter, service.drain, service.close, settings.grace, service.reload_keys).run(sockets)
    if opening is not None and opening.failed is not None:
        raise opening.failed


if __name__ == "__main__":
    main()
