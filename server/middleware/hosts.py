"""The names under which the server answers, and its own pages: against web pages of others.

A page may reach the server through a name of its own: it this name point to it (DNS rebinding), and to the browser both
are then one site, to which CORS does not apply. The name stands in the Host header, which a page cannot forge.
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
from server.site import NAME, is_address

HEADER = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
UNASKED = ("", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # content types
# Endings that nobody can register: this machine, the host of a container, services of a Kubernetes cluster.
PRIVATE = (".localhost", ".internal", ".svc", ".svc.cluster.local")


class AllowedHosts:
    """ASGI middleware: 421 for a request whose Host is a name that this server does not have. /health always answers.

    It has any IP address and any name without a dot (a page of somebody else is never at one), names of this machine
    and of clusters (PRIVATE), and `names` as parse_hosts gives them. A request without Host comes from no browser.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str], rejected: Callable[[str], None] = lambda reason: None):
        machine = socket.gethostname().lower()
        self.app, self.rejected = app, rejected
        self.all = "*" in names
        self.names = {machine, f"{machine}.local", *(name for name in names if not name.startswith("*"))}
        self.endings = (*PRIVATE, *(name[1:] for name in names if name.startswith("*.")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.all or scope["type"] != "http" or scope["path"].startswith("/health/"):
            await self.app(scope, receive, send)
            return
        for host in Headers(scope=scope).getlist("host"):
            if not self.allows(host):
                self.rejected("host")
                await error_responses.reply(Request(scope), 421, sentence(host))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def allows(self, host: str) -> bool:
        """Whether this is the value of a Host header of ours."""
        if not (parts := HEADER.fullmatch(host)):
            return False
        name = parts[1].lower().removesuffix(".")
        if not name or is_address(name):
            return True
        return bool(NAME.fullmatch(name)) and ("." not in name or name in self.names or name.endswith(self.endings))


class SameOriginPages:
    """ASGI middleware: 403 for what a page of another site makes a browser send without asking, a form or a body of no
    type. Its sender could not read the answer, but the work would be done. All else a browser asks for first (CORS).

    origins: as parse_origins gives them, whose pages may.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], rejected: Callable[[str], None] = lambda reason: None):
        self.app, self.origins, self.rejected = app, origins, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not self.foreign(scope):
            await self.app(scope, receive, send)
            return
        self.rejected("origin")
        page = Headers(scope=scope).get("origin", "another site")[:80]
        detail = (
            f"a page of {page} may not send this; if it may, start the server with --cors-origins (DSD_CORS_ORIGINS)"
        )
        await error_responses.reply(Request(scope), 403, detail)(scope, receive, send)

    def foreign(self, scope: Scope) -> bool:
        """Whether a page of another origin, which is not allowed, sends this without a preflight request."""
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
