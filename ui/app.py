"""The page as an ASGI application: Gradio's routes, and our own that need no events."""

import asyncio
import contextlib
import secrets
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import DSDError, ServerError, shown
from dsd_serve.imaging.codec import read_image, resize, write_image
from dsd_serve.imaging.decoding import Decoder
from ui import guard, image_routes, tiles, visitors
from ui.chosen_model import for_model
from ui.fair_limit import LimitedClient
from ui.finished import FinishedImages
from ui.page import build_page
from ui.paths import CHECKPOINT, STATE, THUMBNAIL
from ui.paths import FIRST_SEGMENTS as FIRST_SEGMENTS  # for server/ui_mount.py
from ui.paths import STREAMS as STREAMS
from ui.private_files import Uploads
from ui.server_info import ServerInfo
from ui.theme import THEME

STYLES = ("style.css", "classes.css", "gallery.css", "access.css")
FRESH_S = 1.0  # seconds for which an answer of the server about itself is reused
THUMBNAIL_SETTINGS = {"seed": 1, "n": 1}
THUMBNAIL_SIZE = 128  # pixels a side
MAX_DRAWING = 2  # thumbnails at a time: the server has other clients
MAX_WAITING = 100  # thumbnails: a few pages of them
MAX_MODELS = 64  # of a server: names that it knew a while ago are among them
MAX_CACHED = 1000  # thumbnails of about 20 KB


def create_page(
    client: AsyncClient, address: Callable[[gr.Request], str] | None = None, decoder: Decoder | None = None
) -> FastAPI:
    """The page for the server of `client`, which need not be up yet.

    address: the URL under which a visitor reaches that server; by default the client's. decoder: of visitors' photos,
    to share its memory budget with others. `app.state.stop` is an asyncio.Event that ends the streams of all visitors,
    so that the process can exit.
    """
    uploads = Uploads()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with uploads.sweeping(), kept.sweeping():
            yield
        await client.close()

    kept = FinishedImages(client)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    add_routes(app, client)
    image_routes.add(app, kept)
    tiles.add_route(app, client)
    info = ServerInfo(LimitedClient(client), kept, decoder or Decoder())
    blocks = build_page(info, address or (lambda _: client.url), uploads)
    files = resources.files("ui")
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=THEME,
        css="".join(files.joinpath(name).read_text("utf-8") for name in STYLES),
        head="".join(
            f"<script>{files.joinpath(name).read_text('utf-8')}</script>"
            for name in ("storage.js", "memory.js", "gallery.js", "script.js", "access.js")
        ),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        app_kwargs={"max_body_size": visitors.MAX_BODY},
    )
    blocks.has_launched = True  # only then does Gradio check paths, after us; mounting does not set it
    visitors.install(blocks, app.routes[-1].app)  # type: ignore[attr-defined]
    guard.install(app, uploads)
    app.state.stop = app.routes[-1].app.stop_event  # type: ignore[attr-defined]
    return app


def add_routes(app: FastAPI, client: AsyncClient) -> None:
    state = ServerState(client)
    thumbnails = Thumbnails(client)
    process = secrets.token_hex(8)

    @app.get(STATE)
    async def state_now() -> JSONResponse:
        """The server's load, and a name of this process, so that a browser notices that another has taken its place."""
        return JSONResponse({**await state.now(), "process": process}, headers={"Cache-Control": "no-store"})

    @app.get(THUMBNAIL)
    async def thumbnail(index: int, model: str = "") -> Response:
        try:
            png = await thumbnails.of(index, model)
        except ServerError as error:
            status = 404 if error.status == 404 else 503
            return Response(str(error), status, {"Cache-Control": "no-store"}, "text/plain")
        return Response(png, headers={"Cache-Control": "max-age=3600"}, media_type="image/png")

    @app.get(CHECKPOINT)
    async def checkpoint(step: int, version: str = "") -> Response:
        """The images of a checkpoint. version: its fingerprint, so that a browser may keep them."""
        try:
            png = await client.do(calls.checkpoint(step))
        except ServerError as error:
            status = 404 if error.status == 404 else 503
            return Response(str(error), status, {"Cache-Control": "no-store"}, "text/plain")
        return Response(png, headers={"Cache-Control": "max-age=3600"}, media_type="image/png")


class ServerState:
    """The server's current load. However many pages are open, it is fetched at most once in FRESH_S seconds."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.lock = asyncio.Lock()
        self.fetched = -FRESH_S  # time.monotonic()
        self.rows = 0
        self.follows = True  # whether the server follows a training run; it may until it says that it does not
        self.state: dict[str, Any] = {}

    async def now(self) -> dict[str, Any]:
        async with self.lock:
            if (passed := time.monotonic() - self.fetched) >= FRESH_S:
                self.state = await self.fetch(passed)
                self.fetched = time.monotonic()
            return self.state

    async def fetch(self, passed: float) -> dict[str, Any]:
        """The state as script.js shows it. passed: seconds since the last call."""
        try:
            load = await self.client.do(calls.batcher())
            model = await self.client.do(calls.model())
            version = f"{model['fingerprint']} {await self.newest_checkpoint()}"
        except DSDError as error:
            self.follows = True  # the next server may follow a run
            return {"up": False, "sentence": str(error)}
        if load["not_ready"]:
            return {"up": False, "sentence": str(load["not_ready"])}
        rows, self.rows = load["rows"] - self.rows, load["rows"]
        return {
            "up": True,
            "body_mb": model["limits"]["body_mb"],
            "version": version,
            "running": len(load["running"]),
            "waiting": len(load["waiting"]),
            "seconds_ahead": load["seconds_ahead"],
            "row_ms": load["row_ms"],
            "rows_per_s": round(max(rows, 0) / passed, 1) if self.fetched > 0 and passed < 10 else None,
        }

    async def newest_checkpoint(self) -> str:
        """The newest checkpoint of the run that the server follows; empty if it follows none."""
        if not self.follows:
            return ""
        try:
            found = (await self.client.do(calls.checkpoints()))["checkpoints"]
        except ServerError as error:
            if error.status != 404:
                raise
            self.follows = False
            return ""
        return f"{found[-1]['step']} {found[-1]['fingerprint']}" if found else ""


@dataclass
class OfModel:
    """What thumbnails need to know of a model, and when it was fetched, as time.monotonic."""

    fingerprint: str
    num_classes: int
    fetched: float


class Thumbnails:
    """An image of each class of the current models, drawn on first use."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.models: dict[str, OfModel] = {}  # by name; only those that the server has
        self.lock = asyncio.Lock()
        self.cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # least recently used first
        self.free = asyncio.Semaphore(MAX_DRAWING)
        self.waiting = 0

    async def of(self, index: int, name: str = "") -> bytes:
        """A PNG of a class of a model, by default the first. Raises ServerError if the server does not draw it, 404 for
        a class that the model does not have."""
        model = await self.model(name)
        if not model.num_classes:
            raise ServerError("this model has no classes, so it has no thumbnails", 404)
        if not 0 <= index < model.num_classes:
            raise ServerError(f"class must be from 0 to {model.num_classes - 1}, got {shown(index)}", 404)
        key = (model.fingerprint, index)
        if key not in self.cache:
            if self.waiting >= MAX_WAITING:
                raise ServerError("too many thumbnails are waiting: try again soon", 503)
            self.waiting += 1
            try:
                async with self.free:
                    if key not in self.cache:
                        await self.draw(key, name)
            finally:
                self.waiting -= 1
        self.cache.move_to_end(key)
        return self.cache[key]

    async def draw(self, key: tuple[str, int], name: str) -> None:
        answer = await self.client.do(for_model(calls.generate_json(key[1], **THUMBNAIL_SETTINGS), name))
        if answer["fingerprint"] != key[0]:
            raise ServerError("the model has just been replaced: try again", 503)
        png = b64decode(answer["images"][0]["base64"])
        self.cache[key] = await asyncio.to_thread(lambda: write_image(resize(read_image(png), THUMBNAIL_SIZE)))
        if len(self.cache) > MAX_CACHED:
            self.cache.popitem(last=False)

    async def model(self, name: str) -> OfModel:
        """The model of this name now, fetched at most once in FRESH_S seconds; another one has other thumbnails."""
        async with self.lock:
            known = self.models.get(name)
            if known is None or time.monotonic() - known.fetched >= FRESH_S:
                model = await self.client.do(for_model(calls.model(), name))
                known = OfModel(model["fingerprint"], model["num_classes"], time.monotonic())
                if len(self.models) >= MAX_MODELS:
                    self.models.clear()
                self.models[name] = known
            return known
