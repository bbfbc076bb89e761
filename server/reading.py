"""Reading requests: the type of a body, and settings in JSON."""

from typing import Any, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel
from starlette.datastructures import Headers

from dsd_serve.errors import InputError, shown
from dsd_serve.strict_json import read_json
from server import error_responses
from server.request_memory import held_by

NO_OBJECT = "the body must be a JSON object, with the header content-type: application/json"

Model = TypeVar("Model", bound=BaseModel)


def media_type(headers: Headers) -> str:
    """The type of a body, in lower case and without parameters; empty when the header says none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_settings(request: Request, model: type[Model], *, openai: bool = False) -> Model:
    """The settings in a JSON body, in which numbers must be numbers.

    The body must be said to be JSON, which pages of other sites cannot do unasked; otherwise 415, under /v1 400. Only
    there a query string is ignored, as OpenAI's API does.
    """
    kind = media_type(request.headers)
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(400 if openai else 415, f"{NO_OBJECT}, not {shown(kind)}" if kind else NO_OBJECT)
    if request.scope["query_string"] and not openai:
        raise InputError("the settings are in the JSON body here; nothing may be in the query string")
    values: Any = read_json(b"".join([chunk async for chunk in request.stream()]))
    held_by(request.scope).drop("body")
    if not isinstance(values, dict):
        raise InputError(f"{NO_OBJECT}, got {shown(values)}")
    return error_responses.validated(model, values, strict=True)
