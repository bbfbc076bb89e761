"""OpenAI-compatible images: the routes under /v1, for clients that are written for OpenAI's API."""

import base64
import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.labels import ImageClass
from dsd_serve.params import OPENAI_NAMES, SamplingParams, from_openai
from dsd_serve.programs import Generate, Task, edit_timesteps
from dsd_serve.rows import Array, Pixels
from server import error_responses
from server.error_responses import OpenAIError
from server.openai_schemas import (
    DrawnImage,
    EditForm,
    ErrorAnswer,
    GenerationRequest,
    ImagesAnswer,
    ModelEntry,
    ModelList,
    Options,
    TokenCounts,
    Usage,
    VariationForm,
)
from server.openapi import events, takes
from server.request_model import RequestModel, use_model
from server.request_reader import Form, media_type, read_form, read_settings
from server.responses import ImageWithSettings, event_stream, settings_headers, texts_memory
from server.router import Router
from server.schemas import SamplingQuery
from server.stream_events import Event, Preview

router = Router(prefix="/v1")

NO_PROMPT = ("", "image")  # what a model without classes takes: clients need not leave out what OpenAI requires

FormOptions = TypeVar("FormOptions", bound=Options)

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "a parameter or image is wrong"},
    404: {"model": ErrorAnswer, "description": "there is no such model"},
    429: {"model": ErrorAnswer, "description": "too much is waiting; see Retry-After"},
    503: {"model": ErrorAnswer, "description": "starting, shutting down, or the engine is dead"},
    "default": {"model": ErrorAnswer, "description": "another error"},
}
EVENT_NAMES = (
    *(f"image_{kind}.{what}" for kind in ("generation", "edit") for what in ("partial_image", "completed")),
    "error",
)
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesAnswer,
        "content": {
            "application/json": {},  # the first, as generated clients take that
            "text/event-stream": events({name: {"type": "object"} for name in EVENT_NAMES}),
        },
        "description": "JSON; with stream: events",
    },
    **ERRORS,
}


def takes_form(model: type[Options], *files: str) -> dict[str, Any]:
    """The documented body of a route that reads a form; the first of the files must be there."""
    schema = model.model_json_schema()
    schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in files}
    schema["required"] = [files[0], *schema.get("required", ())]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "/images/generations", responses=DRAWN, response_class=Response, openapi_extra=takes(json=GenerationRequest)
)
async def generations(request: Request) -> Response:
    """Draw images of the class that the prompt names."""
    query = await read_settings(request, GenerationRequest, openai=True)
    model = await use(request, query.model)
    image_class = prompted(model, query)
    params = with_previews(towards(model, image_class, sampling(model, query), query), query)
    check_answer(model, query)
    tasks = [Generate(model.info.label_of(image_class), p) for p in params]
    return await answer_drawn(request, model, query, image_class, params, tasks, "image_generation")


@router.post(
    "/images/variations",
    responses={**ERRORS, 200: {"model": ImagesAnswer}},
    response_class=Response,
    openapi_extra=takes_form(VariationForm, "image"),
)
async def variations(request: Request) -> Response:
    """Draw an image again, a little differently: it is encoded, noised and denoised, towards no class."""
    model, query, _, params, pixels, _ = await read_upload(request, VariationForm, ("image",))
    tasks = model.info.edits(pixels, None, params, query.strength)
    more = {"strength": query.strength}
    return await answer_drawn(request, model, query, None, params, tasks, "image_variation", more)


@router.post(
    "/images/edits",
    responses=DRAWN,
    response_class=Response,
    openapi_extra=takes_form(EditForm, "image", "mask"),
)
async def edits(request: Request) -> Response:
    """Redraw an image, or where a mask of the same shape is transparent, towards the class that the prompt names."""
    model, query, image_class, params, pixels, mask = await read_upload(request, EditForm, ("image", "mask"))
    params = with_previews(params, query, query.strength)
    tasks = model.info.edits(pixels, image_class, params, query.strength, mask)
    more = {"strength": query.strength}
    return await answer_drawn(request, model, query, image_class, params, tasks, "image_edit", more)


@router.get("/models", responses={"default": ERRORS["default"]})
async def list_models(request: Request) -> ModelList:
    """The models that are served."""
    slots = request.app.state.service.models.slots.values()
    return ModelList(data=[ModelEntry(id=slot.name, created=slot.about.created) for slot in slots])


@router.get("/models/{model:path}", responses={404: ERRORS[404], "default": ERRORS["default"]})
async def retrieve_model(request: Request, model: str) -> ModelEntry:
    """A model that is served, by its name."""
    with unknown_model():
        slot = request.app.state.service.models.find(model)
    return ModelEntry(id=slot.name, created=slot.about.created)


# Reading requests.


async def read_upload(
    request: Request, kind: type[FormOptions], files: Sequence[str]
) -> tuple[RequestModel, FormOptions, ImageClass | None, list[SamplingParams], Pixels, Array | None]:
    """The model and the options of a form, what they stand for, and the pixels of its files. Nothing of its bytes is
    left."""
    if media_type(request.scope) != "multipart/form-data":
        raise OpenAIError(415, f"send a form, as multipart/form-data, with the file field {files[0]}")
    form = await read_form(request, files, tuple(kind.model_fields))
    query = error_responses.validated(kind, {name: text or None for name, text in form.fields.items()}, strict=False)
    model = await use(request, query.model)
    image_class = prompted(model, query) if isinstance(query, GenerationRequest) else None
    params = towards(model, image_class, sampling(model, query), query)
    check_answer(model, query)
    pixels = await uploaded(model, form, "image")
    mask = await transparent(model, form) if "mask" in form.files else None
    return model, query, image_class, params, pixels, mask


async def use(request: Request, name: str | None) -> RequestModel:
    """The model that a request names. Raises OpenAIError if there is none of this name."""
    with unknown_model():
        return await use_model(request, name)


@contextmanager
def unknown_model() -> Iterator[None]:
    """Turn an InputError into OpenAI's error about a model that is not there."""
    try:
        yield
    except InputError as error:
        raise OpenAIError(404, str(error), "model", "model_not_found") from None


def prompted(model: RequestModel, query: GenerationRequest) -> ImageClass | None:
    """The class that `class_id` or the prompt names; None if the model has no classes."""
    prompt, has_classes = query.prompt.strip(), model.config.num_classes > 0
    if query.class_id is not None:
        with about("class_id"):
            return model.info.find_class(query.class_id, "class" if has_classes else "class_id")
    if not has_classes and prompt.casefold() not in NO_PROMPT:
        sentence = f"prompt must be empty or image: this model has no classes, got {shown(prompt)}"
        raise OpenAIError(400, sentence, "prompt")
    with about("prompt", "the prompt must name a class that this model draws; "):
        named = prompt if model.info.table.exactly(prompt) else prompt.removeprefix("class:")
        return model.info.find_class(named) if has_classes else None


def towards(
    model: RequestModel, image_class: ImageClass | None, params: Sequence[SamplingParams], query: Options
) -> list[SamplingParams]:
    """The sampling parameters towards a class, or towards none, where guidance is off."""
    guidance = query.guidance_scale if isinstance(query, GenerationRequest) else None
    with about("guidance_scale"):
        return model.info.towards(image_class, params, guidance, "guidance_scale")


@contextmanager
def about(param: str, prefix: str = "") -> Iterator[None]:
    """Turn an InputError into an OpenAIError that names the parameter."""
    try:
        yield
    except InputError as error:
        raise OpenAIError(400, f"{prefix}{error}", param) from None


def sampling(model: RequestModel, query: Options) -> list[SamplingParams]:
    """Sampling parameters of each image."""
    native = SamplingQuery(n=query.n, size=query.side, **from_openai(query.sampling_values()))
    try:
        params = model.params(native)
    except InputError as error:
        error = error.renamed(OPENAI_NAMES.get(error.param or "", error.param))
        raise OpenAIError(400, str(error), error.param) from None
    with about("size"):
        model.check_fits(query.output_format, 1, query.side)
    return params


def with_previews(
    params: Sequence[SamplingParams], query: GenerationRequest, strength: float | None = None
) -> list[SamplingParams]:
    """Spread the partial images over the steps, never more than requested."""
    every = query.preview_every or 0
    if (most := query.partial_images) is not None:
        steps = params[0].num_steps if strength is None else len(edit_timesteps(params[0].num_steps, strength)) - 1
        every = max(every, math.ceil(steps / (most + 1))) if most else 0
    return [replace(p, preview_every=every) for p in params]


def check_answer(model: RequestModel, query: Options) -> None:
    """Refuse, before anything is drawn, an answer that could not be encoded."""
    count = 1 if isinstance(query, GenerationRequest) and query.stream else query.n
    side = model.side(query.side)
    needed = texts_memory(query.output_format, count, side)
    with about("size"):
        model.encoder.check(needed, f"{count} x {side} x {side} pixels as {query.output_format}")


async def uploaded(model: RequestModel, form: Form, name: str) -> Pixels:
    if not form.files.get(name):
        raise OpenAIError(400, f"{name} is missing; send a PNG, JPEG or WebP as a file of that name", name)
    with about(name):
        return await form.read_image(name, model.decoder, model.config.image_size)


async def transparent(model: RequestModel, form: Form) -> Array:
    """OpenAI's mask: bool [H, W], True where it is transparent."""
    with about("mask"):
        opacity = await form.read_image("mask", model.decoder, model.config.image_size, opacity=True)
    mask: Array = opacity[0] < 128
    if not mask.any():
        raise OpenAIError(400, "the mask must be transparent where to draw, got one that is opaque everywhere", "mask")
    return mask


# Answers.


async def answer_drawn(
    request: Request,
    model: RequestModel,
    query: Options,
    image_class: ImageClass | None,
    params: Sequence[SamplingParams],
    tasks: Sequence[Task],
    kind: str,
    more: Mapping[str, Any] = {},  # never changed
) -> Response:
    """Draw one image for each of `params`, and answer with them or with events named by `kind`."""
    settings = [{**model.info.settings_of(image_class, p), **more} for p in params]
    headers = {"Cache-Control": "no-store", **settings_headers(settings[0])}
    side = query.side or model.config.image_size
    common = {"output_format": query.output_format, "size": f"{side}x{side}", "background": "opaque"}
    encoded = 0 if kind == "image_generation" else 1
    if isinstance(query, GenerationRequest) and query.stream:
        events = model.stream(request, tasks)
        spent = usage_of(model, encoded, 1).model_dump()
        return event_stream(openai_events(request, model, events, query, settings, common, spent, kind), headers)
    done = await model.run(request, tasks)
    images = [ImageWithSettings(pixels, setting) for pixels, setting in zip(done.results, settings, strict=True)]
    needed = texts_memory(query.output_format, len(images), side)

    def make() -> Response:
        data = [
            DrawnImage(b64_json=to_base64(image, query), seed=p.seed, index=p.index)
            for image, p in zip(images, params, strict=True)
        ]
        body = ImagesAnswer(created=created, data=data, **common, usage=usage)
        return JSONResponse(body.model_dump(), headers={**headers, "Server-Timing": done.server_timing})

    created, usage = int(time.time()), usage_of(model, encoded * len(params), len(params))
    response, claim = await model.encoder.run(request, needed, make)
    claim.shrink(len(response.body))
    return response


async def openai_events(
    request: Request,
    model: RequestModel,
    events: AsyncIterator[Event],
    query: Options,
    settings: Sequence[Mapping[str, Any]],
    common: Mapping[str, str],
    usage: Mapping[str, Any],
    kind: str,
) -> AsyncIterator[tuple[str, Any] | None]:
    """Partial images, then the completed image or an error, of each image; `index` says of which."""
    sent = [0] * len(settings)
    encoding = partial(model.encoder.text, request, query.output_format, model.side(query.side))
    async for event in events:
        if event is None:
            yield None
            continue
        setting = settings[event.number]
        values = {"created_at": int(time.time()), "quality": "auto", **common}
        values |= {"seed": setting["seed"], "index": setting["index"]}
        if isinstance(event, Preview):
            name, number = f"{kind}.partial_image", {"partial_image_index": sent[event.number]}
            sent[event.number] += 1
            async with encoding(partial(to_base64, ImageWithSettings(event.pixels, {"preview": True}), query)) as text:
                yield name, {"type": name, "b64_json": text, **number, **values}
        elif (error := event.future.exception()) is not None:
            status, detail = error_responses.status_of(error), error_responses.detail_of(error)
            yield "error", error_responses.openai_body(status, detail)
        else:
            name = f"{kind}.completed"
            async with encoding(partial(to_base64, ImageWithSettings(event.future.result(), setting), query)) as text:
                yield name, {"type": name, "b64_json": text, **values, "usage": usage}


def to_base64(image: ImageWithSettings, query: Options) -> str:
    """The same bytes as the native routes give."""
    quality = codec.QUALITY if query.output_compression is None else query.output_compression
    resized = codec.resized(image.pixels, query.side)
    return base64.b64encode(codec.encode(resized, query.output_format, json.dumps(image.settings), quality)).decode()


def usage_of(model: RequestModel, encoded: int, drawn: int) -> Usage:
    """Of `encoded` images that went in and `drawn` ones that came out."""
    tokens = model.config.latent_shape[0]
    return Usage(
        input_tokens=encoded * tokens,
        input_tokens_details=TokenCounts(image_tokens=encoded * tokens, text_tokens=0),
        output_tokens=drawn * tokens,
        total_tokens=(encoded + drawn) * tokens,
    )
