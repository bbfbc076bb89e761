"""Errors -> RFC 9457 problem documents: the one table from DSDError to HTTP status."""

import http
import logging
import math
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

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
MISTAKE = "the server made a mistake; its log has the details"
MEDIA_TYPE = "application/problem+json"

request_id: ContextVar[str] = ContextVar("request_id", default="")


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, detail), status, headers, MEDIA_TYPE)


def body_of(status: int, detail: str) -> dict[str, Any]:
    body = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": detail}
    if number := request_id.get():
        body["request_id"] = number
    return body


def status_of(error: BaseException) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def document(error: BaseException) -> dict[str, Any]:
    """The problem document of an error that ends an answer which has begun."""
    return body_of(status_of(error), str(error) if isinstance(error, DSDError) else MISTAKE)


def headers_of(error: DSDError) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, ClosedError):
        return {"Retry-After": "5", "Connection": "close"}  # a new connection may find another server
    return {"Retry-After": "5"} if status_of(error) == 503 else {}


def located(error: ValidationError) -> list[Any]:
    """The errors of a model that a route validated itself, as FastAPI reports those of its own."""
    return [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""

    @app.exception_handler(DSDError)
    async def ours(request: Request, error: DSDError) -> JSONResponse:
        request.state.error = error
        return problem(status_of(error), str(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "; ".join(sentence(item) for item in error.errors()))

    @app.exception_handler(HTTPException)
    async def standard(request: Request, error: HTTPException) -> JSONResponse:
        detail = error.detail
        if error.status_code == 404 and detail == "Not Found":
            detail = f"there is no {request.url.path} here; /docs lists what there is"
        elif error.status_code == 405 and detail == "Method Not Allowed":
            detail = f"{request.url.path} does not take {request.method}"
        return problem(error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return problem(500, MISTAKE)


async def answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Send what the app's handlers make of an error: for middleware, which stands outside of them."""
    handlers = scope["app"].exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    response = await handler(Request(scope), error)
    await response(scope, receive, send)


def sentence(item: dict[str, Any]) -> str:
    """One error of pydantic in words, with the place and what was sent."""
    name = str(item["loc"][-1]) if len(item["loc"]) > 1 else "the request"
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] == "extra_forbidden":
        return f"there is no parameter {name!r}; /docs lists them"
    if item["type"] in ("model_attributes_type", "dict_type"):
        return "the body must be a JSON object, with the header content-type: application/json"
    if item["type"] == "json_invalid":
        return f"the body is not valid JSON: {item.get('ctx', {}).get('error', '')}"
    message = item["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} must be {message}, got {str(item.get('input'))[:80]!r}"
