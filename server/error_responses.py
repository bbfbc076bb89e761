"""Errors -> RFC 9457 problem documents (under /v1 OpenAI's): the one table from DSDError to HTTP status."""

import http
import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
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
    rule_of,
    shown,
)
from server import router
from server.answers import Problem, fill
from server.openai_schemas import ErrorAnswer, ErrorDetail
from server.router import OPENAI_PREFIX

log = logging.getLogger(__name__)

STATUS: dict[type[DSDError], int] = {
    InputError: 422,
    QueueFullError: 429,
    EngineError: 500,
    CancelledError: 503,
    ClosedError: 503,
    DeadlineError: 504,
}
INTERNAL_ERROR = "internal error; see the server log"
MEDIA_TYPE = "application/problem+json"
MAX_PARAMETERS = 100  # in a query string; no request has half as many
MAX_SENTENCES = 5
RULES = {  # where pydantic's words do not read well after "must be"
    "bool_parsing": "a valid boolean, true or false",
    "bool_type": "a valid boolean, true or false",
    "model_type": "a JSON object",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "string_unicode": "a valid string of Unicode",
}

OPENAI_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
OPENAI_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
OPENAI_ROUTES = "/v1/images/generations, /v1/images/variations, /v1/images/edits and /v1/models"
OPENAI_ONLY = (
    "chat",
    "completions",
    "embeddings",
    "responses",
    "audio",
    "moderations",
    "files",
)  # first segments of OpenAI's paths that are missing here
NOT_RETRIED = (500, 504)  # the same request would fail again, or run for as long again: clients must not repeat it

request_id: ContextVar[str] = ContextVar("request_id", default="")

Model = TypeVar("Model", bound=BaseModel)


def reply(
    request: Request,
    status: int,
    detail: str,
    headers: dict[str, str] | None = None,
    param: str | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error in the form that the clients of this path read. param, code: only OpenAI's have them."""
    if is_openai(request.scope["path"]):
        return openai_error(status, detail, headers, param, code)
    return problem(status, detail, headers)


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(body_of(status, detail), status, headers, MEDIA_TYPE)


def body_of(status: int, detail: str) -> dict[str, Any]:
    body = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": detail}
    if number := request_id.get():
        body["request_id"] = number
    return fill(Problem, body)


def status_of(error: BaseException) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def document(error: BaseException) -> dict[str, Any]:
    """The problem document of an error that ends an answer which has begun."""
    return body_of(status_of(error), detail_of(error))


def detail_of(error: BaseException) -> str:
    """The sentence for the client. It does not describe bugs of the server."""
    return str(error) if isinstance(error, DSDError) else INTERNAL_ERROR


def headers_of(error: DSDError) -> dict[str, str]:
    if isinstance(error, QueueFullError):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, ClosedError):
        return {"Retry-After": "5", "Connection": "close"}  # a new connection may find another server
    return {"Retry-After": "5"} if status_of(error) == 503 else {}


def validated(model: type[Model], values: dict[str, Any], *, strict: bool) -> Model:
    """A model from values that a route has read itself: plain ones of a form, or with `strict` those of JSON, in which
    numbers must be numbers.

    Errors are those of FastAPI's own parameters.
    """
    try:
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        items = error.errors(include_url=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in items]) from None


class OpenAIError(HTTPException):
    """An error of a route under /v1, with the parameter that is wrong."""

    def __init__(self, status: int, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, detail)
        self.param, self.code = param, code


def is_openai(path: str) -> bool:
    """True for the paths of the OpenAI-compatible routes."""
    return path == OPENAI_PREFIX or path.startswith(f"{OPENAI_PREFIX}/")


def openai_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = OPENAI_TYPES.get(status, "invalid_request_error")
    detail = ErrorDetail(message=message, type=kind, param=param, code=code or OPENAI_CODES.get(status))
    return ErrorAnswer(error=detail).model_dump()


def openai_error(
    status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """A 422 becomes 400, as in OpenAI's API. `x-should-retry` is for its clients, which retry every 5xx by default."""
    status = 400 if status == 422 else status
    more = {"x-should-retry": "false"} if status in NOT_RETRIED else {}
    return JSONResponse(openai_body(status, message, param, code), status, {**more, **(headers or {})})


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document, or under /v1 as OpenAI does."""

    @app.exception_handler(DSDError)
    async def ours(request: Request, error: DSDError) -> JSONResponse:
        request.state.error = error
        return reply(request, status_of(error), str(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        items = error.errors()
        return reply(request, 422, sentences(items), param=param_of(items[0]))

    @app.exception_handler(HTTPException)
    async def standard(request: Request, error: HTTPException) -> Response:
        detail, headers, path = error.detail, dict(error.headers or {}), request.scope["path"]
        if error.status_code == 404 and detail == "Not Found":
            return nothing_here(request)
        if error.status_code == 405 and detail == "Method Not Allowed":
            headers["Allow"] = ", ".join(router.methods_of(request.scope, path))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            detail = f"{cut(path)} does not take {cut(request.method)}, only {headers['Allow']}"
        param, code = (error.param, error.code) if isinstance(error, OpenAIError) else (None, None)
        return reply(request, error.status_code, detail, headers, param, code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return reply(request, 500, INTERNAL_ERROR)


async def answer(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Send what the app's handlers make of an error: for middleware, which stands outside of them."""
    handlers = scope["app"].exception_handlers
    handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
    response = await handler(Request(scope), error)
    await response(scope, receive, send)


def param_of(item: dict[str, Any]) -> str | None:
    """The parameter that an error of pydantic is about; None for the whole body, or a name that cannot be sent."""
    name = item["loc"][1] if len(item["loc"]) > 1 else None
    return name if isinstance(name, str) and name.isprintable() and cut(name) == name else None


def nothing_here(request: Request) -> Response:
    """The answer for a path without a route: a redirect where only a slash is too many, else 404 with what was meant.

    The redirect is relative, so that it names no host and stays below the prefix of a proxy.
    """
    path, scope = request.scope["path"], request.scope
    plain = path.rstrip("/")
    if plain and plain != path and router.template(scope, plain):
        query = f"?{request.url.query}" if request.url.query else ""
        up = "../" * (len(path) - len(plain))
        return Response(status_code=307, headers={"Location": f"{up}{quote(plain.rpartition('/')[2])}{query}"})
    detail = f"there is no {cut(path)} here"
    if meant := router.near(scope, path):
        base = ""
        if is_openai(meant) and not path.startswith(f"{OPENAI_PREFIX}/images"):
            base = f" The base URL of an OpenAI client is the address of this server and {OPENAI_PREFIX}."
        answer = openai_error if is_openai(meant) else problem
        return answer(404, f"{detail}; did you mean {meant}?{base}")
    if is_openai(path) or path.split("/")[1] in OPENAI_ONLY:
        return openai_error(404, f"{detail}; of OpenAI's API this server has {OPENAI_ROUTES}")
    return problem(404, f"{detail}; /docs lists what there is")


async def refuse_repeated(request: Request) -> None:
    """Reject a query string that repeats a parameter, because it is ambiguous, or that has too many of them.

    A dependency of routes, so it comes before their parameters are read; asynchronous, because FastAPI runs the others
    in a thread, which costs more than this does.
    """
    given = request.scope["query_string"].count(b"&") + 1
    if given > MAX_PARAMETERS:
        raise InputError(f"the query string must have at most {MAX_PARAMETERS} parameters, got {given:,}")
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if repeated := [name for name in counts if counts[name] > 1]:
        raise InputError(f"{cut(repeated[0])} is given {counts[repeated[0]]} times in the query string; give it once")


def cut(text: str) -> str:
    """A text of any length in a sentence: at most 80 characters, and quoted where it is not plain."""
    return text if len(text) <= 80 and text.isprintable() else shown(text)


def sentences(items: Sequence[dict[str, Any]]) -> str:
    """Errors of pydantic as text."""
    parts = [sentence(item) for item in items[:MAX_SENTENCES]]
    if len(items) > MAX_SENTENCES:
        parts.append(f"and {len(items) - MAX_SENTENCES:,} more errors")
    return "; ".join(parts)


def sentence(item: dict[str, Any]) -> str:
    """One error of pydantic as text, with its place and the value that was sent."""
    *places, name = (cut(str(part)) for part in item["loc"][1:]) if len(item["loc"]) > 1 else ("the request",)
    whole = ".".join([*places, name])
    if item["type"] == "missing":
        return f"{whole} is missing"
    if item["type"] == "extra_forbidden":
        place = f" in {'.'.join(places)}" if places else ""
        return f"there is no parameter {shown(item['loc'][-1])}{place}; /docs lists them"
    return f"{whole} must be {rule_of(item, RULES)}, got {shown(item.get('input'))}"
