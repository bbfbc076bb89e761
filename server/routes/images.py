"""The routes that give pictures and latents. Each parses, makes tasks, has them carried out and encodes the answer."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import PIL
from fastapi import Depends, Query, Request, Response

from dsd_serve import __version__
from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.imaging.latents import read_latents, write_latents
from dsd_serve.labels import ImageClass
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate, Interpolate, Reconstruct, Task, WalkEnd, between
from dsd_serve.rows import Decode, Encode
from server import error_responses
from server.answers import (
    AnyWalkAnswer,
    DecodedAnswer,
    DoneEvent,
    DrawnAnswer,
    EditedAnswer,
    ErrorEvent,
    ImageEvent,
    LatentsAnswer,
    LatentWalkAnswer,
    PreviewEvent,
    ReconstructedAnswer,
    WalkAnswer,
    fill,
)
from server.error_responses import refuse_repeated
from server.openapi import (
    CACHE_HEADERS,
    DRAWN_HEADERS,
    OF_BODIES,
    OF_WORK,
    PSNR_HEADERS,
    SHOWN_HEADERS,
    Responses,
    gives,
    problems,
    takes,
)
from server.request_reader import media_type, read_images, read_settings, read_uploads
from server.responses import (
    ANSWERS,
    EVENTS,
    PICTURES,
    TEXT_KIND,
    Picture,
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
    EncodeQuery,
    GenerateRequest,
    InterpolateRequest,
    PictureQuery,
    SamplingQuery,
    WalkQuery,
)
from server.service import Ended, Event, Finished, Preview, Service

router = Router(dependencies=[Depends(refuse_repeated)])

Walk = TypeVar("Walk", InterpolateRequest, WalkQuery)

OF_AN_END = ("class", "seed", "index")
PREVIEWS = 8  # of a stream whose client does not say how many
LATENTS = {"application/x-npy": "npy", "application/x-safetensors": "safetensors", "application/json": "json"}

EVENT_STREAM = (*PICTURES, "application/zip", "text/event-stream")
FILES = (*PICTURES, "application/zip")
OF_A_CLASS = {
    "a picture": {"class": 207, "seed": 1},
    "four in JSON": {"class": "golden retriever", "n": 4, "format": "json"},
    "quickly": {"class": "n02099601", "steps": 4, "sampler": "dpmpp_2m", "guidance": 1},
    "with previews": {"class": "golden retriever", "format": "events", "preview_every": 2},
}
OF_A_WALK = {
    "between classes": {"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 4},
    "between seeds": {"from": {"class": 207, "seed": 1}, "to": {"class": 207, "seed": 2}, "n": 4, "format": "json"},
}
DRAWN = gives(*EVENT_STREAM, json=DrawnAnswer, headers={**DRAWN_HEADERS, **CACHE_HEADERS})
NOT_CHANGED: Responses = {
    304: {"description": "the client has it: If-None-Match names the ETag", "headers": CACHE_HEADERS}
}


@router.get("/generate", responses={**DRAWN, **NOT_CHANGED, **problems(*OF_WORK)}, response_class=Response)
async def generate_get(request: Request, query: Annotated[GenerateRequest, Query()]) -> Response:
    """Draw pictures of a class: `curl "localhost:8000/generate?class=207" -o dog.png`.

    n > 1 gives one picture with all of them side by side, or each of them in a zip or in JSON. HEAD draws nothing.

    `format=events` is for a browser's EventSource too: it draws once, and the answer to its attempt to go on after the
    end, which has the header Last-Event-ID, is 204 without content. Its own event `error`, of a connection that broke,
    has no data; that of a picture has.
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

    `curl -H "content-type: application/json" -d '{"class": 207}' localhost:8000/generate -o dog.png`; curl's own --json
    also asks for an answer in JSON.
    """
    return await draw(request, await read_settings(request, GenerateRequest))


@router.post(
    "/edit",
    responses={
        **gives(*EVENT_STREAM, json=EditedAnswer, headers=DRAWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*PICTURES, form=("image", "mask"), optional=("mask",)),
)
async def edit_post(request: Request, query: Annotated[EditQuery, Query()]) -> Response:
    """Redraw a picture towards a class: `curl -F image=@dog.jpg "localhost:8000/edit?class=1&strength=0.7" -o out.png`.

    The body is the picture itself, or a form with `image` and, to redraw a part only, `mask`: a picture of the same
    shape, white where to draw. The centre square of both is scaled to the network's size.
    """
    service: Service = request.app.state.service
    params = with_previews(service.params(query), chosen := choose(request, query.format, EVENTS))
    service.check_fits(chosen, query.n, query.size)
    wanted = None if query.class_ is None else service.find_class(query.class_)
    if wanted is None:
        if query.guidance not in (None, 1):
            raise InputError("guidance needs a class to guide to: give class, or leave guidance out")
        params = [replace(p, guidance_scale=1.0) for p in params]
    service.encoder.check_images(chosen, query.n, service.side(query.size))
    sent = await read_images(request, service.decoder, service.config.image_size, ("image", "mask"))
    mask = sent["mask"].mean(0) >= 128 if "mask" in sent else None
    tasks = service.edits(sent["image"], wanted, params, query.strength, mask)
    return await answer_drawn(request, query, chosen, wanted, params, tasks, {"strength": query.strength})


@router.post(
    "/interpolate",
    responses={
        **gives(*FILES, json=AnyWalkAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(form=("from", "to"), json=InterpolateRequest, examples=OF_A_WALK),
)
async def interpolate_post(request: Request) -> Response:
    """Walk in n pictures from one end to the other, side by side, or each of them in a zip or in JSON.

    As JSON `{"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 8}`: between seeds along the great circle of
    their noises, between classes by averaging the clean estimates of both. As a form with the pictures `from` and `to`:
    between their latents, `curl -F from=@dog.jpg -F to=@cat.jpg localhost:8000/interpolate -o walk.png`; n, format,
    size and timeout are then in the query string.
    """
    service: Service = request.app.state.service
    if media_type(request.headers) == "multipart/form-data":
        query = error_responses.validated(WalkQuery, dict(request.query_params), strict=False)
        return await walk_pictures(request, service, within_limit(service, query))
    return await walk_classes(request, service, within_limit(service, await read_settings(request, InterpolateRequest)))


@router.post(
    "/encode",
    responses={
        **gives("application/x-npy", "application/x-safetensors", json=LatentsAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*PICTURES, form=("image",)),
)
async def encode_post(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
    """A picture to its latents, float32 [L, C]: `curl --data-binary @dog.jpg localhost:8000/encode -o dog.npy`.

    L tokens in row-major order, C channels of zero mean and unit variance. safetensors has one tensor, `latents`.
    """
    service: Service = request.app.state.service
    chosen = choose(request, query.format, LATENTS)
    sent = await read_images(request, service.decoder, service.config.image_size)
    done = await service.run(request, [Encode(sent["image"])], query.timeout)
    media = next(media for media, name in LATENTS.items() if name == chosen)
    return Response(
        write_latents(done.results[0], chosen), media_type=media, headers={"Server-Timing": done.server_timing}
    )


@router.post(
    "/decode",
    responses={
        **gives(*FILES, json=DecodedAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes("application/x-npy", "application/x-safetensors", json=LatentsAnswer),
)
async def decode_post(request: Request, query: Annotated[PictureQuery, Query()]) -> Response:
    """Latents, as /encode gives them, to a picture: `curl --data-binary @dog.npy localhost:8000/decode -o dog.png`."""
    service: Service = request.app.state.service
    chosen = choose(request, query.format, ANSWERS)
    service.check_size(query.size)
    service.check_fits(chosen, 1, query.size)
    service.encoder.check_images(chosen, 1, service.side(query.size))
    form = await read_uploads(request, ("latents",), media_types=LATENTS)
    z = form.parse("latents", lambda data: read_latents(data, service.config.latent_shape))
    done = await service.run(request, [Decode(z)], query.timeout)
    return await answer_shown(request, service, chosen, query, done)


@router.post(
    "/reconstruct",
    responses={
        **gives(*FILES, json=ReconstructedAnswer, headers={**SHOWN_HEADERS, **PSNR_HEADERS}),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*PICTURES, form=("image",)),
)
async def reconstruct_post(request: Request, query: Annotated[PictureQuery, Query()]) -> Response:
    """Encode a picture and decode its latents: `curl -F image=@dog.jpg localhost:8000/reconstruct -o out.png`.

    The body is the picture itself or a form with a field `image`. Its centre is scaled to the network's size.
    """
    service: Service = request.app.state.service
    chosen = choose(request, query.format, ANSWERS)
    service.check_size(query.size)
    service.check_fits(chosen, 1, query.size)
    service.encoder.check_images(chosen, 1, service.side(query.size))
    pixels = (await read_images(request, service.decoder, service.config.image_size))["image"]
    done = await service.run(request, [Reconstruct(pixels)], query.timeout)
    quality = codec.psnr(pixels[None], done.results[0][None])
    return await answer_shown(request, service, chosen, query, done, {"psnr": round(quality, 2)})


# What the routes have in common.


async def draw(request: Request, query: GenerateRequest) -> Response:
    service: Service = request.app.state.service
    chosen = choose(request, query.format, EVENTS)
    if chosen == "events" and resumes(request):
        return Response(status_code=204, headers={"Cache-Control": "no-store", "Vary": "Accept"})
    wanted = service.find_class(query.class_)
    params = with_previews(service.params(query), chosen)
    service.check_fits(chosen, query.n, query.size)
    service.encoder.check_images(chosen, query.n, service.side(query.size))
    tasks = [Generate(wanted.index, p) for p in params]
    headers = {"Cache-Control": "no-store", "Vary": "Accept"}
    if query.seed is not None and chosen != "events":
        # Not immutable: the model behind an address may be replaced, so caches ask again, which costs no drawing.
        etag = etag_of(
            service.model.fingerprint,
            service.model.described,
            __version__,
            PIL.__version__,
            wanted.index,
            [asdict(p) for p in params],
            chosen,
            query.size,
        )
        headers = {"Cache-Control": "no-cache", "Vary": "Accept", "ETag": etag}
        if is_fresh(request, etag):
            return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return head(chosen, {**headers, **settings_headers(service.settings_of(wanted, params[0]))})
    return await answer_drawn(request, query, chosen, wanted, params, tasks, {}, headers)


async def answer_drawn(
    request: Request,
    query: SamplingQuery,
    chosen: str,
    wanted: ImageClass | None,
    params: Sequence[SamplingParams],
    tasks: Sequence[Task],
    more: Mapping[str, Any],
    headers: Mapping[str, str] = {},  # never changed
) -> Response:
    """Draw one picture for each of `params`, and answer with them or with events."""
    service: Service = request.app.state.service
    settings = [{**service.settings_of(wanted, p), **more} for p in params]
    used = {**headers, **settings_headers(settings[0])}
    if chosen == "events":
        events = service.stream(request, tasks, query.timeout)
        return event_stream(native_events(request, events, settings, query.size), used)
    done = await service.run(request, tasks, query.timeout)
    pictures = [Picture(pixels, setting) for pixels, setting in zip(done.results, settings, strict=True)]
    common = {**settings[0], "size": query.size or service.config.image_size}
    headers = {**used, "Server-Timing": done.server_timing}
    shape = EditedAnswer if "strength" in more else DrawnAnswer
    return await answer(request, service.encoder, pictures, chosen, query.size, common, headers, shape)


async def native_events(
    request: Request, events: AsyncIterator[Event], settings: Sequence[Mapping[str, Any]], size: int | None
) -> AsyncIterator[tuple[str, Any] | None]:
    """preview, then image or error for each picture, then done."""
    service: Service = request.app.state.service
    encoding = partial(service.encoder.text, request, TEXT_KIND, service.side(size))
    async for event in events:
        if event is None:
            yield None
        elif isinstance(event, Preview):
            steps = settings[event.number]["steps"]
            async with encoding(partial(to_base64, Picture(event.pixels, {"preview": True}), size)) as text:
                values = {"image": event.number, "step": event.step, "steps": steps, "base64": text}
                yield "preview", fill(PreviewEvent, values)
        elif isinstance(event, Ended) and (error := event.future.exception()) is not None:
            yield "error", fill(ErrorEvent, {"image": event.number, **error_responses.document(error)})
        else:
            setting = settings[event.number]
            async with encoding(partial(to_base64, Picture(event.future.result(), setting), size)) as text:
                yield "image", fill(ImageEvent, {"image": event.number, **setting, "base64": text})
    yield "done", fill(DoneEvent, {"images": len(settings), **settings[0]})


def with_previews(params: list[SamplingParams], chosen: str) -> list[SamplingParams]:
    """A stream whose client does not say how often shows some previews; other answers show none, and pay for none."""
    if chosen != "events":
        return [replace(p, preview_every=0) for p in params]
    return [replace(p, preview_every=p.preview_every or -(-p.num_steps // PREVIEWS)) for p in params]


async def answer_shown(
    request: Request, service: Service, chosen: str, query: PictureQuery, done: Finished, more: Mapping[str, Any] = {}
) -> Response:
    """One picture that was not drawn by sampling."""
    headers = {"Server-Timing": done.server_timing, **{f"X-DSD-{name.upper()}": str(more[name]) for name in more}}
    common = {"size": query.size or service.config.image_size, **more, "model": service.model.name}
    shown = [Picture(done.results[0], {**more})]
    shape = ReconstructedAnswer if more else DecodedAnswer
    return await answer(request, service.encoder, shown, chosen, query.size, common, headers, shape)


async def walk_classes(request: Request, service: Service, query: InterpolateRequest) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    params = service.params(query)[0]
    service.check_fits(chosen, query.n, query.size, columns=query.n)
    start = service.find_class(query.from_.class_, "from.class")
    end = service.find_class(query.to.class_, "to.class")
    service.encoder.check_images(chosen, query.n, service.side(query.size), query.n)
    seeds = [end.seed for end in (query.from_, query.to) if end.seed is not None] or [params.seed]
    ends = [
        WalkEnd(wanted.index, seeds[0] if one.seed is None else one.seed, one.index)
        for wanted, one in ((start, query.from_), (end, query.to))
    ]
    fractions = [i / (query.n - 1) for i in range(query.n)]
    walk = [Interpolate(ends[0], ends[1], fraction, params) for fraction in fractions]
    done = await service.run(request, walk, query.timeout)
    common = {
        "from": {"class": start.index, "seed": ends[0].seed},
        "to": {"class": end.index, "seed": ends[1].seed},
        **{name: value for name, value in service.settings_of(None, params).items() if name not in OF_AN_END},
    }
    return await answer_walk(request, service, chosen, query.size, fractions, done, common)


async def walk_pictures(request: Request, service: Service, query: WalkQuery) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    service.check_walk(query.n, query.size)
    service.check_fits(chosen, query.n, query.size, columns=query.n)
    service.encoder.check_images(chosen, query.n, service.side(query.size), query.n)
    sent = await read_images(request, service.decoder, service.config.image_size, ("from", "to"))
    if "to" not in sent:
        raise InputError("the form must have two pictures, in the file fields from and to; to is missing")
    ends = [sent["from"], sent["to"]]
    encoded = await service.run(request, [Encode(pixels) for pixels in ends], query.timeout)
    start, end = encoded.results
    fractions = [i / (query.n - 1) for i in range(query.n)]
    walk = [Decode(between(start, end, fraction, on_sphere=False)) for fraction in fractions]
    done = await service.run(request, walk, query.timeout)
    return await answer_walk(request, service, chosen, query.size, fractions, done, {"model": service.model.name})


async def answer_walk(
    request: Request,
    service: Service,
    chosen: str,
    size: int | None,
    fractions: Sequence[float],
    done: Finished,
    common: dict[str, Any],
) -> Response:
    pictures = [
        Picture(pixels, {**common, "fraction": round(fraction, 6)})
        for pixels, fraction in zip(done.results, fractions, strict=True)
    ]
    common["size"] = size or service.config.image_size
    headers = {"Server-Timing": done.server_timing, "Cache-Control": "no-store"}
    shape = WalkAnswer if "from" in common else LatentWalkAnswer
    return await answer(request, service.encoder, pictures, chosen, size, common, headers, shape, columns=len(pictures))


def head(chosen: str, headers: Mapping[str, str]) -> Response:
    """What a HEAD request gets: the headers that are known before anything is drawn."""
    media = next(media for media, name in EVENTS.items() if name == chosen)
    response = Response(headers=headers, media_type=media)
    del response.headers["content-length"]  # that of the picture is not known
    return response


def within_limit(service: Service, query: Walk) -> Walk:
    """The walk with as many pictures as the server gives, where its client does not say how many."""
    if "n" in query.model_fields_set:
        return query
    return query.model_copy(update={"n": min(query.n, service.settings.max_images)})
