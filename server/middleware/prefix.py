"""The path under which a reverse proxy shows the server, as /dsd: links that are given to clients begin with it.

Paths inside the application do not have it, whether the proxy strips it or not.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.site import KEY, is_sane, root_path


class RootPath:
    """ASGI middleware, the outermost: sets the prefix of each request. `prefix` is that of --root-path; if it is empty,
    the prefix is that of the header X-Forwarded-Prefix, which the proxy has stripped; an unsafe value is ignored."""

    def __init__(self, app: ASGIApp, prefix: str = "") -> None:
        self.app, self.prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        prefix = self.prefix or forwarded(Headers(scope=scope))
        if prefix:
            scope = {**scope, KEY: prefix}
        if self.prefix and f"{scope['path']}/".startswith(f"{prefix}/"):  # a proxy that does not strip it
            scope["path"] = scope["path"][len(prefix) :] or "/"
        await self.app(scope, receive, send)


def below_prefix(page: ASGIApp) -> ASGIApp:
    """An application that gets its prefix as ASGI defines it: in `root_path`, and at the start of every path."""

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
