"""The HTTP application: service, middleware and routes."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from dsd_serve import __version__
from server import error_responses, openapi, ui_mount
from server.middleware import drain, request_id, security, shedding
from server.middleware.body_limits import BodyLimits
from server.middleware.prefix import RootPath
from server.routes import admin, checkpoints, images, info, openai, reconstruction, walks
from server.service import Service
from server.site import parse_hosts, parse_prefix
from server.telemetry import logs, metrics

ROUTERS = (images.router, walks.router, reconstruction.router, openai.router, info.router)


def create_app(service: Service) -> FastAPI:
    """The application around a service that is ready; its batcher is closed at shutdown."""

    contexts: list[Callable[[FastAPI], contextlib.AbstractAsyncContextManager[Any]]] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for open_ in contexts:
                await stack.enter_async_context(open_(app))
            yield
        await run_in_threadpool(service.close, service.settings.grace)

    app = FastAPI(
        title="DSD",
        version=__version__,
        summary="Images from a single network: generate, edit, interpolate, encode, decode.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
        redirect_slashes=False,  # error_responses.py redirects without naming a host
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their functions
        openapi_url=None,  # openapi.py serves it, and /docs
        telemetry=service.traces.config(),
    )
    app.state.service = service
    error_responses.install(app)
    app.add_middleware(BodyLimits, settings=service.settings, memory=service.uploads)
    shedding.install(app, ROUTERS, service.models.queue_full)
    install_operations(app, service)
    for router in ROUTERS:
        app.include_router(router)
    if service.admin_key is not None:
        app.include_router(admin.router)
    if service.run is not None:
        app.include_router(checkpoints.router)
    openapi.install(app, service)
    if service.settings.ui:
        ui_mount.install(app, service, contexts.append)
    return app


def install_operations(app: FastAPI, service: Service) -> None:
    """Middleware, from the innermost to the outermost, and /metrics."""
    counters = service.metrics
    drain.install(app, service.drain, counters.rejected)
    security.install(
        app,
        keys=service.keys,
        origins=service.origins,
        hosts=[*parse_hosts(service.settings.allowed_hosts), service.settings.host],
        used=lambda name: counters.key_requests.labels(name).inc(),
        rejected=counters.rejected,
    )
    request_id.install(app, logs.access_line, counters.answered)
    counters.watch_memory(
        {
            "uploads": lambda: service.uploads.total,
            "decode": lambda: service.decoder.memory.total,
            "encode": lambda: service.encoder.memory.total,
        },
    )
    if not service.is_worker:
        counters.watch_backend(service.models, lambda: service.drain.draining)
    metrics.install(app, counters)
    app.add_middleware(RootPath, prefix=parse_prefix(service.settings.root_path))
