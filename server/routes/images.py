"""Routes that draw images of a class: /generate and /edit."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import PIL
from fastapi import Depends, Query, Request, Response

from dsd_serve import __version__
from dsd_serve.labels import ImageClass
from dsd_serve.params import SamplingParams, to_fields
from dsd_serve.programs import Generate, Task
from server import error_responses
from server.answers import (
    Answer,
    DoneEvent,
    DrawnAnswer,
    EditedAnswer,
    ErrorEvent,
    ImageEvent,
    PreviewEvent,
    fill,
)
from server.error_responses import refuse_repeated
from server.openapi import (
    CACHE_HEADERS,
    DRAWN_HEADERS,
    OF_BODIES,
    OF_WORK,
    Responses,
    gives,
    problems,
    takes,
)
from server.request_model import RequestModel, use_model
from server.request_reader import read_images, read_settings
from server.responses import (
    EVENTS,
    FILE_TYPES,
    IMAGE_TYPES,
    TEXT_KIND,
    ImageWithSettings,
    answer,
    choose,
    etag_of,
    event_stream,
    is_fresh,
    resumes,
    settings_headers,
    to_base64,
)
from server.router import Router
from server.schemas import (
    EditQuery,
    GenerateRequest,
    SamplingQuery,
)
from server.stream_events import Done, Event, Preview

router = Router(dependencies=[Depends(refuse_repeated)])

PREVIEWS = 8  # of a stream, by default

EVENT_STREAM = (*FILE_TYPES, "text/event-stream")
OF_A_CLASS = {
    "an image": {"class": 207, "seed": 1},
    "four in JSON": {"class": "golden retriever", "n": 4, "format": "json"},
    "quickly": {"class": "n02099601", "steps": 4, "sampler": "dpmpp_2m", "guidance": 1},
    "with previews": {"class": "golden retriever", "format": "events", "preview_every": 2},
}
DRAWN = gives(*EVENT_STREAM, json=DrawnAnswer, headers={**DRAWN_HEADERS, **CACHE_HEADERS})
NOT_CHANGED: Responses = {
    304: {"description": "the client has it: If-None-Match names the ETag", "headers": CACHE_HEADERS}
}


@router.get("/generate", responses={**DRAWN, **NOT_CHANGED, **problems(*OF_WORK)}, response_class=Response)
async def generate_get(request: Request, query: Annotated[GenerateRequest, Query()]) -> Response:
    """Draw images of a class: `curl "localhost:8000/generate?class=207" -o dog.png`.

    With n > 1 the images are side by side in one file, or separate in a zip or in JSON. HEAD draws nothing.

    `format=events` also works with a browser's EventSource: when it reconnects after the end, with the header
    Last-Event-ID, the answer is 204 and nothing is drawn. EventSource's own event `error`, for a broken connection, has
    no data; the event `error` of an image has.
    """
    return await draw(request, query)


@router.post(
    "/generate",
    responses={**DRAWN, **problems(*OF_WORK, *OF_BODIES)},
    response_class=Response,
    openapi_extra=takes(json=GenerateRequest, examples=OF_A_CLASS),
)
async def generate_post(request: Request) -> Response:
    """The same, with the parameters as JSON.

    `curl -H "content-type: application/json" -d '{"class": 207}' localhost:8000/generate -o dog.png`; with curl's
    --json the answer is JSON too.
    """
    return await draw(request, await read_settings(request, GenerateRequest))


@router.post(
    "/edit",
    responses={
        **gives(*EVENT_STREAM, json=EditedAnswer, headers=DRAWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*IMAGE_TYPES, form=("image", "mask"), optional=("mask",)),
)
async def edit_post(request: Request, query: Annotated[EditQuery, Query()]) -> Response:
    """Redraw an image towards a class: `curl -F image=@dog.jpg "localhost:8000/edit?class=1&strength=0.7" -o out.png`.

    The body is the image itself, or a form with `image` and, to redraw a part only, `mask`: an image of the same
    shape, white where it is redrawn. The centre square of both is scaled to the network's size.
    """
    model = await use_model(request, query.model, query.timeout)
    params = with_previews(model.params(query), chosen := choose(request, query.format, EVENTS))
    model.check_fits(chosen, query.n, query.size)
    image_class = model.class_of(query)
    params = model.info.towards(image_class, params, query.guidance)
    model.encoder.check_images(chosen, query.n, model.side(query.size))
    sent = await read_images(request, model.decoder, model.config.image_size, ("image", "mask"))
    mask = sent["mask"].mean(0) >= 128 if "mask" in sent else None
    tasks = model.info.edits(sent["image"], image_class, params, query.strength, mask)
    return await answer_drawn(
        request, model, query, chosen, image_class, params, tasks, EditedAnswer, {"strength": query.strength}
    )


async def draw(request: Request, query: GenerateRequest) -> Response:
    chosen = choose(request, query.format, EVENTS)
    if chosen == "events" and resumes(request):
        return Response(status_code=204, headers={"Cache-Control": "no-store", "Vary": "Accept"})
    model = await use_model(request, query.model, query.timeout)
    image_class = model.class_of(query)
    params = with_previews(model.params(query), chosen)
    params = model.info.towards(image_class, params, query.guidance)
    model.check_answer(chosen, query.n, query.size)
    tasks = [Generate(model.info.label_of(image_class), p) for p in params]
    headers = {"Cache-Control": "no-store", "Vary": "Accept"}
    if query.seed is not None and chosen != "events":
        # Not immutable: the model behind an address may be replaced, so caches revalidate, which draws nothing.
        etag = etag_of(
            model.info.name,
            model.info.fingerprint,
            model.info.described,
            __version__,
            PIL.__version__,
            model.info.label_of(image_class),
            [to_fields(p) for p in params],
            chosen,
            query.size,
            weak=not model.info.invariance.holds,
        )
        headers = {"Cache-Control": "no-cache", "Vary": "Accept", "ETag": etag}
        if is_fresh(request, etag):
            return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return head(chosen, {**headers, **settings_headers(model.info.settings_of(image_class, params[0]))})
    return await answer_drawn(request, model, query, chosen, image_class, params, tasks, DrawnAnswer, {}, headers)


async def answer_drawn(
    request: Request,
    model: RequestModel,
    query: SamplingQuery,
    chosen: str,
    image_class: ImageClass | None,
    params: Sequence[SamplingParams],
    tasks: Sequence[Task],
    shape: type[Answer],
    more: Mapping[str, Any],
    headers: Mapping[str, str] = {},  # never changed
) -> Response:
    """Draw one image for each of `params`, and answer with them or with events."""
    settings = [{**model.info.settings_of(image_class, p), **more} for p in params]
    used = {**headers, **settings_headers(settings[0])}
    if chosen == "events":
        events = model.stream(request, tasks, query.timeout)
        return event_stream(native_events(request, model, events, settings, query.size), used)
    done = await model.run(request, tasks, query.timeout)
    images = [ImageWithSettings(pixels, setting) for pixels, setting in zip(done.results, settings, strict=True)]
    common = {**settings[0], "size": query.size or model.config.image_size}
    headers = {**used, "Server-Timing": done.server_timing}
    return await answer(request, model.encoder, images, chosen, query.size, common, headers, shape)


async def native_events(
    request: Request,
    model: RequestModel,
    events: AsyncIterator[Event],
    settings: Sequence[Mapping[str, Any]],
    size: int | None,
) -> AsyncIterator[tuple[str, Any] | None]:
    """preview, then image or error for each image, then done."""
    encoding = partial(model.encoder.text, request, TEXT_KIND, model.side(size))
    async for event in events:
        if event is None:
            yield None
        elif isinstance(event, Preview):
            steps = settings[event.number]["steps"]
            async with encoding(partial(to_base64, ImageWithSettings(event.pixels, {"preview": True}), size)) as text:
                values = {"image": event.number, "step": event.step, "steps": steps, "base64": text}
                yield "preview", fill(PreviewEvent, values)
        elif isinstance(event, Done) and (error := event.future.exception()) is not None:
            yield "error", fill(ErrorEvent, {"image": event.number, **error_responses.document(error)})
        else:
            setting = settings[event.number]
            async with encoding(partial(to_base64, ImageWithSettings(event.future.result(), setting), size)) as text:
                yield "image", fill(ImageEvent, {"image": event.number, **setting, "base64": text})
    yield "done", fill(DoneEvent, {"images": len(settings), **settings[0]})


def with_previews(params: list[SamplingParams], chosen: str) -> list[SamplingParams]:
    """A stream shows some previews by default; other answers have none, at no cost."""
    if chosen != "events":
        return [replace(p, preview_every=0) for p in params]
    return [replace(p, preview_every=p.preview_every or -(-p.num_steps // PREVIEWS)) for p in params]


def head(chosen: str, headers: Mapping[str, str]) -> Response:
    """The answer to HEAD: the headers that are known before anything is drawn."""
    media = next(media for media, name in EVENTS.items() if name == chosen)
    response = Response(headers=headers, media_type=media)
    del response.headers["content-length"]  # that of the image is not known
    return response
