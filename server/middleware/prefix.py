"""The path under which a reverse proxy shows the server, as /dsd: links that are given to clients begin with it.

Inside the application paths are without it, whether the proxy takes it off or not.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.site import KEY, is_sane, root_path


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
