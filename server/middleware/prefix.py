"""The path under which a reverse proxy shows the server, as /dsd: links that are given to clients begin with it.

Inside the application paths are without it, whether the proxy takes it off or not.
"""

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import ConfigError

KEY = "dsd.root_path"
SEGMENT = r"/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+"
PREFIX = re.compile(f"({SEGMENT})+")
LONGEST = 200


def parse_prefix(text: str) -> str:
    """The prefix of --root-path, empty for none. Raises ConfigError."""
    prefix = text.strip().rstrip("/")
    if prefix and not is_sane(prefix):
        raise ConfigError(
            f"root_path must be a path like /dsd, of letters, digits and ._~- between slashes, got {text[:80]!r}"
        )
    return prefix


def is_sane(prefix: str) -> bool:
    """Whether a link may begin with this: a path, and neither another host nor a way up."""
    return len(prefix) <= LONGEST and bool(PREFIX.fullmatch(prefix))


def root_path(scope: Scope) -> str:
    """What links of this request must begin with, as /dsd; empty where the server is at the root."""
    return str(scope.get(KEY, ""))


class RootPath:
    """ASGI middleware, the outermost: notes the prefix of each request. `prefix` is that of --root-path; where it is
    empty the proxy may say it in X-Forwarded-Prefix, having taken it off; a value that is not sane is ignored."""

    def __init__(self, app: ASGIApp, prefix: str = "") -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        prefix = self.prefix or forwarded(Headers(scope=scope))
        if prefix:
            scope = {**scope, KEY: prefix}
        if self.prefix and f"{scope['path']}/".startswith(f"{prefix}/"):  # a proxy that leaves it on
            scope["path"] = scope["path"][len(prefix) :] or "/"
        await self.app(scope, receive, send)


def below_prefix(page: ASGIApp) -> ASGIApp:
    """An application that is told its prefix as ASGI has it: in `root_path`, and at the beginning of every path."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = root_path(scope)
            scope = {**scope, "root_path": prefix, "path": prefix + scope["path"]}
        await page(scope, receive, send)

    return call


def forwarded(headers: Headers) -> str:
    values = headers.getlist("x-forwarded-prefix")
    prefix = values[0].strip().rstrip("/") if len(values) == 1 else ""
    return prefix if is_sane(prefix) else ""
