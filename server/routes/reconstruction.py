"""Routes through the autoencoder: /encode, /decode and /reconstruct."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response

from dsd_serve.imaging import codec
from dsd_serve.imaging.latents import read_latents, write_latents
from dsd_serve.programs import Reconstruct
from dsd_serve.rows import Decode, Encode
from server.answers import (
    Answer,
    DecodedAnswer,
    LatentsAnswer,
    ReconstructedAnswer,
)
from server.error_responses import refuse_repeated
from server.openapi import (
    OF_BODIES,
    OF_WORK,
    PSNR_HEADERS,
    SHOWN_HEADERS,
    gives,
    problems,
    takes,
)
from server.request_model import RequestModel, Results, use_model
from server.request_reader import read_file, read_images
from server.responses import (
    ANSWERS,
    FILE_TYPES,
    IMAGE_TYPES,
    ImageWithSettings,
    answer,
    choose,
)
from server.router import Router
from server.schemas import (
    EncodeQuery,
    ImageQuery,
)

router = Router(dependencies=[Depends(refuse_repeated)])

LATENTS = {"application/x-npy": "npy", "application/x-safetensors": "safetensors", "application/json": "json"}


@router.post(
    "/encode",
    responses={
        **gives("application/x-npy", "application/x-safetensors", json=LatentsAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*IMAGE_TYPES, form=("image",)),
)
async def encode_post(request: Request, query: Annotated[EncodeQuery, Query()]) -> Response:
    """Encode an image to latents, float32 [L, C]: `curl --data-binary @dog.jpg localhost:8000/encode -o dog.npy`.

    L tokens in row-major order, C channels of zero mean and unit variance. safetensors has one tensor, `latents`.
    """
    model = await use_model(request, query.model, query.timeout)
    chosen = choose(request, query.format, LATENTS)
    sent = await read_images(request, model.decoder, model.config.image_size)
    done = await model.run(request, [Encode(sent["image"])], query.timeout)
    media = next(media for media, name in LATENTS.items() if name == chosen)
    return Response(
        write_latents(done.results[0], chosen), media_type=media, headers={"Server-Timing": done.server_timing}
    )


@router.post(
    "/decode",
    responses={
        **gives(*FILE_TYPES, json=DecodedAnswer, headers=SHOWN_HEADERS),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes("application/x-npy", "application/x-safetensors", json=LatentsAnswer),
)
async def decode_post(request: Request, query: Annotated[ImageQuery, Query()]) -> Response:
    """Decode latents of /encode to an image: `curl --data-binary @dog.npy localhost:8000/decode -o dog.png`."""
    model = await use_model(request, query.model, query.timeout)
    chosen = choose(request, query.format, ANSWERS)
    model.check_size(query.size)
    model.check_answer(chosen, 1, query.size)
    z = await read_file(request, "latents", LATENTS, lambda data: read_latents(data, model.config.latent_shape))
    done = await model.run(request, [Decode(z)], query.timeout)
    return await answer_shown(request, model, chosen, query, done, DecodedAnswer)


@router.post(
    "/reconstruct",
    responses={
        **gives(*FILE_TYPES, json=ReconstructedAnswer, headers={**SHOWN_HEADERS, **PSNR_HEADERS}),
        **problems(*OF_WORK, *OF_BODIES),
    },
    response_class=Response,
    openapi_extra=takes(*IMAGE_TYPES, form=("image",)),
)
async def reconstruct_post(request: Request, query: Annotated[ImageQuery, Query()]) -> Response:
    """Encode an image and decode its latents: `curl -F image=@dog.jpg localhost:8000/reconstruct -o out.png`.

    The body is the image itself or a form with a field `image`. Its centre is scaled to the network's size.
    """
    model = await use_model(request, query.model, query.timeout)
    chosen = choose(request, query.format, ANSWERS)
    model.check_size(query.size)
    model.check_answer(chosen, 1, query.size)
    pixels = (await read_images(request, model.decoder, model.config.image_size))["image"]
    done = await model.run(request, [Reconstruct(pixels)], query.timeout)
    quality = codec.psnr(pixels[None], done.results[0][None])
    return await answer_shown(request, model, chosen, query, done, ReconstructedAnswer, {"psnr": round(quality, 2)})


async def answer_shown(
    request: Request,
    model: RequestModel,
    chosen: str,
    query: ImageQuery,
    done: Results,
    shape: type[Answer],
    more: Mapping[str, Any] = {},
) -> Response:
    """One image that was not drawn by sampling."""
    headers = {"Server-Timing": done.server_timing, **{f"X-DSD-{name.upper()}": str(more[name]) for name in more}}
    common = {"size": query.size or model.config.image_size, **more, "model": model.info.name}
    shown = [ImageWithSettings(done.results[0], {**more})]
    return await answer(request, model.encoder, shown, chosen, query.size, common, headers, shape)
