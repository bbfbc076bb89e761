"""The route that walks from one image to another: /interpolate."""

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Depends, Request, Response

from dsd_serve.errors import InputError
from dsd_serve.programs import Interpolate, WalkEnd, between, walk_fractions
from dsd_serve.rows import Decode, Encode
from server import error_responses
from server.answers import (
    Answer,
    AnyWalkAnswer,
    LatentWalkAnswer,
    WalkAnswer,
)
from server.error_responses import refuse_repeated
from server.openapi import (
    OF_BODIES,
    OF_WORK,
    SHOWN_HEADERS,
    gives,
    problems,
    takes,
)
from server.request_model import RequestModel, Results, use_model
from server.request_reader import media_type, read_images, read_settings
from server.responses import (
    ANSWERS,
    FILE_TYPES,
    ImageWithSettings,
    answer,
    choose,
)
from server.router import Router
from server.schemas import (
    InterpolateRequest,
    WalkQuery,
)

router = Router(dependencies=[Depends(refuse_repeated)])

Walk = TypeVar("Walk", InterpolateRequest, WalkQuery)

OF_A_WALK = {
    "between classes": {"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 4},
    "between seeds": {"from": {"class": 207, "seed": 1}, "to": {"class": 207, "seed": 2}, "n": 4, "format": "json"},
}


@router.post(
    "/interpolate",
    responses={
        **gives(*FILE_TYPES, json=AnyWalkAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(form=("from", "to"), json=InterpolateRequest, examples=OF_A_WALK),
)
async def interpolate_post(request: Request) -> Response:
    """Draw n images from one end to the other: side by side in one file, or separate in a zip or in JSON.

    As JSON `{"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 8}`: between seeds along the great circle of
    their noises, between classes by averaging the clean estimates of both. As a form with the images `from` and `to`:
    between their latents, `curl -F from=@dog.jpg -F to=@cat.jpg localhost:8000/interpolate -o walk.png`; n, format,
    size and timeout are then in the query string.
    """
    if media_type(request.scope) == "multipart/form-data":
        query = error_responses.validated(WalkQuery, dict(request.query_params), strict=False)
        model = await use_model(request, query.model, query.timeout)
        return await walk_images(request, model, within_limit(model, query))
    settings = await read_settings(request, InterpolateRequest)
    model = await use_model(request, settings.model, settings.timeout)
    return await walk_classes(request, model, within_limit(model, settings))


async def walk_classes(request: Request, model: RequestModel, query: InterpolateRequest) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    params = model.params(query)[0]
    model.check_fits(chosen, query.n, query.size, columns=query.n)
    start, end = model.class_of(query.from_, "from.class"), model.class_of(query.to, "to.class")
    (params,) = model.info.towards(start, [params], query.guidance)
    model.encoder.check_images(chosen, query.n, model.side(query.size), query.n)
    seeds = [end.seed for end in (query.from_, query.to) if end.seed is not None] or [params.seed]
    ends = [
        WalkEnd(model.info.label_of(image_class), seeds[0] if one.seed is None else one.seed, one.index)
        for image_class, one in ((start, query.from_), (end, query.to))
    ]
    fractions = walk_fractions(query.n)
    walk = [Interpolate(ends[0], ends[1], fraction, params) for fraction in fractions]
    done = await model.run(request, walk, query.timeout)
    common = model.info.walk_settings_of(ends[0], ends[1], params)
    return await answer_walk(request, model, chosen, query.size, fractions, done, common, WalkAnswer)


async def walk_images(request: Request, model: RequestModel, query: WalkQuery) -> Response:
    chosen = choose(request, query.format, ANSWERS)
    model.check_walk(query.n, query.size)
    model.check_answer(chosen, query.n, query.size, columns=query.n)
    sent = await read_images(request, model.decoder, model.config.image_size, ("from", "to"))
    if "to" not in sent:
        raise InputError("the form has no file in the field to; this needs two images, curl -F from=@FILE -F to=@FILE")
    ends = [sent["from"], sent["to"]]
    encoded = await model.run(request, [Encode(pixels) for pixels in ends], query.timeout)
    start, end = encoded.results
    fractions = walk_fractions(query.n)
    walk = [Decode(between(start, end, fraction, on_sphere=False)) for fraction in fractions]
    done = await model.run(request, walk, query.timeout)
    return await answer_walk(
        request, model, chosen, query.size, fractions, done, {"model": model.info.name}, LatentWalkAnswer
    )


async def answer_walk(
    request: Request,
    model: RequestModel,
    chosen: str,
    size: int | None,
    fractions: Sequence[float],
    done: Results,
    common: dict[str, Any],
    shape: type[Answer],
) -> Response:
    images = [
        ImageWithSettings(pixels, {**common, "fraction": round(fraction, 6)})
        for pixels, fraction in zip(done.results, fractions, strict=True)
    ]
    common["size"] = size or model.config.image_size
    headers = {"Server-Timing": done.server_timing, "Cache-Control": "no-store"}
    return await answer(request, model.encoder, images, chosen, size, common, headers, shape, columns=len(images))


def within_limit(model: RequestModel, query: Walk) -> Walk:
    """The walk, whose default number of images is lowered to the server's limit."""
    if "n" in query.model_fields_set:
        return query
    return query.model_copy(update={"n": min(query.n, model.settings.max_images)})
