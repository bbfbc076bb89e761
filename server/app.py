"""The HTTP application: routes, and nothing else. The work is done by programs in the batcher."""

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from dsd_serve import __version__, images, labels
from dsd_serve.batcher import Batcher, Job
from dsd_serve.checkpoint import ModelDir, read_model_dir
from dsd_serve.engines import Engine, load_engine
from dsd_serve.errors import InputError
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import Program, generate, reconstruct
from dsd_serve.rows import Pixels
from server import errors
from server.schemas import (
    ClassesQuery,
    GenerateAnswer,
    GenerateRequest,
    Health,
    ImageClassAnswer,
    ModelAnswer,
    Problem,
    ReconstructAnswer,
    ReconstructQuery,
)
from server.settings import Settings
from server.uploads import read_upload

log = logging.getLogger(__name__)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what, "content": {errors.MEDIA_TYPE: {}}}
    for status, what in {
        406: "no format that the client accepts",
        413: "the body is larger than allowed",
        422: "a parameter or picture is wrong",
        429: "too many images are waiting; see Retry-After",
        503: "starting, shutting down, or the engine is dead",
    }.items()
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
FORMATS = {media: name for name, media in images.MEDIA_TYPES.items()} | {"application/json": "json"}


class Service:
    """What routes share: the model directory, the batcher and the settings.

    engine: runs the rows in place of the engine that the settings name; for benchmarks.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.model: ModelDir = read_model_dir(settings.model)
        engine = engine or load_engine(settings.engine, settings.model, settings.device, settings.threads)
        self.config = engine.config
        self.batcher = Batcher(engine, budget=settings.row_budget, max_waiting=settings.max_waiting)
        self.fingerprint = self.model.fingerprint()
        log.info("%s on %s, %d rows a tick", self.model.name, engine.describe(), self.batcher.budget)

    async def run(self, request: Request, programs: Sequence[tuple[Program, int]]) -> list[Any]:
        """Run programs of one request; cancelled when its client goes away."""
        jobs = self.batcher.submit_all(programs)
        watcher = asyncio.create_task(cancel_on_disconnect(request, jobs))
        try:
            return await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            watcher.cancel()
            for job in jobs:
                job.cancel()  # does nothing to those that are done

    def params(self, query: GenerateRequest) -> list[SamplingParams]:
        """Sampling parameters of each picture; raises InputError above a limit."""
        defaults, limits = self.model.defaults, self.settings
        steps = defaults.num_steps if query.steps is None else query.steps
        at_most("n", query.n, limits.max_images)
        at_most("steps", steps, limits.max_steps)
        at_most("size", query.size or 1, limits.max_size)
        seed = secrets.randbelow(2**32) if query.seed is None else query.seed
        return [
            SamplingParams(
                seed=seed,
                index=query.index + i,
                num_steps=steps,
                sampler=defaults.sampler if query.sampler is None else query.sampler,
                guidance_scale=defaults.guidance_scale if query.guidance is None else query.guidance,
            )
            for i in range(query.n)
        ]


async def cancel_on_disconnect(request: Request, jobs: Sequence[Job]) -> None:
    """Cancel the jobs when the client closes the connection: they end before the batcher's next tick."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancel()


def pictures_or(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The documented answers of a route that gives a picture, or `model` as JSON."""
    content = dict.fromkeys(images.MEDIA_TYPES.values(), BINARY)
    return {200: {"model": model, "content": content, "description": "the picture"}, **PROBLEMS}


def at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise InputError(f"{name} must be at most {limit} on this server, got {value}")


def create_app(service: Service) -> FastAPI:
    """The application around a service that is ready; its batcher is closed at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.close, service.settings.grace)

    app = FastAPI(
        title="DSD",
        version=__version__,
        summary="Images from a single network: generate, reconstruct.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    errors.install(app)
    add_image_routes(app)
    add_information_routes(app)
    return app


def add_image_routes(app: FastAPI) -> None:
    @app.get("/generate", responses=pictures_or(GenerateAnswer), response_class=Response)
    async def generate_get(request: Request, query: Annotated[GenerateRequest, Query()]) -> Response:
        """Draw pictures of a class: `curl "localhost:8000/generate?class=207" -o dog.png`.

        n > 1 gives one picture with all of them side by side, or all of them in JSON.
        """
        return await draw(request, query)

    @app.post("/generate", responses=pictures_or(GenerateAnswer), response_class=Response)
    async def generate_post(request: Request, query: GenerateRequest) -> Response:
        """The same, with the parameters as JSON."""
        return await draw(request, query)

    @app.post(
        "/reconstruct",
        responses=pictures_or(ReconstructAnswer),
        response_class=Response,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    **dict.fromkeys(images.MEDIA_TYPES.values(), BINARY),
                    "multipart/form-data": {"schema": {"type": "object", "properties": {"image": BINARY["schema"]}}},
                },
            }
        },
    )
    async def reconstruct_post(request: Request, query: Annotated[ReconstructQuery, Query()]) -> Response:
        """Encode a picture and decode its latents: `curl -F image=@dog.jpg localhost:8000/reconstruct -o out.png`.

        The body is the picture itself or a form with a field `image`. Its centre is scaled to the network's size.
        """
        return await redraw(request, query)


async def draw(request: Request, query: GenerateRequest) -> Response:
    service: Service = request.app.state.service
    chosen = choose_format(request, query.format)
    wanted = labels.resolve(str(query.class_), service.config.trained_classes)
    params = service.params(query)
    began = time.perf_counter()
    programs = [(generate(service.config, wanted.index, p), cost(p)) for p in params]
    pictures: list[Pixels] = await service.run(request, programs)
    network_ms = 1000 * (time.perf_counter() - began)
    first = params[0]
    headers = {
        "X-DSD-Seed": str(first.seed),
        "X-DSD-Class": str(wanted.index),
        "X-DSD-Steps": str(first.num_steps),
        "X-DSD-Sampler": first.sampler,
        "X-DSD-Guidance": f"{first.guidance_scale:g}",
        "Server-Timing": f"batcher;dur={network_ms:.1f}",
    }
    size = query.size or service.config.image_size
    if chosen == "json":
        encoded = await run_in_threadpool(lambda: [to_base64(picture, query.size) for picture in pictures])
        answer = {
            "class": {"index": wanted.index, "wnid": wanted.wnid, "name": wanted.name},
            "seed": first.seed,
            "steps": first.num_steps,
            "sampler": first.sampler,
            "guidance": first.guidance_scale,
            "size": size,
            "images": [{"index": p.index, "base64": text} for p, text in zip(params, encoded, strict=True)],
        }
        return JSONResponse(answer, headers=headers)
    sheet = pictures[0] if len(pictures) == 1 else images.grid([scaled(picture, query.size) for picture in pictures])
    body = await run_in_threadpool(
        lambda: images.write_image(scaled(sheet, query.size if len(pictures) == 1 else None), chosen)
    )
    return Response(body, media_type=images.MEDIA_TYPES[chosen], headers=headers)


async def redraw(request: Request, query: ReconstructQuery) -> Response:
    service: Service = request.app.state.service
    settings = service.settings
    chosen = choose_format(request, query.format)
    at_most("size", query.size or 1, settings.max_size)
    data = await read_upload(request, int(settings.max_body_mb * 1e6))
    max_pixels = int(settings.max_megapixels * 1e6)
    pixels = await run_in_threadpool(lambda: images.fit(images.read_image(data, max_pixels), service.config.image_size))
    (decoded,) = await service.run(request, [(reconstruct(pixels), 2)])
    quality = images.psnr(pixels[None], decoded[None])
    if chosen == "json":
        text = await run_in_threadpool(to_base64, decoded, query.size)
        return JSONResponse({"size": query.size or service.config.image_size, "psnr": quality, "base64": text})
    body = await run_in_threadpool(lambda: images.write_image(scaled(decoded, query.size), chosen))
    return Response(body, media_type=images.MEDIA_TYPES[chosen], headers={"X-DSD-PSNR": f"{quality:.2f}"})


def cost(params: SamplingParams) -> int:
    """Rows that a picture takes."""
    evaluations = 2 * params.num_steps - 1 if params.sampler == "heun" else params.num_steps
    return evaluations * (1 if params.guidance_scale == 1 else 2) + 1


def scaled(picture: Pixels, size: int | None) -> Pixels:
    return picture if size is None or size == picture.shape[-1] else images.resize(picture, size)


def to_base64(picture: Pixels, size: int | None) -> str:
    return base64.b64encode(images.write_image(scaled(picture, size))).decode()


def choose_format(request: Request, asked: str | None) -> str:
    """The format of the answer: what the parameter asks for, else the client's best-liked of ours, else png.

    Raises 406 when the client accepts none of ours.
    """
    if asked is not None:
        return asked
    accept = request.headers.get("accept", "*/*")
    liked: list[tuple[float, str]] = []
    for entry in accept.split(","):
        media, *rest = (part.strip() for part in entry.split(";"))
        quality = 1.0
        for part in rest:
            if part.startswith("q="):
                with contextlib.suppress(ValueError):
                    quality = float(part[2:])
        matching = [name for ours, name in FORMATS.items() if media in (ours, "*/*", ours.split("/")[0] + "/*")]
        if matching and quality > 0:
            liked.append((quality, matching[0]))
    if not liked:
        raise HTTPException(406, f"this gives {', '.join(FORMATS)}; the client accepts only {accept[:200]}")
    return max(liked, key=lambda item: item[0])[1]


def add_information_routes(app: FastAPI) -> None:
    @app.get("/classes", responses={422: PROBLEMS[422]})
    async def classes(request: Request, query: Annotated[ClassesQuery, Query()]) -> list[ImageClassAnswer]:
        """The classes that the model can draw, or those among them that match `q`."""
        among = request.app.state.service.config.trained_classes if query.trained else None
        return [ImageClassAnswer(index=c.index, wnid=c.wnid, name=c.name) for c in labels.search(query.q, among)]

    @app.get("/model")
    async def model(request: Request) -> ModelAnswer:
        """What is served, how it is best sampled, what runs it, and the limits of this server."""
        service: Service = request.app.state.service
        config, defaults, settings = service.config, service.model.defaults, service.settings
        return ModelAnswer(
            name=service.model.name,
            fingerprint=service.fingerprint,
            version=__version__,
            image_size=config.image_size,
            latent_shape=list(config.latent_shape),
            num_classes=config.num_classes,
            classes=list(config.trained_classes),
            defaults={"steps": defaults.num_steps, "sampler": defaults.sampler, "guidance": defaults.guidance_scale},
            samplers=list(SAMPLER_NAMES),
            engine={key: str(value) for key, value in service.batcher.engine.describe().items()},
            row_budget=service.batcher.budget,
            limits={
                "n": settings.max_images,
                "steps": settings.max_steps,
                "size": settings.max_size,
                "body_mb": settings.max_body_mb,
                "megapixels": settings.max_megapixels,
                "waiting": settings.max_waiting,
            },
        )

    @app.get("/health/live")
    async def live() -> Health:
        """The process answers."""
        return Health(status="live")

    @app.get("/health/ready", responses={503: PROBLEMS[503]})
    async def ready(request: Request) -> Response:
        """Requests will be served: the model is loaded, the engine works, the server is not shutting down."""
        batcher: Batcher = request.app.state.service.batcher
        if batcher.ready:
            return JSONResponse({"status": "ready"})
        return errors.problem(503, batcher.dead or "the server is shutting down", {"Retry-After": "5"})

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> JSONResponse:
        base = str(request.base_url).rstrip("/")
        return JSONResponse({"try": f"{base}/generate?class=207", "docs": f"{base}/docs", "model": f"{base}/model"})
