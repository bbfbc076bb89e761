"""Errors as OpenAI's API sends them, for the paths under /v1: their clients read this body and these headers."""

from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
PREFIX = "/v1"
HERE = "/v1/images/generations, /v1/images/variations, /v1/images/edits and /v1/models"
ELSEWHERE = ("chat", "completions", "embeddings", "responses", "audio", "moderations", "files")  # what OpenAI has
IN_VAIN = (500, 504)  # the same request would fail again, or run for as long again: clients must not repeat it


class Refused(HTTPException):
    """An error of a route under /v1, with the parameter that is wrong."""

    def __init__(self, status: int, detail: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, detail)
        self.param, self.code = param, code


def applies(path: str) -> bool:
    """Whether the clients of this path are OpenAI's."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def answer(
    status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None, code: str | None = None
) -> JSONResponse:
    """What is 422 elsewhere is 400 here. `x-should-retry` tells the clients, which repeat every 5xx by themselves."""
    status = 400 if status == 422 else status
    more = {"x-should-retry": "false"} if status in IN_VAIN else {}
    return JSONResponse(body_of(status, message, param, code), status, {**more, **(headers or {})})
