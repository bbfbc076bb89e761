"""Access control: API keys with limits, the web pages that may use the server (CORS), and the host names it serves.

A key is written name:key[:requests_per_minute[:images_at_once]], where 0 means no limit; see `load_keys`. With keys,
everything needs one except /health, the documentation, which holds no secret and in which a key is entered, and
/admin, which has a key of its own.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import QueueFullError
from server import error_responses
from server.keys import ApiKey, current_key, find, sent_key
from server.middleware.hosts import AllowedHosts, SameOriginPages
from server.middleware.request_id import UncaughtErrors

log = logging.getLogger(__name__)

OPEN = re.compile(r"/health(/.*)?|/docs(/assets/.*)?|/redoc|/openapi\.json|/admin/.*")  # paths that need no API key


def needs_no_key(path: str) -> bool:
    return OPEN.fullmatch(path) is not None


class KeyMiddleware:
    """ASGI middleware: 401 without a valid API key, 429 above the rate of the key."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[ApiKey], used: Callable[[str], None], rejected: Callable[[str], None]
    ) -> None:
        self.app, self.keys, self.used, self.rejected = app, keys, used, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or needs_no_key(scope["path"]):
            await self.app(scope, receive, send)
            return
        secret = sent_key(Headers(scope=scope))
        key = find(self.keys, secret)
        if key is None:
            self.rejected("unauthorized")
            what = "this API key is unknown" if secret else "this server needs an API key"
            detail = f"{what}; send the header Authorization: Bearer KEY, or X-API-Key: KEY"
            error = HTTPException(401, detail, {"WWW-Authenticate": 'Bearer realm="dsd"'})
            await error_responses.answer(error, scope, receive, send)
            return
        self.used(key.name)
        if wait := key.take(time.monotonic()):
            self.rejected("rate_limit")
            detail = f"the key {key.name} may send {key.per_minute} requests a minute; try again in {math.ceil(wait)} s"
            await error_responses.answer(QueueFullError(detail, wait), scope, receive, send)
            return
        current_key.set(key)
        await self.app(scope, receive, send)


def install(
    app: FastAPI,
    *,
    keys: Sequence[ApiKey],
    hosts: Sequence[str],
    origins: Sequence[str],
    used: Callable[[str], None],
    rejected: Callable[[str], None],
) -> None:
    """hosts, origins: as parse_hosts and parse_origins give them. used(name of a key) and rejected(reason) are called
    for each request."""
    if keys:
        app.add_middleware(KeyMiddleware, keys=keys, used=used, rejected=rejected)
    app.add_middleware(SameOriginPages, origins=origins, rejected=rejected)
    app.add_middleware(AllowedHosts, names=hosts, rejected=rejected)
    if origins:
        app.add_middleware(UncaughtErrors)  # so that a page may read this answer too
        # Outside of the others: a browser's preflight request carries no key, and a page may read every refusal
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients add headers of their own; the origin decides
            allow_private_network=True,
            expose_headers=["*"],  # X-DSD-*, X-Request-ID, Retry-After, ETag ...
        )
