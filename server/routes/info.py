"""Routes for information: classes, the model, health, the state of the batcher."""

from typing import Annotated, Any

from fastapi import Depends, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse

from dsd_serve import __version__
from dsd_serve.params import samplers_of, to_recommended
from server import error_responses
from server.answers import ClassImagesAnswer, Defaults, Health, ImageClassAnswer, ModelAnswer, SelfTest
from server.error_responses import refuse_repeated
from server.openapi import BINARY, header, problems
from server.responses import is_fresh
from server.router import Router
from server.schemas import ClassesQuery, ModelQuery
from server.service import Service
from server.site import root_path

router = Router()

OF_A_FILE = {
    "ETag": header("of every byte", type="string", pattern='^"[0-9a-f]{32}"$'),
    "Cache-Control": header("no-cache: caches ask again, and get 304 while it is the same"),
}
OF_A_NAME = {422: "there is no model of this name", 503: "the model cannot be loaded now"}


@router.get(
    "/classes",
    dependencies=[Depends(refuse_repeated)],
    response_model=list[ImageClassAnswer],
    responses=problems(422, words={422: "a parameter is wrong"}),
)
async def classes(request: Request, query: Annotated[ClassesQuery, Query()]) -> Response:
    """The classes that the model can draw, or those that match `q`: `curl "localhost:8000/classes?q=retriever"`."""
    service: Service = request.app.state.service
    table = service.models.find(query.model).about.table
    found = await run_in_threadpool(table.search, query.q, query.trained)
    return JSONResponse([c.to_dict() for c in found])  # not filled one by one: there may be 100,000


@router.get(
    "/classes.webp",
    response_class=Response,
    responses={
        200: {"content": {"image/webp": BINARY}, "description": "WebP", "headers": OF_A_FILE},
        304: {"description": "the client has it: If-None-Match names the ETag", "headers": OF_A_FILE},
        **problems(404, 422, 503, words={404: "dsd-export drew no images of this model's classes", **OF_A_NAME}),
    },
    dependencies=[Depends(refuse_repeated)],
)
async def class_images(request: Request, query: Annotated[ModelQuery, Query()]) -> Response:
    """Images of all classes in one file, drawn by dsd-export: `class_images` of /model describes the grid."""
    service: Service = request.app.state.service
    images = (await service.models.info(query.model, service.settings.max_seconds)).class_images
    if images is None:
        raise HTTPException(404, "this model has no images of its classes; dsd-export --class-images on draws them")
    headers = {"Cache-Control": "no-cache", "ETag": f'"{images.grid.sha256[:32]}"'}
    if is_fresh(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(images.data, headers=headers, media_type="image/webp")


@router.get("/model", dependencies=[Depends(refuse_repeated)], responses=problems(422, 503, words=OF_A_NAME))
async def model(request: Request, query: Annotated[ModelQuery, Query()]) -> ModelAnswer:
    """The model, its recommended settings, its engine, and the limits of this server."""
    service: Service = request.app.state.service
    info = await service.models.info(query.model, service.settings.max_seconds)
    loaded = service.models.find(query.model).served
    config, defaults, settings = info.config, info.defaults, service.settings
    grid = info.class_images.grid if info.class_images else None
    return ModelAnswer(
        name=info.name,
        fingerprint=info.fingerprint,
        version=__version__,
        image_size=config.image_size,
        latent_shape=list(config.latent_shape),
        num_classes=config.num_classes,
        classes=list(config.trained_classes),
        class_images=ClassImagesAnswer(columns=grid.columns, per_class=grid.per_class, sha256=grid.sha256)
        if grid
        else None,
        parameters=config.num_parameters,
        defaults=Defaults(
            **{**to_recommended(defaults), "steps": min(defaults.num_steps, settings.max_steps)},
        ),
        samplers=list(samplers_of(config.flow_map)),
        engine=info.described,
        row_budget=(loaded.backend.budget if loaded else 0) or info.budget,
        self_test=SelfTest(
            batch_invariant=info.invariance.holds,
            rows=info.invariance.num_rows,
            row_counts=list(info.invariance.row_counts),
            max_difference=info.invariance.max_difference,
        ),
        limits={
            "n": settings.max_images,
            "steps": settings.max_steps,
            "size": settings.max_size,
            "body_mb": settings.max_body_mb,
            "megapixels": settings.max_megapixels,
            "waiting": settings.max_waiting,
            "wait_seconds": settings.max_wait,
            "seconds": settings.max_seconds,
        },
    )


@router.get(
    "/model/card",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/markdown": {"schema": {"type": "string"}}}, "description": "Markdown"},
        **problems(404, 422, 503, words={404: "the model directory has no card.md", **OF_A_NAME}),
    },
    dependencies=[Depends(refuse_repeated)],
)
async def model_card(request: Request, query: Annotated[ModelQuery, Query()]) -> Response:
    """The model card: classes, training, and permitted use."""
    service: Service = request.app.state.service
    card = (await service.models.info(query.model, service.settings.max_seconds)).card
    if card is None:
        raise HTTPException(404, "this model has no card; dsd-export writes one as card.md")
    return PlainTextResponse(card, media_type="text/markdown")


@router.get("/health/live", response_model=Health, responses=problems(503, words={503: "the server must be restarted"}))
async def live(request: Request) -> Response:
    """Liveness: the process answers, and the engine works or can be started again."""
    if reason := request.app.state.service.models.given_up:
        return error_responses.problem(503, f"{reason}; this server should be restarted")
    return JSONResponse({"status": "live"})


@router.get("/health", include_in_schema=False)  # the path that other servers have
@router.get("/health/ready", response_model=Health, responses=problems(503, words={503: "not ready"}))
async def ready(request: Request) -> Response:
    """Readiness: the model is loaded, the engine works, and the server is not shutting down."""
    if reason := request.app.state.service.not_ready:
        return error_responses.problem(503, reason, {"Retry-After": "5"})
    return JSONResponse({"status": "ready"})


@router.get("/debug/batcher", dependencies=[Depends(refuse_repeated)], responses=problems(422, words=OF_A_NAME))
async def debug_batcher(request: Request, query: Annotated[ModelQuery, Query()]) -> dict[str, Any]:
    """Running and waiting programs: their numbers, rows left, and age in seconds; of all models, or of one."""
    service: Service = request.app.state.service
    return service.models.snapshot(query.model)


@router.get("/", include_in_schema=False)
async def index(request: Request) -> JSONResponse:
    base = str(request.base_url).rstrip("/") + root_path(request.scope)
    example = request.app.state.service.models.default.about.table.example
    query = f"?class={example.index}" if example else ""
    links = {"try": f"{base}/generate{query}", "docs": f"{base}/docs", "model": f"{base}/model"}
    return JSONResponse(links, headers={"Vary": "Host, X-Forwarded-Prefix"})
