"""The routes that give pictures and latents. Each parses, builds programs, runs them and encodes the answer."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import PIL
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from dsd_serve import __version__, images
from dsd_serve.errors import InputError
from dsd_serve.labels import ImageClass
from dsd_serve.latents import read_latents, write_latents
from dsd_serve.params import SamplingParams
from dsd_serve.programs import (
    Cost,
    between,
    cost_of,
    decode,
    encode,
    generate,
    reconstruct,
)
from dsd_serve.rows import Array
from dsd_serve.samplers import initial_noise
from server import errors
from server.answers import (
    ANSWERS,
    EVENTS,
    PICTURES,
    Picture,
    answer,
    choose,
    etag_of,
    event_stream,
    is_fresh,
    scaled,
    to_base64,
)
from server.drawing import (
    ProgramsOf,
    described,
    edit_programs,
    find_class,
    generate_programs,
    settings_headers,
)
from server.schemas import (
    EditQuery,
    EncodeQuery,
    End,
    GenerateRequest,
    InterpolateRequest,
    LatentsAnswer,
    PictureQuery,
    PicturesAnswer,
    Problem,
    SamplingQuery,
    WalkQuery,
)
from server.service import Ended, Event, Finished, Preview, Programs, Service
from server.uploads import read_picture, read_uploads, release

router = APIRouter()

OF_AN_END = ("class", "seed", "index")
PREVIEWS = 8  # of a stream whose client does not say how many
LATENTS = {"application/x-npy": "npy", "application/x-safetensors": "safetensors", "application/json": "json"}

BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what, "content": {errors.MEDIA_TYPE: {}}}
    for status, what in {
        406: "no format that the client accepts",
        422: "a parameter, picture or latents are wrong",
        429: "too much is waiting; see Retry-After",
        503: "starting, shutting down, or the engine is dead",
        504: "the result cannot be there before the timeout",
    }.items()
}
UPLOAD_PROBLEMS: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    **{
        status: {"model": Problem, "description": what, "content": {errors.MEDIA_TYPE: {}}}
        for status, what in {
            400: "the connection was closed before the whole body had come",
            408: "the body came too slowly",
            413: "the body is larger than allowed",
            415: "the body is of another kind, or it is compressed",
        }.items()
    },
}


def gives(*media: str, json: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The documented 200 of a route that answers in these media types, or `json` as application/json."""
    return {200: {"model": json, "content": dict.fromkeys(media, BINARY), "description": "see `format`"}}


def takes(*media: str, form: Sequence[str] = (), json: type[BaseModel] | None = None) -> dict[str, Any]:
    """The documented body of a route that reads it itself."""
    content: dict[str, Any] = dict.fromkeys(media, BINARY)
    if form:
        fields = {name: BINARY["schema"] for name in form}
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": fields, "required": [form[0]]}}
    if json is not None:
        content["application/json"] = {"schema": json.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


DRAWN = gives(*PICTURES, "application/zip", "text/event-stream", json=PicturesAnswer)
SHOWN = gives(*PICTURES, "application/zip", json=PicturesAnswer)


@router.get("/generate", responses={**DRAWN, **PROBLEMS, 304: {"description": "not changed"}}, response_class=Response)
async def generate_get(request: Request, query: Annotated[GenerateRequest, Query()]) -> Response:
    """Draw pictures of a class: `curl "localhost:8000/generate?class=207" -o dog.png`.

    n > 1 gives one picture with all of them side by side, or each of them in a zip or in JSON.
    """
    return await draw(request, query)


@router.post("/generate", responses={**DRAWN, **PROBLEMS}, response_class=Response)
async def generate_post(request: Request, query: GenerateRequest) -> Response:
    """The same, with the parameters as JSON."""
    return await draw(request, query)


@router.post(
    "/edit",
    responses={**DRAWN, **UPLOAD_PROBLEMS},
    response_class=Response,
    openapi_extra=takes(*PICTURES, form=("image", "mask")),
)
async def edit_post(request: Request, query: Annotated[EditQuery, Query()]) -> Response:
    """Redraw a picture towards a class: `curl -F image=@dog.jpg "localhost:8000/edit?class=1&strength=0.7" -o out.png`.

    The body is the picture itself, or a form with `image` and, to redraw a part only, `mask`: a picture of the same
    shape, white where to draw. The centre square of both is scaled to the network's size.
    """
    service: Service = request.app.state.service
    params = with_previews(service.params(query), chosen := choose(request, query.format, EVENTS))
    wanted = None if query.class_ is None else find_class(service, query.class_)
    if wanted is None:
        if query.guidance not in (None, 1):
            raise InputError("guidance needs a class to guide to: give class, or leave guidance out")
        params = [replace(p, guidance_scale=1.0) for p in params]
    form = await read_uploads(request, ("image", "mask"))
    size = service.config.image_size
    pixels = await service.decoder.read(form.files["image"], size)
    mask = None
    if "mask" in form.files:
        mask = (await service.decoder.read(form.files["mask"], size)).mean(0) >= 128
    release(request)
    programs = edit_programs(service, pixels, wanted, params, query.strength, mask)
    return await answer_drawn(request, query, chosen, wanted, params, programs, {"strength": query.strength})


@router.post(
    "/interpolate",
    responses={**SHOWN, **UPLOAD_PROBLEMS},
    response_class=Response,
    openapi_extra=takes(form=("from", "to"), json=InterpolateRequest),
)
async def interpolate_post(request: Request) -> Response:
    """Walk in n pictures from one end to the other, side by side, or each of them in a zip or in JSON.

    As JSON `{"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 8}`: between seeds along the great circle of
    their noises, between classes by averaging the clean estimates of both. As a form with the pictures `from` and `to`:
    between their latents; n, format, size and timeout are then in the query string.
    """
    service: Service = request.app.state.service
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await walk_pictures(request, service, errors.validated(WalkQuery, dict(request.query_params)))
    if request.query_params:
        raise InputError("the settings of a walk between classes are in the JSON body, not in the query string")
    return await walk_classes(request, service, errors.validated(InterpolateRequest, await request.body()))


@router.post(
    "/encode",
    responses={**gives("application/x-npy", "application/x-safetensors", json=LatentsAnswer), **UPLOAD_PROBLEMS},
    response_class=Response,
    openapi_extra=takes(*PICTURES, form=("image",)),
)
async def encode_post(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
    """A picture to its latents, float32 [L, C]: `curl --data-binary @dog.jpg localhost:8000/encode -o dog.npy`.

    L tokens in row-major order, C channels of zero mean and unit variance. safetensors has one tensor, `latents`.
    """
    service: Service = request.app.state.service
    chosen = choose(request, query.format, LATENTS)
    pixels = await read_picture(request, service.decoder, service.config.image_size)
    done = await service.run(request, [(encode(pixels), Cost(1, 1))], query.timeout)
    media = next(media for media, name in LATENTS.items() if name == chosen)
    return Response(
        write_latents(done.results[0], chosen), media_type=media, headers={"Server-Timing": done.server_timing}
    )


@router.post(
    "/decode",
    responses={**SHOWN, **UPLOAD_PROBLEMS},
    response_class=Response,
    openapi_extra=takes("application/x-npy", "application/x-safetensors", json=LatentsAnswer),
)
async def decode_post(request: Request, query: Annotated[PictureQuery, Query()]) -> Response:
    """Latents, as /encode gives them, to a picture: `curl --data-binary @dog.npy localhost:8000/decode -o dog.png`."""
    service: Service = request.app.state.service
    chosen = choose(request, query.format, ANSWERS)
    service.check_size(query.size)
    form = await read_uploads(request, ("latents",), media_types=LATENTS)
    z = read_latents(form.files["latents"], service.config.latent_shape)
    done = await service.run(request, [(decode(z), Cost(1, 1))], query.timeout)
    return await answer_shown(service, chosen, query, done)


@router.post(
    "/reconstruct",
    responses={**SHOWN, **UPLOAD_PROBLEMS},
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
    pixels = await read_picture(request, service.decoder, service.config.image_size)
    done = await service.run(request, [(reconstruct(pixels), Cost(2, 2))], query.timeout)
    quality = images.psnr(pixels[None], done.results[0][None])
    return await answer_shown(service, chosen, query, done, {"psnr": round(quality, 2)})


# What the routes have in common.


async def draw(request: Request, query: GenerateRequest) -> Response:
    service: Service = request.app.state.service
    chosen = choose(request, query.format, EVENTS)
    wanted = find_class(service, query.class_)
    params = with_previews(service.params(query), chosen)
    programs = generate_programs(service, wanted, params)
    headers = {"Cache-Control": "no-store", "Vary": "Accept"}
    if query.seed is not None:
        # Not immutable: the model behind an address may be replaced, so caches ask again, which costs no drawing.
        etag = etag_of(
            service.fingerprint,
            service.described,
            __version__,
            PIL.__version__,
            wanted.index,
            [asdict(p) for p in params],
            chosen,
            query.size,
        )
        headers = {"Cache-Control": "no-cache", "Vary": "Accept", "ETag": etag}
        if chosen != "events" and is_fresh(request, etag):
            return Response(status_code=304, headers=headers)
    return await answer_drawn(request, query, chosen, wanted, params, programs, {}, headers)


async def answer_drawn(
    request: Request,
    query: SamplingQuery,
    chosen: str,
    wanted: ImageClass | None,
    params: Sequence[SamplingParams],
    programs: ProgramsOf,
    more: Mapping[str, Any],
    headers: Mapping[str, str] = {},  # never changed
) -> Response:
    """Run programs that draw one picture for each of `params`, and answer with them or with events."""
    service: Service = request.app.state.service
    settings = [{**described(service, wanted, p), **more} for p in params]
    used = {**headers, **settings_headers(settings[0])}
    if chosen == "events":
        events = service.stream(request, programs, query.timeout)
        return event_stream(native_events(events, settings, query.size), used)
    done = await service.run(request, programs(lambda _: None), query.timeout)
    pictures = [Picture(pixels, setting) for pixels, setting in zip(done.results, settings, strict=True)]
    common = {**settings[0], "size": query.size or service.config.image_size}
    return await answer(pictures, chosen, query.size, common, {**used, "Server-Timing": done.server_timing})


async def native_events(
    events: AsyncIterator[Event], settings: Sequence[Mapping[str, Any]], size: int | None
) -> AsyncIterator[tuple[str, Any] | None]:
    """preview, then image or error for each picture, then done."""
    async for event in events:
        if event is None:
            yield None
        elif isinstance(event, Preview):
            setting = settings[event.number]
            shown = Picture(scaled(event.pixels, size), {"preview": True})
            yield (
                "preview",
                {
                    "image": event.number,
                    "step": event.step,
                    "steps": setting["steps"],
                    "base64": to_base64(shown, None),
                },
            )
        elif isinstance(event, Ended) and (error := event.future.exception()) is not None:
            yield "error", {"image": event.number, **errors.document(error)}
        else:
            drawn = Picture(event.future.result(), settings[event.number])
            yield "image", {"image": event.number, **settings[event.number], "base64": to_base64(drawn, size)}
    yield "done", {"images": len(settings), **settings[0]}


def with_previews(params: list[SamplingParams], chosen: str) -> list[SamplingParams]:
    """A stream whose client does not say how often shows some previews; other answers show none, and pay for none."""
    if chosen != "events":
        return [replace(p, preview_every=0) for p in params]
    return [replace(p, preview_every=p.preview_every or -(-p.num_steps // PREVIEWS)) for p in params]


async def answer_shown(
    service: Service, chosen: str, query: PictureQuery, done: Finished, more: Mapping[str, Any] = {}
) -> Response:
    """One picture that was not drawn by sampling."""
    headers = {"Server-Timing": done.server_timing, **{f"X-DSD-{name.upper()}": str(more[name]) for name in more}}
    common = {"size": query.size or service.config.image_size, **more, "model": service.model.name}
    return await answer([Picture(done.results[0], {**more})], chosen, query.size, common, headers)


async def walk_classes(request: Request, service: Service, query: InterpolateRequest) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    params = service.params(query)[0]
    start, end = find_class(service, query.from_.class_), find_class(service, query.to.class_)
    seeds = [end.seed for end in (query.from_, query.to) if end.seed is not None] or [params.seed]
    noises = [noise_of(service, one, one.seed if one.seed is not None else seeds[0]) for one in (query.from_, query.to)]
    fractions = [i / (query.n - 1) for i in range(query.n)]
    programs: Programs = [
        (
            generate(service.config, weights, params, noise=between(noises[0], noises[1], fraction, on_sphere=True)),
            cost_of(params, num_labels=len(weights)),
        )
        for fraction in fractions
        for weights in [mixed(start.index, end.index, fraction)]
    ]
    done = await service.run(request, programs, query.timeout)
    common = {
        "from": {"class": start.index, "seed": query.from_.seed if query.from_.seed is not None else seeds[0]},
        "to": {"class": end.index, "seed": query.to.seed if query.to.seed is not None else seeds[0]},
        **{name: value for name, value in described(service, None, params).items() if name not in OF_AN_END},
    }
    return await answer_walk(service, chosen, query.size, fractions, done, common)


def noise_of(service: Service, end: End, seed: int) -> Array:
    return initial_noise(seed, end.index, service.config.latent_shape)


def mixed(start: int, end: int, fraction: float) -> dict[int, float]:
    """Labels with their weights; at the ends only one of them, which saves the other's rows."""
    if start == end or fraction in (0, 1):
        return {end if fraction == 1 else start: 1.0}
    return {start: 1 - fraction, end: fraction}


async def walk_pictures(request: Request, service: Service, query: WalkQuery) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    service.check_walk(query.n, query.size)
    form = await read_uploads(request, ("from", "to"))
    if "to" not in form.files:
        raise InputError("the form must have two pictures, in the file fields from and to; to is missing")
    ends = [await service.decoder.read(form.files[name], service.config.image_size) for name in ("from", "to")]
    release(request)
    encoded = await service.run(request, [(encode(pixels), Cost(1, 1)) for pixels in ends], query.timeout)
    start, end = encoded.results
    fractions = [i / (query.n - 1) for i in range(query.n)]
    programs: Programs = [
        (decode(between(start, end, fraction, on_sphere=False)), Cost(1, 1)) for fraction in fractions
    ]
    done = await service.run(request, programs, query.timeout)
    return await answer_walk(service, chosen, query.size, fractions, done, {"model": service.model.name})


async def answer_walk(
    service: Service, chosen: str, size: int | None, fractions: Sequence[float], done: Finished, common: dict[str, Any]
) -> Response:
    pictures = [
        Picture(pixels, {**common, "fraction": round(fraction, 6)})
        for pixels, fraction in zip(done.results, fractions, strict=True)
    ]
    common["size"] = size or service.config.image_size
    headers = {"Server-Timing": done.server_timing, "Cache-Control": "no-store"}
    return await answer(pictures, chosen, size, common, headers, columns=len(pictures))
