"""The page as an ASGI application: Gradio's routes, and two of ours that are asked often and need no events."""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import DSDError, ServerError
from dsd_serve.imaging.codec import read_image, resize, write_image
from dsd_serve.imaging.decoding import Decoder
from ui import guard, visitors
from ui.inputs import shortened
from ui.page import build_page
from ui.private_files import Uploads
from ui.server_info import Known
from ui.theme import THEME

# What a server that has the page beside its API leaves to it: the first part of the path.
PATHS = frozenset(
    ("", "assets", "config", "favicon.ico", "gradio_api", "login", "logout", "manifest.json", "pwa_icon", "robots.txt",
     "static", "studio", "svelte", "theme.css")
)  # fmt: skip
FRESH = 1.0  # seconds for which what the server said of itself is told to everybody
THUMBNAIL = {"seed": 1, "n": 1}
THUMBNAIL_SIZE = 128
AT_A_TIME = 2  # thumbnails under way: the server has other clients
MOST_WAITING = 100  # thumbnails: some pages of them
KEPT = 1000  # thumbnails of some 20 KB


def create_page(
    client: AsyncClient, address: Callable[[gr.Request], str] | None = None, decoder: Decoder | None = None
) -> FastAPI:
    """The page for the server of `client`, which need not be up yet.

    address: under which a visitor reaches that server; the client's where it is left out. decoder: of visitors' photos,
    where there is one whose budget the page should share. `app.state.stop` is an
    asyncio.Event that ends the streams of all visitors, so that whoever serves the page can end.
    """

    uploads = Uploads()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with uploads.sweeping():
            yield
        await client.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    add_routes(app, client)
    blocks = build_page(Known(client, decoder or Decoder()), address or (lambda _: client.url), uploads)
    files = resources.files("ui")
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=THEME,
        css=files.joinpath("style.css").read_text("utf-8"),
        head=f"<script>{files.joinpath('script.js').read_text('utf-8')}</script>",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        app_kwargs={"max_body_size": visitors.BODY},
    )
    blocks.has_launched = True  # Gradio checks paths, after us, only when it has; a mounted page never does by itself
    visitors.install(blocks, app.routes[-1].app)  # type: ignore[attr-defined]
    guard.install(app, uploads)
    app.state.stop = app.routes[-1].app.stop_event  # type: ignore[attr-defined]
    return app


def add_routes(app: FastAPI, client: AsyncClient) -> None:
    state = State(client)
    thumbnails = Thumbnails(client)

    @app.get("/studio/state")
    async def state_now() -> JSONResponse:
        return JSONResponse(await state.now(), headers={"Cache-Control": "no-store"})

    @app.get("/studio/class/{index}.png")
    async def thumbnail(index: int) -> Response:
        try:
            png = await thumbnails.of(index)
        except ServerError as error:
            status = 404 if error.status == 404 else 503
            return Response(str(error), status, {"Cache-Control": "no-store"}, "text/plain")
        return Response(png, headers={"Cache-Control": "max-age=3600"}, media_type="image/png")


class State:
    """What the server does now. However many pages ask, the server is asked once in FRESH seconds."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.lock = asyncio.Lock()
        self.asked = -FRESH
        self.rows = 0
        self.body_mb = 0.0  # the largest upload; 0 until the server has said it
        self.told: dict[str, Any] = {}

    async def now(self) -> dict[str, Any]:
        async with self.lock:
            if (passed := time.monotonic() - self.asked) >= FRESH:
                self.told = await self.ask(passed)
                self.asked = time.monotonic()
            return self.told

    async def ask(self, passed: float) -> dict[str, Any]:
        try:
            found = await self.client.do(calls.batcher())
            self.body_mb = self.body_mb or (await self.client.do(calls.model()))["limits"]["body_mb"]
        except DSDError as error:
            self.body_mb = 0.0  # another server may come
            return {"up": False, "sentence": str(error)}
        if found["not_ready"]:
            return {"up": False, "sentence": str(found["not_ready"])}
        rows, self.rows = found["rows"] - self.rows, found["rows"]
        return {
            "up": True,
            "body_mb": self.body_mb,
            "running": len(found["running"]),
            "waiting": len(found["waiting"]),
            "seconds_ahead": found["seconds_ahead"],
            "row_ms": found["row_ms"],
            "rows_per_s": round(max(rows, 0) / passed, 1) if self.asked > 0 and passed < 10 else None,
        }


class Thumbnails:
    """An image of each class of the model that is served now, drawn when it is first asked for."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.fingerprint = ""
        self.num_classes = 0
        self.asked = -FRESH
        self.asking = asyncio.Lock()
        self.drawn: OrderedDict[int, bytes] = OrderedDict()  # the longest unused first
        self.free = asyncio.Semaphore(AT_A_TIME)
        self.waiting = 0

    async def of(self, index: int) -> bytes:
        """A PNG. Raises ServerError when the server does not draw it, 404 for a class that the model does not have."""
        await self.know_model()
        if not 0 <= index < self.num_classes:
            raise ServerError(f"class must be from 0 to {self.num_classes - 1}, got {shortened(index)}", 404)
        if index not in self.drawn:
            if self.waiting >= MOST_WAITING:
                raise ServerError("too many thumbnails are waiting: try again soon", 503)
            self.waiting += 1
            try:
                async with self.free:
                    if index not in self.drawn:
                        await self.draw(index)
            finally:
                self.waiting -= 1
        self.drawn.move_to_end(index)
        return self.drawn[index]

    async def draw(self, index: int) -> None:
        png = await self.client.do(calls.generate(index, format="png", **THUMBNAIL))
        self.drawn[index] = await asyncio.to_thread(lambda: write_image(resize(read_image(png), THUMBNAIL_SIZE)))
        if len(self.drawn) > KEPT:
            self.drawn.popitem(last=False)

    async def know_model(self) -> None:
        """Ask, once in FRESH seconds, which model is served; another one has other thumbnails."""
        async with self.asking:
            if time.monotonic() - self.asked < FRESH:
                return
            model = await self.client.do(calls.model())
            if model["fingerprint"] != self.fingerprint:
                self.drawn.clear()
            self.fingerprint, self.num_classes = model["fingerprint"], model["num_classes"]
            self.asked = time.monotonic()
