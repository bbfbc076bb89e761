"""The page in the browser (--ui), in the same process as the API. To the API it is a client like any other."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from dsd_serve.client import AsyncClient
from dsd_serve.errors import ConfigError, EngineUnavailableError
from server.middleware.prefix import below_prefix
from server.service import Service

MISSING = "--ui needs gradio ({error}): pip install '.[ui]', or leave --ui out"
KEYS = "--ui cannot be combined with API keys, because anyone could draw on the page without one; serve it with dsd-ui"


class PageRoute(BaseRoute):
    """The routes of the page. The first visitor's request tells the page's client where the API is, because the system
    may have chosen the port."""

    def __init__(self, page: FastAPI, paths: frozenset[str], client: AsyncClient) -> None:
        self.page, self.paths, self.client = below_prefix(page), paths, client
        self.found = False

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        first = scope["path"].split("/")[1] if scope["type"] == "http" else None
        return (Match.FULL, {}) if first in self.paths else (Match.NONE, {})

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.found:
            host, port = scope["server"]  # of the socket, not of a header
            self.client.point_to(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            self.found = True
        await self.page(scope, receive, send)


def install(app: FastAPI, service: Service, run: Callable[[Any], None]) -> None:
    """Mount the page at /.

    run: registers an async context manager that must be open while the app runs.

    Raises EngineUnavailableError without gradio, ConfigError with API keys.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the page's requests are in the access log already
    if service.keys:
        raise ConfigError(KEYS)
    try:
        # The one place where an application imports another, and only with --ui: see pyproject.toml.
        from ui.app import FIRST_SEGMENTS, STREAMS, create_page
    except ImportError as error:
        raise EngineUnavailableError(MISSING.format(error=error)) from None
    client = AsyncClient()
    page = create_page(client, lambda request: str(request.base_url).rstrip("/"), service.decoder)
    run(page.router.lifespan_context)
    service.drain.uncounted = STREAMS
    service.drain.at_end.append(page.state.stop.set)
    app.router.routes.insert(0, PageRoute(page, FIRST_SEGMENTS, client))
