"""Images of classes as tiles of one file, which the server has ready, so that a page shows all classes at once."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Response

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import ServerError
from ui.chosen_model import for_model
from ui.paths import CLASS_IMAGES

SIDE = 64  # pixels of a tile in the file
EDGE = 1  # pixels of a tile that are not shown, so that no neighbour shines through when a browser scales it
MAX_FILES = 8  # that the page's process keeps
VERSION = 16  # characters of the sha256 in a URL


@dataclass(frozen=True)
class Tiles:
    """The grid of a model's classes.webp, as /model describes it. places: label -> position among the classes."""

    url: str
    columns: int
    per_class: int
    places: Mapping[int, int]

    @property
    def rows(self) -> int:
        return -(-len(self.places) * self.per_class // self.columns)

    @property
    def style(self) -> str:
        """Of an element around tiles."""
        size = 100 * SIDE / (SIDE - 2 * EDGE)
        return f"--tiles:url('{self.url}');--size:{size * self.columns:.3f}% {size * self.rows:.3f}%"

    def tile(self, label: int, number: int = 0) -> str:
        """An image of a class. number: from 0, the most typical one."""
        row, column = divmod(self.places[label] * self.per_class + number, self.columns)
        shares = ((at * SIDE + EDGE) / max(1, of * SIDE - SIDE + 2 * EDGE) for at, of in
                  ((column, self.columns), (row, self.rows)))  # fmt: skip
        x, y = (f"{100 * share:.3f}%" for share in shares)
        return f'<span class="tile" style="background-position:{x} {y}"></span>'


def tiles_of(model: Mapping[str, Any], name: str) -> Tiles | None:
    """The tiles of a model; None if its server has none. name: of the model, if it is not the server's first."""
    grid = model.get("class_images")
    if not grid:
        return None
    query = urlencode({**({"model": name} if name else {}), "version": str(grid["sha256"])[:VERSION]})
    places = {label: place for place, label in enumerate(model["classes"])}
    return Tiles(f"{CLASS_IMAGES[1:]}?{escape(query)}", int(grid["columns"]), int(grid["per_class"]), places)


def add_route(app: FastAPI, client: AsyncClient) -> None:
    """The file of a model, which the page's process keeps and browsers need not ask for again."""
    kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
    turn = asyncio.Lock()

    @app.get(CLASS_IMAGES)
    async def class_images(version: str = "", model: str = "") -> Response:
        async with turn:
            data = kept.get((model, version))
            if data is None:
                try:
                    data = await client.do(for_model(calls.class_images(), model))
                except ServerError as error:
                    status = error.status if error.status in (404, 422) else 503
                    return Response(str(error), status, {"Cache-Control": "no-store"}, "text/plain")
                if hashlib.sha256(data).hexdigest()[:VERSION] != version:  # another model by now
                    return Response(data, headers={"Cache-Control": "no-store"}, media_type="image/webp")
                kept[model, version] = data
                while len(kept) > MAX_FILES:
                    kept.popitem(last=False)
        return Response(data, headers={"Cache-Control": "max-age=86400, immutable"}, media_type="image/webp")
