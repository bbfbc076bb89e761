"""While the queue is full, requests for work are refused before anything is parsed.

An answer of 429 must cost little, or many of them would take the CPU from the images that are being drawn.
"""

from collections.abc import Callable, Iterable, Mapping

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import QueueFullError
from server import error_responses


class Shedding:
    """ASGI middleware. 429 before the body is read or anything is parsed.

    routes: those that queue work, by path. A GET that may be answered from what the client has (304), and a HEAD, queue
    none and are let through. queue_full: the error for one more image, or None.
    """

    def __init__(
        self, app: ASGIApp, routes: Mapping[str, APIRoute], queue_full: Callable[[], QueueFullError | None]
    ) -> None:
        self.app, self.routes, self.queue_full = app, routes, queue_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" and queues_work(scope) else None
        if route is not None and (full := self.queue_full()) is not None:
            scope["route"] = route  # as the router sets it, because log and metrics read it
            await error_responses.answer(full, scope, receive, send)
            return
        await self.app(scope, receive, send)


def queues_work(scope: Scope) -> bool:
    if scope["method"] == "GET":
        return not any(name == b"if-none-match" for name, _ in scope["headers"])
    return bool(scope["method"] == "POST")


def install(app: FastAPI, routers: Iterable[APIRouter], queue_full: Callable[[], QueueFullError | None]) -> None:
    """routers: whose POST routes are the work."""
    routes = {
        route.path: route
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    app.add_middleware(Shedding, routes=routes, queue_full=queue_full)
