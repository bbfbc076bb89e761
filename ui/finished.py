"""Finished images: kept for a while, sent to a browser once under an address of their own, drawn again if needed.

The address of an image is the hash of its bytes, so it never changes its meaning. That of a drawn image has its
settings too, from which it is drawn again when this process no longer has it.
"""

import asyncio
import hashlib
import io
import time
import zipfile
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import InputError, ServerError
from dsd_serve.imaging.provenance import settings_of
from dsd_serve.params import SamplingParams, to_api
from ui import links
from ui.chosen_model import for_model
from ui.display import SHOWN, enlarged
from ui.names import file_name
from ui.regularly import regularly

MAX_MB = 256  # of all visitors' images; the least recently used go first
KEEP_S = 3600.0  # after the last use
SWEEP_S = 60.0
MAX_DRAWING = 2  # images drawn again at a time: the server has other clients
MAX_WAITING = 200  # of them
MAX_ZIPPED = 200  # images of one zip file
UNNAMED = "Image"  # title of an image without a class
GONE = "this image is no longer on the server: draw it again"
OTHER_MODEL = "another model drew this image: with the same settings this one draws a different image"


@dataclass(frozen=True)
class Finished:
    """An image as it is shown and saved, without its bytes.

    id: the hash of its bytes. title: its class, or what else it shows. settings: those in its file; empty for images
    without. model: the name of its model, empty for the server's first.
    """

    id: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    media: str = "image/png"
    model: str = ""

    @property
    def query(self) -> str:
        """The settings from which it can be drawn again, as a query string; empty if it was not drawn from noise."""
        return links.query_of(self.settings, self.model) if self.settings and "strength" not in self.settings else ""

    @property
    def url(self) -> str:
        kind = self.media.rpartition("/")[2]
        return f"studio/image/{self.id}.{kind}" + (f"?{self.query}" if self.query else "")


class FinishedImages:
    """The finished images of all visitors. One event loop."""

    def __init__(self, client: AsyncClient, max_bytes: int = MAX_MB * 10**6) -> None:
        self.client, self.max_bytes = client, max_bytes
        self.images: OrderedDict[str, tuple[Finished, bytes]] = OrderedDict()  # by id, least recently used first
        self.used: dict[str, float] = {}  # time of the last use, as time.monotonic
        self.by_settings: dict[tuple[Any, ...], str] = {}
        self.size = 0  # bytes
        self.free = asyncio.Semaphore(MAX_DRAWING)
        self.waiting = 0

    def keep(
        self,
        data: bytes,
        title: str,
        settings: Mapping[str, Any] | None = None,
        media: str = "image/png",
        model: str = "",
    ) -> Finished:
        """Keep the bytes of an image."""
        image = Finished(hashlib.sha256(data).hexdigest()[:32], title, settings or {}, media, model)
        if image.id in self.images:
            self.drop(image.id)
        self.images[image.id] = image, data
        self.used[image.id] = time.monotonic()
        self.size += len(data)
        if image.query:
            self.by_settings[key_of(image.settings)] = image.id
        while self.size > self.max_bytes and len(self.images) > 1:
            self.drop(next(iter(self.images)))
        return image

    def drop(self, image_id: str) -> None:
        image, data = self.images.pop(image_id)
        del self.used[image_id]
        self.size -= len(data)
        if image.query and self.by_settings.get(key_of(image.settings)) == image_id:
            del self.by_settings[key_of(image.settings)]

    def get(self, image_id: str) -> Finished | None:
        """An image, if it is kept."""
        if image_id not in self.images:
            return None
        self.images.move_to_end(image_id)
        self.used[image_id] = time.monotonic()
        return self.images[image_id][0]

    def data(self, image: Finished) -> bytes:
        """The bytes of an image. Raises ServerError 404 if they are no longer kept."""
        if image.id not in self.images:
            raise ServerError(GONE, 404)
        return self.images[image.id][1]

    def drawn_with(self, settings: Mapping[str, Any]) -> Finished | None:
        """The image with these settings, the fingerprint of its model among them, if it is kept."""
        return self.get(self.by_settings.get(key_of(settings), ""))

    async def find(self, image_id: str, query: str = "") -> Finished:
        """An image that is kept, or can be drawn again. query: its settings. Raises ServerError, 404 or 410 if
        neither."""
        if (image := self.get(image_id)) is not None:
            return image
        if not query:
            raise ServerError(GONE, 404)
        try:
            link = links.read(query)
        except InputError as error:
            raise ServerError(str(error), 404) from None
        if not link.draws:
            raise ServerError(GONE, 404)
        image = await self.draw(link, image_id)
        if image.id != image_id:
            raise ServerError(OTHER_MODEL, 410)
        return image

    async def of_link(self, link: links.Link) -> Finished:
        """The first image of a link. Raises ServerError; InputError if the link does not say which image."""
        if not link.draws:
            raise InputError("this link has no seed, so it names no image")
        return await self.draw(link)

    async def draw(self, link: links.Link, image_id: str = "") -> Finished:
        """Draw the first image of a link, unless it has been drawn meanwhile. Raises ServerError."""
        if self.waiting >= MAX_WAITING:
            raise ServerError("too many images are drawn again now: try again soon", 503)
        self.waiting += 1
        try:
            async with self.free:
                return self.get(image_id) or await self.drawn_now(link.first)
        finally:
            self.waiting -= 1

    async def drawn_now(self, one: links.Link) -> Finished:
        call = calls.generate_json(one.classes[0] if one.classes else None, **one.settings, n=1)
        answer = await self.client.do(for_model(call, one.model))
        (image,) = answer["images"]
        png = await asyncio.to_thread(enlarged, b64decode(image["base64"]), SHOWN)
        settings = settings_of(png) or {}
        title = (settings.get("class") or {}).get("name", UNNAMED)
        return self.keep(png, str(title), settings, model=one.model)

    def sweeping(self) -> AbstractAsyncContextManager[None]:
        """Drop unused images while the context is open."""
        return regularly(self.sweep, SWEEP_S)

    def sweep(self, seconds: float = KEEP_S) -> None:
        """Drop images that were not used for so many seconds."""
        now = time.monotonic()
        for image_id in [one for one, used in self.used.items() if now - used >= seconds]:
            self.drop(image_id)


def key_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The settings that decide over an image's bytes."""
    label = settings.get("class")
    index = label.get("index") if isinstance(label, Mapping) else None
    return (settings.get("fingerprint"), index, *(settings.get(name) for name in to_api(SamplingParams())))


def zipped(images: Sequence[tuple[Finished, bytes]]) -> bytes:
    """A zip file of images, each under the name that the page saves it with."""
    buffer, names = io.BytesIO(), set[str]()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for image, data in images:
            name = file_name(image.title, image.settings)
            if name in names:
                name = f"{image.id[:8]}-{name}"
            names.add(name)
            file.writestr(name, data)
    return buffer.getvalue()
