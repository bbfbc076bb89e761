"""The HTTP application: puts the service and the routes together."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from dsd_serve import __version__
from server import documentation, errors, image_routes, info_routes
from server.service import Service


def create_app(service: Service) -> FastAPI:
    """The application around a service that is ready; its batcher is closed at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.batcher.close, service.settings.grace)

    app = FastAPI(
        title="DSD",
        version=__version__,
        summary="Images from a single network: generate, edit, interpolate, encode, decode.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    errors.install(app)
    app.include_router(image_routes.router)
    app.include_router(info_routes.router)
    documentation.install(app, service)
    return app
