"""Answers: which format a client gets, and pictures in that format."""

import base64
import hashlib
import io
import json
import re
import zipfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event

from dsd_serve import images
from dsd_serve.rows import Pixels

PICTURES = {media: name for name, media in images.MEDIA_TYPES.items()}
ANSWERS = {**PICTURES, "application/json": "json", "application/zip": "zip"}
EVENTS = {**ANSWERS, "text/event-stream": "events"}
WEIGHT = re.compile(r"(?=\.?[0-9])[0-9]?(\.[0-9]*)?", re.ASCII)
QUOTES = re.compile(r'(\\.|")', re.DOTALL)  # what begins and ends a quoted string, and what is escaped in it
QUICK_PIXELS = 64 * 64  # up to here encoding takes less than a millisecond, and a thread would cost more than it saves
TEXT_KEY = "dsd"  # of the PNG chunk that holds the settings as JSON


@dataclass(frozen=True)
class Picture:
    """uint8 [3, H, W], and what it takes to draw it again: written into PNG files and JSON answers."""

    pixels: Pixels
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class MediaRange:
    """An entry of an Accept header, like image/*;q=0.5. Parameters other than q are ignored."""

    media: str
    quality: float

    def specificity(self, media: str) -> int:
        """How closely this matches a media type: 3 is itself, 2 its kind, 1 all, 0 not at all."""
        if self.media == media:
            return 3
        return {media.partition("/")[0] + "/*": 2, "*/*": 1}.get(self.media, 0)


def choose(request: Request, asked: str | None, offered: Mapping[str, str]) -> str:
    """The format of the answer: what the parameter asks for, else what the client likes best of those offered (media
    type -> name). Raises 406 when the client accepts none.

    As RFC 9110 has it, the most specific range decides how much a type is liked, and q=0 is not at all. Among those
    liked the same, the one that is named more closely, then earlier, then offered earlier, is chosen.
    """
    if asked is not None:
        return asked
    accept = ", ".join(request.headers.getlist("accept"))
    ranges = accepted(accept)
    best = max(offered, key=lambda media: liking(media, ranges))
    if liking(best, ranges)[0] == 0:
        raise HTTPException(406, f"this gives {', '.join(offered)}; the client accepts only {accept[:200]}")
    return offered[best]


def liking(media: str, ranges: Sequence[MediaRange]) -> tuple[float, int, int]:
    """Sorts media types by how much a client likes them; the first is 0 for what it does not accept."""
    matching = [(entry.specificity(media), entry.quality, -place) for place, entry in enumerate(ranges)]
    specificity, quality, place = max((match for match in matching if match[0]), default=(0, 0.0, 0))
    return quality, specificity, place


def accepted(accept: str) -> list[MediaRange]:
    """The ranges of an Accept header; one with a weight that is no number is left out, no header at all is */*."""
    if not accept.strip():
        return [MediaRange("*/*", 1.0)]
    ranges = []
    for entry in split(accept, ","):
        media, *parameters = (part.strip().lower() for part in split(entry, ";"))
        weight = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        if media and WEIGHT.fullmatch(weight):
            ranges.append(MediaRange("*/*" if media == "*" else media, min(float(weight), 1.0)))
    return ranges


def split(text: str, separator: str) -> list[str]:
    """Parts of a header's value between separators that do not stand in a quoted string."""
    parts, quoted = [""], False
    for piece in QUOTES.split(text):
        if piece == '"':
            quoted = not quoted
        if quoted or piece.startswith('"') or separator not in piece:
            parts[-1] += piece
        else:
            first, *others = piece.split(separator)
            parts[-1] += first
            parts += others
    return parts


async def answer(
    pictures: Sequence[Picture],
    chosen: str,
    size: int | None,
    common: Mapping[str, Any],
    headers: dict[str, str],
    columns: int | None = None,
) -> Response:
    """Pictures as one file (several side by side in `columns`), as a zip of PNGs, or with `common` as JSON."""
    side = size or pictures[0].pixels.shape[-1]
    if len(pictures) * side**2 <= QUICK_PIXELS:
        return encode_answer(pictures, chosen, size, common, headers, columns)
    return await run_in_threadpool(encode_answer, pictures, chosen, size, common, headers, columns)


def encode_answer(
    pictures: Sequence[Picture],
    chosen: str,
    size: int | None,
    common: Mapping[str, Any],
    headers: dict[str, str],
    columns: int | None,
) -> Response:
    if chosen == "json":
        shown = [{**picture.settings, "base64": to_base64(picture, size)} for picture in pictures]
        return JSONResponse({**common, "images": shown}, headers=headers)
    if chosen == "zip":
        return Response(to_zip(pictures, size), media_type="application/zip", headers=headers)
    settings = pictures[0].settings if len(pictures) == 1 else {**common, "n": len(pictures)}
    sheet = images.sheet([picture.pixels for picture in pictures], size, columns)
    body = images.encode(sheet, chosen, text_of(settings))
    return Response(body, media_type=images.MEDIA_TYPES[chosen], headers=headers)


def text_of(settings: Mapping[str, Any]) -> dict[str, str]:
    return {TEXT_KEY: json.dumps(settings)}


def to_png(picture: Picture, size: int | None) -> bytes:
    return images.encode(images.resized(picture.pixels, size), "png", text_of(picture.settings))


def to_base64(picture: Picture, size: int | None) -> str:
    return base64.b64encode(to_png(picture, size)).decode()


def to_zip(pictures: Sequence[Picture], size: int | None) -> bytes:
    """PNGs 000.png, 001.png ... with a fixed date, so that the same pictures give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, picture in enumerate(pictures):
            archive.writestr(zipfile.ZipInfo(f"{number:03}.png"), to_png(picture, size))
    return buffer.getvalue()


def etag_of(*parts: Any) -> str:
    """A strong ETag of plain values that decide every byte of an answer."""
    return f'"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"'


def is_fresh(request: Request, etag: str) -> bool:
    """Whether the client of a GET has this answer already."""
    header = ",".join(request.headers.getlist("if-none-match"))
    known = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return request.method in ("GET", "HEAD") and (etag in known or "*" in known)


def event_stream(events: AsyncIterator[tuple[str, Any] | None], headers: dict[str, str]) -> StreamingResponse:
    """Server-sent events of (name, JSON value); None is a comment that keeps the connection open."""

    async def lines() -> AsyncIterator[bytes]:
        async for event in events:
            if event is None:
                yield b": ping\n\n"
            else:
                yield format_sse_event(event=event[0] or None, data_str=json.dumps(event[1]))

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)
