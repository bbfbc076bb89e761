"""Errors -> RFC 9457 problem documents: the one table from DSDError to HTTP status."""

import http
import logging
import math
from collections import Counter
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from dsd_serve.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    DSDError,
    EngineError,
    InputError,
    QueueFullError,
)

log = logging.getLogger(__name__)

STATUS: dict[type[DSDError], int] = {
    InputError: 422,
    QueueFullError: 429,
    EngineError: 500,
    CancelledError: 503,
    ClosedError: 503,
    DeadlineError: 504,
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
MISTAKE = "the server made a mistake; its log has the details"
MEDIA_TYPE = "application/problem+json"


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, detail), status, headers, MEDIA_TYPE)


def body_of(status: int, detail: str) -> dict[str, Any]:
    return {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": detail}


def status_of(error: BaseException) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def document(error: BaseException) -> dict[str, Any]:
    """The problem document of an error that ends an answer which has begun."""
    return body_of(status_of(error), str(error) if isinstance(error, DSDError) else MISTAKE)


def headers_of(error: DSDError) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return {"Retry-After": "5"} if status_of(error) == 503 else {}


def located(error: ValidationError) -> list[Any]:
    """The errors of a model that a route validated itself, as FastAPI reports those of its own."""
    return [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""

    @app.exception_handler(DSDError)
    async def ours(_: Request, error: DSDError) -> JSONResponse:
        return problem(status_of(error), str(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "; ".join(sentence(item) for item in error.errors()))

    @app.exception_handler(HTTPException)
    async def standard(request: Request, error: HTTPException) -> Response:
        detail, headers, path = error.detail, dict(error.headers or {}), request.scope["path"]
        if error.status_code == 404 and detail == "Not Found":
            detail = f"there is no {path[:200]} here; /docs lists what there is"
        elif error.status_code == 405 and detail == "Method Not Allowed":
            headers["Allow"] = ", ".join(methods_of(request))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            detail = f"{path} does not take {request.method[:20]}, only {headers['Allow']}"
        return problem(error.status_code, detail, headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return problem(500, MISTAKE)


def methods_of(request: Request) -> list[str]:
    """The methods that the path of a request takes; the router knows only those of the first of its routes."""
    scopes = ({**request.scope, "method": method} for method in METHODS)
    routes = request.app.router.routes
    taken = [scope["method"] for scope in scopes if any(route.matches(scope)[0] is Match.FULL for route in routes)]
    return [*taken, "OPTIONS"]


def refuse_repeated(request: Request) -> None:
    """Refuse a query string that says the same twice; which one is meant is not known. A dependency of routes."""
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if repeated := [name for name in counts if counts[name] > 1]:
        raise InputError(f"{repeated[0][:80]} is given {counts[repeated[0]]} times in the query string; give it once")


def sentence(item: dict[str, Any]) -> str:
    """One error of pydantic in words, with the place and what was sent."""
    name = str(item["loc"][-1]) if len(item["loc"]) > 1 else "the request"
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] == "extra_forbidden":
        return f"there is no parameter {name!r}; /docs lists them"
    if item["type"] in ("model_attributes_type", "dict_type", "model_type") and len(item["loc"]) < 2:
        return "the body must be a JSON object, with the header content-type: application/json"
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item.get('ctx', {}).get('error', '')}"
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} must be {message}, got {str(item.get('input'))[:80]!r}"
