"""The OpenAPI document: answers and bodies of the routes, with the limits and classes of the running server."""

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dsd_serve.backends import ModelInfo
from dsd_serve.params import HEADERS, SETTINGS, samplers_of
from server.answers import DoneEvent, ErrorEvent, ImageEvent, LatentsAnswer, PreviewEvent, Problem
from server.error_responses import MEDIA_TYPE, body_of
from server.middleware.security import needs_no_key
from server.model_slot import Unloaded
from server.openai_schemas import GenerationRequest
from server.openapi_model import adapt, name_samplers
from server.responses import BYTES
from server.router import Router
from server.schemas import GenerateRequest, InterpolateRequest, ReplaceRequest
from server.service import Service
from server.site import root_path

Responses = dict[int | str, dict[str, Any]]

MAX_PREFIXES = 8  # below which the document is kept ready
MANY_CLASSES = 100  # a schema lists no more than these
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
OF_PAGES = {  # ReDoc would load a logo from elsewhere
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; worker-src blob:; frame-ancestors 'self'"
}
EVENTS = "text/event-stream"
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
OF_EVENTS: dict[str, type[BaseModel]] = {
    "preview": PreviewEvent,
    "image": ImageEvent,
    "error": ErrorEvent,
    "done": DoneEvent,
}
ON_THEIR_OWN: tuple[type[BaseModel], ...] = (  # models that FastAPI does not find in the routes' signatures
    *OF_EVENTS.values(),
    *(GenerateRequest, GenerationRequest, InterpolateRequest, LatentsAnswer, Problem, ReplaceRequest),
)

WRONG = {
    400: ("the connection was closed before the whole body had arrived", "the connection was closed too early"),
    401: ("the API key is missing or unknown", "this server needs an API key"),
    403: ("the admin key is missing or wrong", "this needs the admin key; send the header Authorization: Bearer KEY"),
    404: ("not found", "this model has no card; dsd-export writes one as card.md"),
    406: ("no format that the client accepts is available", "this gives image/png; the client accepts only text/html"),
    408: ("the body arrived too slowly", "the body did not arrive within 60 seconds; send it faster"),
    413: ("the body is larger than allowed", "the body is larger than 20 MB, which is the limit of this server"),
    415: ("unsupported type of body", "the body must be JSON, with the header content-type: application/json"),
    422: ("a parameter, the image or the latents are invalid", "steps must be at most 250 on this server, got 100000"),
    429: ("too much is waiting; see Retry-After", "256 images are waiting, this server takes at most 256"),
    500: ("the engine failed, or an internal error", "the engine gave numbers that are not finite"),
    503: ("starting, shutting down, or the engine is dead", "the server is shutting down"),
    504: ("the result cannot be ready before the timeout", "this would take about 9.5 s, more than the timeout of 2 s"),
}
OF_WORK = (406, 422, 429, 500, 503, 504)
OF_BODIES = (400, 408, 413, 415)


def header(description: str, **schema: Any) -> dict[str, Any]:
    return {"description": description, "schema": schema or {"type": "string"}}


RETRY_AFTER = header("seconds after which to try again", type="integer", minimum=1)
SERVER_TIMING = header("milliseconds of waiting and of running: `queue;dur=0.1, network;dur=25.0`; not with events")


def setting_header(name: str) -> dict[str, Any]:
    """The documented header with the value of a sampling setting."""
    setting = SETTINGS[name]
    if setting.choices:
        return header(setting.about, type="string", enum=list(setting.choices))
    return header(
        setting.about, type="integer" if isinstance(setting.default, int) else "number", minimum=setting.least
    )


SETTINGS_HEADERS = {
    "X-DSD-Class": header("index of the class, or none", type="string", pattern="^([0-9]+|none)$"),
    **{name: setting_header(field) for name, field in HEADERS.items()},
    "X-DSD-Model": header("name of the model, percent-encoded"),
    "X-DSD-Fingerprint": header("fingerprint of the model that drew it", type="string", pattern="^[0-9a-f]{64}$"),
}
DRAWN_HEADERS = {name: {**description, "required": True} for name, description in SETTINGS_HEADERS.items()} | {
    "Server-Timing": SERVER_TIMING
}
CACHE_HEADERS = {
    "ETag": header(
        "strong if `self_test` of /model found the same bytes under any load, otherwise weak (W/); "
        "only with a seed, not with events",
        type="string",
        pattern='^(W/)?"[0-9a-f]{32}"$',
    ),
    "Cache-Control": header("no-cache with a seed: caches revalidate, which draws nothing; otherwise no-store"),
    "Vary": header("Accept"),
}
SHOWN_HEADERS = {"Server-Timing": {**SERVER_TIMING, "required": True}}
PSNR_HEADERS = {
    "X-DSD-PSNR": {**header("PSNR of the answer against the network's input, in dB", type="number"), "required": True}
}


def problems(*statuses: int, words: Mapping[int, str] = {}) -> Responses:
    """The documented problem documents of a route; `words` replaces descriptions."""
    return {status: problem(status, words.get(status, WRONG[status][0])) for status in statuses}


def problem(status: int, description: str) -> dict[str, Any]:
    example = body_of(status, WRONG[status][1])
    content = {MEDIA_TYPE: {"schema": reference(Problem), "example": example}}
    headers = {"headers": {"Retry-After": {**RETRY_AFTER, "required": True}}} if status in (429, 503) else {}
    return {"description": description, "content": content, **headers}


def reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def gives(
    *media: str, json: type[BaseModel], headers: Mapping[str, Any] = {}, words: str = "by `format`, else by Accept"
) -> Responses:
    """The documented 200 of a route that answers in these media types, or `json` as application/json.

    In the server's order of preference: generated clients take the first type that they support. Many do not support
    images; they can request the answer as application/octet-stream.
    """
    content: dict[str, Any] = {kind: BINARY for kind in (*media, BYTES) if kind != EVENTS}
    if EVENTS in media:
        content[EVENTS] = events({name: reference(model) for name, model in OF_EVENTS.items()})
    return {200: {"model": json, "content": content, "headers": dict(headers), "description": words}}


def events(schemas: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A stream of server-sent events with these names, and the schema of what each has as its data.

    The schema is that of one event: OpenAPI 3.1 cannot describe the parts of a stream, and tools read it so.
    """
    kinds = [
        {
            "properties": {
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": schema},
            }
        }
        for name, schema in schemas.items()
    ]
    needed = ["id", "event", "data"]
    return {"schema": {"type": "object", "required": needed, "properties": {"id": {"type": "string"}}, "oneOf": kinds}}


def takes(
    *media: str,
    form: Sequence[str] = (),
    json: type[BaseModel] | None = None,
    examples: Mapping[str, Any] = {},
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """The documented body of a route that reads it itself; `optional`: fields of the form that may be absent."""
    content: dict[str, Any] = dict.fromkeys(media, BINARY)
    if form:
        schema = {
            "type": "object",
            "properties": {name: BINARY["schema"] for name in form},
            "required": [name for name in form if name not in optional],
            "additionalProperties": False,
        }
        encoding = {name: {"contentType": "image/png, image/jpeg, image/webp"} for name in form}
        content["multipart/form-data"] = {"schema": schema, "encoding": encoding}
    if json is not None:
        content["application/json"] = {"schema": reference(json)}
        if examples:
            named = {name: {"value": value} for name, value in examples.items()}
            content["application/json"]["examples"] = named
    return {"requestBody": {"required": True, "content": content}}


def install(app: FastAPI, service: Service) -> None:
    """Complete the document that FastAPI writes, again whenever another model is served."""
    derive = app.openapi
    completed: dict[str, Any] = {}
    described: list[ModelInfo | Unloaded] = []

    def openapi() -> dict[str, Any]:
        nonlocal completed, described
        models = [slot.about for slot in service.models.slots.values()]
        if models != described:
            app.openapi_schema = None
        if (document := derive()) is not completed:  # FastAPI keeps its document until routes are added
            complete(document, service)
            completed, described = document, models
        return completed

    app.openapi = openapi  # type: ignore[method-assign]
    add_pages(app)


def add_pages(app: FastAPI) -> None:
    """/openapi.json, and the pages that show it. They load nothing from elsewhere, and name what they load relative to
    themselves, so that they work below any prefix."""
    router = Router()
    files = Path(str(importlib.resources.files("fastapi_offline").joinpath("static")))

    written: dict[str, bytes] = {}  # by prefix
    source: dict[str, Any] = {}

    def document(prefix: str) -> bytes:
        nonlocal source
        if (current := app.openapi()) is not source or len(written) >= MAX_PREFIXES:
            written.clear()
        source = current
        if prefix not in written:
            written[prefix] = bytes(JSONResponse({**current, "servers": [{"url": prefix or "/"}]}).body)
        return written[prefix]

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi_json(request: Request) -> Response:
        headers = {"Vary": "X-Forwarded-Prefix"}
        return Response(document(root_path(request.scope)), headers=headers, media_type="application/json")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},  # which is an external service
        )
        return HTMLResponse(page.body, headers=OF_PAGES)

    @router.get("/redoc", include_in_schema=False)
    async def redoc() -> Response:
        page = get_redoc_html(
            openapi_url="openapi.json",
            title=app.title,
            redoc_js_url="docs/assets/redoc.standalone.js",
            redoc_favicon_url="docs/assets/favicon.png",
            with_google_fonts=False,
        )
        return HTMLResponse(page.body, headers=OF_PAGES)

    app.include_router(router)
    app.mount("/docs/assets", StaticFiles(directory=files))


def complete(document: dict[str, Any], service: Service) -> None:
    """Add the models that routes only refer to, and what is true of this server: its limits, classes and shapes."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _, own = models_json_schema(
        [(model, "validation") for model in ON_THEIR_OWN], ref_template="#/components/schemas/{model}"
    )
    for name, schema in own["$defs"].items():
        schemas.setdefault(name, schema)
    models = [slot.about for slot in service.models.slots.values()]
    adapt(document, models[0].table)
    name_samplers(document, samplers_of(any(one.config.flow_map for one in models)))
    if len({one.config.latent_shape for one in models}) == 1:
        tokens, channels = models[0].config.latent_shape
        rows = schemas[LatentsAnswer.__name__]["properties"]["latents"]
        rows |= {"minItems": tokens, "maxItems": tokens}
        rows["items"] |= {"minItems": channels, "maxItems": channels}
        schemas[LatentsAnswer.__name__]["examples"] = [{"latents": [[0] * channels] * tokens}]
    if service.keys:
        require_keys(document)
    settings = service.settings
    limits = {"n": settings.max_images, "steps": settings.max_steps, "size": settings.max_size}
    for name, schema in inputs(document):
        if name in limits and schema.get("default"):
            schema["default"] = min(schema["default"], limits[name])
        for part in alternatives(schema):
            if name in limits and part.get("type") == "integer":
                part["maximum"] = limits[name]
            if name == "class" and part.get("type") == "integer":
                part |= classes(models)
            if name == "model" and part.get("type") == "string":
                part["enum"] = list(service.models.slots)


def require_keys(document: dict[str, Any]) -> None:
    """Document that every operation except those of /health needs a key, in either of the two headers."""
    document["components"]["securitySchemes"] = SCHEMES
    document["security"] = [{name: []} for name in SCHEMES]
    for path, item in document["paths"].items():
        for operation in item.values():
            if needs_no_key(path):
                operation["security"] = []
            elif "default" not in operation["responses"]:
                operation["responses"]["401"] = problem(401, WRONG[401][0])


def alternatives(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in schema.get("anyOf", ()):
        yield from alternatives(part)
    if "anyOf" not in schema:
        yield schema


def classes(models: Sequence[ModelInfo | Unloaded]) -> dict[str, Any]:
    """The labels that one of the models takes."""
    trained = sorted({label for one in models for label in one.config.trained_classes})
    return {"enum": trained} if len(trained) <= MANY_CLASSES else {"minimum": 0, "maximum": max(trained)}


def inputs(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and schema of everything that requests may set."""
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                yield parameter["name"], parameter["schema"]
    for name in ("GenerateRequest", "InterpolateRequest", "End"):
        yield from document["components"]["schemas"][name]["properties"].items()
