"""The routes of an application: a router whose GET routes take HEAD too, and which routes a path belongs to."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.routing import iter_route_contexts
from starlette.types import Scope

OPENAI_PREFIX = "/v1"  # of the routes whose clients are OpenAI's
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class Router(APIRouter):
    """Adds HEAD to every GET, with the same answer but its body; a route may look at request.method."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().add_api_route(path, endpoint, **options)
        if "GET" in (options.get("methods") or ["GET"]):
            super().add_api_route(path, endpoint, **{**options, "methods": ["HEAD"], "include_in_schema": False})


def templates(scope: Scope, path: str) -> dict[str, set[str]]:
    """The templates of the application's routes that take this path, as /v1/models/{model}, with their methods."""
    found: dict[str, set[str]] = {}
    for route in iter_route_contexts(scope["app"].routes):
        pattern = getattr(route, "path_regex", None)
        if pattern is not None and pattern.match(path):
            found.setdefault(str(route.path), set()).update(getattr(route, "methods", None) or ())
    return found


def template(scope: Scope, path: str) -> str | None:
    """The template of the first route that takes this path; None without one."""
    return next(iter(templates(scope, path)), None)


def methods_of(scope: Scope, path: str) -> list[str]:
    """The methods of all routes of a path; Starlette reports only those of the first."""
    taken = set().union(*templates(scope, path).values())
    return [*(method for method in METHODS if method in taken), "OPTIONS"]


def near(scope: Scope, path: str) -> str | None:
    """The existing path that was probably meant: with /v1 or without a second one, in lower case, without extra
    slashes; None if there is none."""
    plain = "/" + "/".join(part for part in path[:200].split("/") if part)
    for text in (plain, plain.lower()):
        again = text.find(f"{OPENAI_PREFIX}/", 1)  # as in /v1/v1/models or /api/v1/models
        for one in (text, OPENAI_PREFIX + text, text.removeprefix(OPENAI_PREFIX), text[again:] if again > 0 else ""):
            if one not in ("", "/", path) and template(scope, one):
                return one
    return None
