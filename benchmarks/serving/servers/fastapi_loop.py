"""A minimal server: FastAPI, eager torch, a lock, one request at a time."""

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool

from benchmarks.serving.servers import HOST, engine_of, parser
from benchmarks.serving.workload import program
from dsd_serve.engines import Engine
from dsd_serve.imaging.codec import write_image
from dsd_serve.programs import run


def create_app(engine: Engine) -> FastAPI:
    app = FastAPI()
    lock = asyncio.Lock()

    @app.post("/generate")
    async def generate(body: dict[str, Any]) -> Response:
        async with lock:
            image = await run_in_threadpool(run, engine, program(engine.config, body))
        return Response(write_image(image), media_type="image/png")

    return app


def main() -> None:
    options = parser(__doc__).parse_args()
    engine = engine_of("torch", options.model, options.simulated)
    uvicorn.run(create_app(engine), host=HOST, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
