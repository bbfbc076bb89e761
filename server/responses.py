"""Content negotiation, and images encoded in the negotiated format."""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event

from dsd_serve.errors import DeadlineError, InputError
from dsd_serve.imaging import codec
from dsd_serve.memory import Claim, Memory, after
from dsd_serve.params import to_headers
from dsd_serve.rows import Pixels
from server import error_responses
from server.answers import Answer, fill
from server.request_memory import resources_of
from server.settings import Settings

Made = TypeVar("Made")

IMAGE_TYPES = {media: name for name, media in codec.MEDIA_TYPES.items()}
FILE_TYPES = (*IMAGE_TYPES, "application/zip")
ANSWERS = {**IMAGE_TYPES, "application/json": "json", "application/zip": "zip"}
EVENTS = {**ANSWERS, "text/event-stream": "events"}
BYTES = "application/octet-stream"  # a client that accepts this gets the first type offered
# Further types that browsers accept: they list all that they can show, not a preference.
OF_BROWSERS = ("image/avif", "image/apng", "image/svg+xml", "image/jxl")
WEIGHT = re.compile(r"(?=\.?[0-9])[0-9]?(\.[0-9]*)?", re.ASCII)
QUOTED = re.compile(r'"(\\.|[^"])*"?', re.DOTALL)  # a quoted string, which may hold commas, semicolons and \"
MAX_ACCEPT = 2000  # characters; browsers send some hundred, and each takes its time
QUICK_PIXELS = 64 * 64  # up to here encoding takes less than a millisecond, and a thread would cost more than it saves


@dataclass(frozen=True)
class ImageWithSettings:
    """An image, uint8 [3, H, W], and the settings that draw it again, for files and JSON answers."""

    pixels: Pixels
    settings: Mapping[str, Any]


def choose(request: Request, requested: str | None, offered: Mapping[str, str]) -> str:
    """The format of the answer: the requested one, else the one offered (media type -> name) that the client prefers.
    Raises 406 if the client accepts none.

    By RFC 9110 the most specific range decides the weight of a type, and q=0 excludes it. Among types of equal weight,
    the one with the more specific range wins, then the one with the earlier range, then the one offered earlier. A
    browser gets PNG if it accepts PNG: its list names WebP because it can show it, and a PNG loses nothing.
    """
    if requested is not None:
        return requested
    first = next(iter(offered))
    accept = ", ".join(request.headers.getlist("accept"))
    if len(accept) > MAX_ACCEPT:
        raise HTTPException(406, f"the header Accept must have at most {MAX_ACCEPT:,} characters, got {len(accept):,}")
    ranges = media_ranges(accept)
    if BYTES in ranges:
        ranges[first] = max(ranges[BYTES], ranges.get(first, ranges[BYTES]))
    best = max(offered, key=lambda media: preference(media, ranges))
    if any(media in ranges for media in OF_BROWSERS) and best == "image/webp" and preference(first, ranges)[0] > 0:
        best = first
    if preference(best, ranges)[0] == 0:
        raise HTTPException(
            406, f"this gives {', '.join(offered)}; the client accepts only {error_responses.cut(accept)}"
        )
    return offered[best]


def preference(media: str, ranges: Mapping[str, tuple[float, int]]) -> tuple[float, int, int]:
    """Sorts media types by the client's preference: weight, specificity of the range that decides it, and place.

    The weight of a type that the client does not accept is 0.
    """
    for specificity, name in ((3, media), (2, media.partition("/")[0] + "/*"), (1, "*/*")):
        if name in ranges:
            weight, place = ranges[name]
            return weight, specificity, place
    return 0.0, 0, 0


def media_ranges(accept: str) -> dict[str, tuple[float, int]]:
    """The media ranges of an Accept header with their weights, 0 to 1, and their places, the first of which is highest.

    A range whose weight is not a number is left out, parameters other than q are ignored, and an empty header is */*.
    """
    ranges: dict[str, tuple[float, int]] = {}
    for place, entry in enumerate(QUOTED.sub('""', accept.strip() or "*/*").lower().split(",")):
        media, *parameters = (part.strip() for part in entry.split(";"))
        media = "*/*" if media == "*" else media  # Java sends a single *
        weight = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        if WEIGHT.fullmatch(weight):
            ranges[media] = max(ranges.get(media, (0.0, -place)), (min(float(weight), 1.0), -place))
    return ranges


TEXT_KIND = "png"  # of images in JSON and events
# Most bytes that encoding noise takes per pixel: the image, the buffers of the encoder, and the file.
PIXEL_BYTES = {"png": 13, "jpeg": 14, "webp": 44}
PNG_BYTES, TEXT_BYTES = 4, 14  # per pixel: in a file, and as base64 in JSON (str and bytes)
ANSWER_SLACK = 2_000_000  # bytes


def encode_memory(chosen: str, count: int, side: int, columns: int | None = None) -> int:
    """Upper bound, in bytes, of encoding an answer of `count` images: in a format, or as json or zip."""
    if chosen == "zip":
        return side**2 * (PIXEL_BYTES["png"] + count * PNG_BYTES) + ANSWER_SLACK
    if chosen not in PIXEL_BYTES:
        return texts_memory(TEXT_KIND, count, side)
    across, down = codec.sheet_shape(count, columns)
    return across * down * side**2 * PIXEL_BYTES[chosen] + ANSWER_SLACK


def texts_memory(kind: str, count: int, side: int) -> int:
    """Upper bound, in bytes, of `count` images of a format, each as base64, until they are sent."""
    return side**2 * (PIXEL_BYTES[kind] + count * TEXT_BYTES) + ANSWER_SLACK


class Encoder:
    """Encodes answers. Those being encoded or waiting to be sent take at most `max_encode_mb`; further ones wait."""

    def __init__(self, settings: Settings) -> None:
        self.memory = Memory(int(settings.max_encode_mb * 1e6))
        self.threads = ThreadPoolExecutor(os.cpu_count(), "encoder")

    def check(self, needed: int, what: str) -> None:
        """Refuse, before anything is drawn, an answer that could not be encoded."""
        if needed > self.memory.limit:
            raise InputError(
                f"encoding {what} takes up to {needed / 1e6:.0f} MB, this server allows "
                f"{self.memory.limit / 1e6:g} MB (--max-encode-mb); ask for fewer or smaller images, or another format"
            )

    def check_images(self, chosen: str, count: int, side: int, columns: int | None = None) -> None:
        """`check` of an answer as `answer` gives it, or of events, of which each has one image."""
        count = 1 if chosen == "events" else count
        self.check(encode_memory(chosen, count, side, columns), f"{count} x {side} x {side} pixels as {chosen}")

    async def run(self, request: Request, needed: int, make: Callable[[], Made]) -> tuple[Made, Claim]:
        """The result of `make`, which takes `needed` bytes, computed in a thread.

        The claim belongs to the request until its end.
        """
        held = resources_of(request.scope)
        try:
            async with asyncio.timeout_at(held.deadline):
                claim = await self.memory.take(needed, held.who)
        except TimeoutError:
            raise DeadlineError("the images were drawn, but could not be encoded in time") from None
        making = self.threads.submit(make)
        try:
            made = await asyncio.wrap_future(making)
        except BaseException:
            after(making, claim.release)
            raise
        held.claims.add(claim)
        return made, claim

    @contextlib.asynccontextmanager
    async def text(self, request: Request, kind: str, side: int, make: Callable[[], str]) -> AsyncIterator[str]:
        """An image as base64, whose memory is given back when it has been sent."""
        text, claim = await self.run(request, texts_memory(kind, 1, side), make)
        try:
            yield text
        finally:
            resources_of(request.scope).claims.discard(claim)
            claim.release()


async def answer(
    request: Request,
    encoder: Encoder,
    images: Sequence[ImageWithSettings],
    chosen: str,
    size: int | None,
    common: Mapping[str, Any],
    headers: dict[str, str],
    shape: type[Answer],
    columns: int | None = None,
) -> Response:
    """Images as one file (several side by side in `columns`), as a zip, or with `common` as the JSON of `shape`."""
    make = partial(encode_answer, images, chosen, size, common, headers, shape, columns)
    drawn = images[0].pixels.shape[-1]
    side = size or drawn
    if len(images) * max(side, drawn) ** 2 <= QUICK_PIXELS:
        return make()
    response, claim = await encoder.run(request, encode_memory(chosen, len(images), side, columns), make)
    claim.shrink(len(response.body))
    return response


def encode_answer(
    images: Sequence[ImageWithSettings],
    chosen: str,
    size: int | None,
    common: Mapping[str, Any],
    headers: dict[str, str],
    shape: type[Answer],
    columns: int | None,
) -> Response:
    if chosen == "json":
        shown = [{**image.settings, "base64": to_base64(image, size)} for image in images]
        return JSONResponse(fill(shape, {**common, "images": shown}), headers=headers)
    if chosen == "zip":
        return Response(to_zip(images, size), media_type="application/zip", headers=headers)
    settings = images[0].settings if len(images) == 1 else {**common, "n": len(images)}
    sheet = codec.sheet([image.pixels for image in images], size, columns)
    body = codec.encode(sheet, chosen, json.dumps(settings))
    return Response(body, media_type=codec.MEDIA_TYPES[chosen], headers=headers)


def settings_headers(settings: Mapping[str, Any]) -> dict[str, str]:
    image_class = settings["class"]
    return {
        "X-DSD-Class": "none" if image_class is None else str(image_class["index"]),
        **to_headers(settings),
        "X-DSD-Model": quote(settings["model"], safe=" "),  # a folder may have any name
        "X-DSD-Fingerprint": settings["fingerprint"],
    }


def to_png(image: ImageWithSettings, size: int | None) -> bytes:
    return codec.encode(codec.resized(image.pixels, size), "png", json.dumps(image.settings))


def to_base64(image: ImageWithSettings, size: int | None) -> str:
    return base64.b64encode(to_png(image, size)).decode()


def to_zip(images: Sequence[ImageWithSettings], size: int | None) -> bytes:
    """PNGs 000.png, 001.png ... with a fixed date, so that the same images give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, image in enumerate(images):
            archive.writestr(zipfile.ZipInfo(f"{number:03}.png"), to_png(image, size))
    return buffer.getvalue()


def etag_of(*parts: Any, weak: bool = False) -> str:
    """An ETag of plain values that decide an answer. weak: they decide the image, but not every byte of it."""
    return f'{"W/" if weak else ""}"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"'


def is_fresh(request: Request, etag: str) -> bool:
    """True if If-None-Match of a GET or HEAD names this ETag: the client has the answer already."""
    etag = etag.removeprefix("W/")
    header = ",".join(request.headers.getlist("if-none-match"))
    if request.method not in ("GET", "HEAD") or (etag not in header and "*" not in header):
        return False  # without parsing a long header
    known = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in known or "*" in known


def resumes(request: Request) -> bool:
    """True if a client reconnects after events of a stream, as EventSource does by itself. Drawing again would never
    end; the answer 204 makes it stop."""
    return bool(request.headers.get("last-event-id"))


def event_stream(events: AsyncIterator[tuple[str, Any] | None], headers: dict[str, str]) -> StreamingResponse:
    """Server-sent events of (name, JSON value); None is a comment that keeps the connection open.

    They have ids, so that a browser's EventSource, which reconnects whenever a stream ends, sends Last-Event-ID: see
    `resumes`.
    """

    async def lines() -> AsyncIterator[bytes]:
        number = 0
        async for event in events:
            if event is None:
                yield b": ping\n\n"
            else:
                number += 1
                yield b"id: %d\n" % number + format_sse_event(event=event[0] or None, data_str=json.dumps(event[1]))

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
