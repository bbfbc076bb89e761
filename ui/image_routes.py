"""The routes of finished images: each under an address that never changes its meaning, and several as a zip file."""

import asyncio
from importlib import resources

from fastapi import FastAPI, Request, Response

from dsd_serve.errors import InputError, ServerError
from ui import links
from ui.finished import MAX_ZIPPED, FinishedImages, zipped
from ui.paths import ICON, IMAGE, ZIP

FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable"}
NEVER = {"Cache-Control": "no-store"}


def add(app: FastAPI, kept: FinishedImages) -> None:
    drawn_icon = resources.files("ui").joinpath("icon.svg").read_bytes()

    @app.get(IMAGE)
    async def image(request: Request, image_id: str, kind: str) -> Response:
        """A finished image. Its settings are in the query, so that it can be drawn again; `link.png` is the first image
        of a page's link, for its preview elsewhere."""
        try:
            if image_id == "link":
                found = await kept.of_link(links.read(request.url.query))
                return Response(kept.data(found), headers={"Cache-Control": "max-age=3600"}, media_type=found.media)
            found = await kept.find(image_id, request.url.query)
        except InputError as error:
            return Response(str(error), 404, NEVER, "text/plain")
        except ServerError as error:
            status = error.status if error.status in (404, 410) else 503
            return Response(str(error), status, NEVER, "text/plain")
        return Response(kept.data(found), headers=FOR_EVER, media_type=found.media)

    @app.get(ZIP)
    async def images(ids: str = "") -> Response:
        """Several kept images. ids: of the images, with commas."""
        if not ids:
            return Response("ids must name images, with commas between them", 400, NEVER, "text/plain")
        asked = ids.split(",")[:MAX_ZIPPED]
        found = [(one, kept.data(one)) for image_id in asked if (one := kept.get(image_id)) is not None]
        if len(found) < len(asked):
            missing = f"{len(asked) - len(found)} of {len(asked)} images are no longer on the server: draw them again"
            return Response(missing, 404, NEVER, "text/plain")
        return Response(await asyncio.to_thread(zipped, found), headers=NEVER, media_type="application/zip")

    @app.get("/favicon.ico")
    @app.get(ICON)
    async def icon() -> Response:
        return Response(drawn_icon, headers={"Cache-Control": "max-age=86400"}, media_type="image/svg+xml")
