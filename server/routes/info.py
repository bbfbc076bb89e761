"""Routes for information: classes, the model, health, the state of the batcher."""

from typing import Annotated, Any

from fastapi import Depends, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from dsd_serve import __version__
from dsd_serve.params import SAMPLER_NAMES, to_recommended
from server import error_responses
from server.answers import Defaults, Health, ImageClassAnswer, ModelAnswer, SelfTest
from server.error_responses import refuse_repeated
from server.openapi import problems
from server.router import Router
from server.schemas import ClassesQuery
from server.service import Service
from server.site import root_path

router = Router()


@router.get(
    "/classes",
    dependencies=[Depends(refuse_repeated)],
    response_model=list[ImageClassAnswer],
    responses=problems(422, words={422: "a parameter is wrong"}),
)
def classes(request: Request, query: Annotated[ClassesQuery, Query()]) -> Response:
    """The classes that the model can draw, or those that match `q`: `curl "localhost:8000/classes?q=retriever"`."""
    found = request.app.state.service.model.table.search(query.q, query.trained)
    return JSONResponse([c.to_dict() for c in found])  # not filled one by one: there may be 100,000


@router.get("/model")
async def model(request: Request) -> ModelAnswer:
    """The model, its recommended settings, its engine, and the limits of this server."""
    service: Service = request.app.state.service
    config, defaults, settings = service.config, service.model.defaults, service.settings
    return ModelAnswer(
        name=service.model.name,
        fingerprint=service.model.fingerprint,
        version=__version__,
        image_size=config.image_size,
        latent_shape=list(config.latent_shape),
        num_classes=config.num_classes,
        classes=list(config.trained_classes),
        defaults=Defaults(
            **{**to_recommended(defaults), "steps": min(defaults.num_steps, settings.max_steps)},
        ),
        samplers=list(SAMPLER_NAMES),
        engine=service.model.described,
        row_budget=service.backend.budget or service.model.budget,
        self_test=SelfTest(
            batch_invariant=service.model.invariance.holds,
            rows=service.model.invariance.num_rows,
            row_counts=list(service.model.invariance.row_counts),
            max_difference=service.model.invariance.max_difference,
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
        **problems(404, words={404: "the model directory has no card.md"}),
    },
)
def model_card(request: Request) -> Response:
    """The model card: classes, training, and permitted use."""
    card: str | None = request.app.state.service.model.card
    if card is None:
        raise HTTPException(404, "this model has no card; dsd-export writes one as card.md")
    return PlainTextResponse(card, media_type="text/markdown")


@router.get("/health/live", response_model=Health, responses=problems(503, words={503: "to be started again"}))
async def live(request: Request) -> Response:
    """Liveness: the process answers, and the engine works or can be started again."""
    if reason := request.app.state.service.backend.given_up:
        return error_responses.problem(503, f"{reason}; this server should be restarted")
    return JSONResponse({"status": "live"})


@router.get("/health/ready", response_model=Health, responses=problems(503, words={503: "not ready"}))
async def ready(request: Request) -> Response:
    """Readiness: the model is loaded, the engine works, and the server is not shutting down."""
    if reason := request.app.state.service.backend.not_ready:
        return error_responses.problem(503, reason, {"Retry-After": "5"})
    return JSONResponse({"status": "ready"})


@router.get("/debug/batcher")
async def debug_batcher(request: Request) -> dict[str, Any]:
    """Running and waiting programs: their numbers, rows left, and age in seconds."""
    return request.app.state.service.backend.snapshot()


@router.get("/", include_in_schema=False)
async def index(request: Request) -> JSONResponse:
    base = str(request.base_url).rstrip("/") + root_path(request.scope)
    example = request.app.state.service.model.table.example
    query = f"?class={example.index}" if example else ""
    links = {"try": f"{base}/generate{query}", "docs": f"{base}/docs", "model": f"{base}/model"}
    return JSONResponse(links, headers={"Vary": "Host, X-Forwarded-Prefix"})
