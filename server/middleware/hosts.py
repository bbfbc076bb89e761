"""Checks of Host and Origin, which protect the server from web pages of other sites.

A page can let a host name of its own point to the server (DNS rebinding). To the browser both are then the same site,
and CORS does not apply. The name is in the Host header, which a page cannot forge.
"""

import re
import socket
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.origins import is_foreign
from server import error_responses
from server.request_reader import media_type
from server.site import HEALTH, NAME, is_address

HEADER = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
UNASKED = ("", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # content types
# Endings that cannot be registered: this machine, the host of a container, services of a Kubernetes cluster.
PRIVATE = (".localhost", ".internal", ".svc", ".svc.cluster.local")


class AllowedHosts:
    """ASGI middleware: 421 for a request whose Host is not a name of this server. /health always answers.

    Its names are all IP addresses, all names without a dot (which no page of another site has), names of this machine
    and of clusters (PRIVATE), and `names` as parse_hosts gives them. A request without Host is not from a browser.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], rejected: Callable[[str], None] = lambda reason: None):
        machine = socket.gethostname().lower()
        self.app, self.rejected = app, rejected
        self.all = "*" in names
        self.names = {machine, f"{machine}.local", *(name for name in names if not name.startswith("*"))}
        self.endings = (*PRIVATE, *(name[1:] for name in names if name.startswith("*.")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.all or scope["type"] != "http" or scope["path"].startswith(HEALTH):
            await self.app(scope, receive, send)
            return
        for host in Headers(scope=scope).getlist("host"):
            if not self.allows(host):
                self.rejected("host")
                await error_responses.reply(Request(scope), 421, sentence(host))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """True if the value of a Host header names this server."""
        if not (parts := HEADER.fullmatch(host)):
            return False
        name = parts[1].lower().removesuffix(".")
        if not name or is_address(name):
            return True
        return bool(NAME.fullmatch(name)) and ("." not in name or name in self.names or name.endswith(self.endings))


class SameOriginPages:
    """ASGI middleware: 403 for a form or a body without a type from a page of another site, which browsers send without
    a preflight request (CORS). The page could not read the answer, but the work would be done.

    origins: as parse_origins gives them, whose pages may send these.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], rejected: Callable[[str], None] = lambda reason: None):
        self.app, self.origins, self.rejected = app, origins, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not self.foreign(scope):
            await self.app(scope, receive, send)
            return
        self.rejected("origin")
        origin = Headers(scope=scope).get("origin", "another site")[:80]
        page = "a page without an origin (null)" if origin == "null" else f"a page of {origin}"
        detail = f"{page} may not send this; if it may, start the server with --cors-origins (DSD_CORS_ORIGINS)"
        await error_responses.reply(Request(scope), 403, detail)(scope, receive, send)

    def foreign(self, scope: Scope) -> bool:
        """True if a page of another origin, which is not allowed, sends this without a preflight request."""
        headers = Headers(scope=scope)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if media_type(scope) not in UNASKED:
            return False
        if "*" in self.origins or origin in self.origins:
            return False
        return is_foreign(origin, site, headers.getlist("host") + headers.getlist("x-forwarded-host"))


def sentence(host: str) -> str:
    name = host.partition(":")[0].lower()
    flag = f"--allowed-hosts {name}" if NAME.fullmatch(name) and len(name) <= 80 else "--allowed-hosts NAME"
    return (
        f"this server does not answer to the host {host[:80]!r}; use its IP address or localhost, or start it with "
        f"{flag} (DSD_ALLOWED_HOSTS)"
    )
