"""The requests of the HTTP API as plain values: method, path, body, and the reader of the answer."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from dsd_serve.imaging import codec
from dsd_serve.imaging.latents import read_npy_of_any_shape, write_latents
from dsd_serve.rows import Latents

T = TypeVar("T")


JSON, NPY, EVENTS = "application/json", "application/x-npy", "text/event-stream"
FORMATS = {**codec.MEDIA_TYPES, "json": JSON, "zip": "application/zip", "events": EVENTS}
EVENT_NAMES = ("preview", "image", "error", "done")
NEWLINE = re.compile(rb"\r\n|\r|\n")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request.

    read: makes the result from the answer; raises ValueError, KeyError or TypeError if the answer is malformed.
    arguments: those of httpx's `request`. media: the media type of the answer.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    arguments: dict[str, Any] = field(default_factory=dict)
    media: str = JSON


@dataclass(frozen=True)
class Event:
    """A server-sent event. name: preview, image, error or done. data: as /docs describes the event of that name."""

    name: str
    data: dict[str, Any]


class EventReader:
    """Bytes of an event stream -> events, after the HTML standard: lines end with CR, LF or both, data may span several
    lines, and comments, unknown fields and an incomplete last event are skipped.

    Raises ValueError for an event that is not a JSON object, or of more than `max_bytes`. `done` is True after the
    event of that name, the last one of a complete stream.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self.began = self.done = self.after_cr = False
        self.size = 0  # bytes since the last blank line
        self.rest: list[bytes] = []  # the beginning of an incomplete line
        self.name, self.data = "", list[str]()

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that these bytes complete."""
        if not chunk:  # says nothing of a line feed to come
            return
        if not self.began:
            chunk = b"".join(self.rest) + chunk
            if len(chunk) < len(BOM) and BOM.startswith(chunk):
                self.rest = [chunk]
                return
            self.began, self.rest, chunk = True, [], chunk.removeprefix(BOM)
        if self.after_cr:  # CRLF in two pieces
            chunk = chunk.removeprefix(b"\n")
        self.after_cr = chunk.endswith(b"\r")
        first, *others = NEWLINE.split(chunk)
        self.add(first)
        for piece in others:
            line, self.rest = b"".join(self.rest).decode("utf-8", "replace"), []
            if event := self.line(line):
                yield event
            self.add(piece)

    def add(self, piece: bytes) -> None:
        self.rest.append(piece)
        self.size += len(piece)
        if self.size > self.max_bytes:
            raise ValueError(f"an event of it has more than {self.max_bytes / 1e6:.0f} MB")

    def line(self, text: str) -> Event | None:
        """The event that this line completes, if any."""
        if not text:
            name, data = self.name or "message", "\n".join(self.data)
            self.name, self.data, self.size = "", [], 0
            if not data or name not in EVENT_NAMES or self.done:  # later versions may send others
                return None
            self.done = name == "done"
            return Event(name, an_object(json.loads(data)))
        field_name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field_name == "event":
            self.name = value
        elif field_name == "data":
            self.data.append(value)
        return None


def generate(class_: str | int | None = None, **settings: Any) -> Call[bytes]:
    """Images of a class in one file. class_: None for a model without classes. settings: seed, n, steps, sampler,
    guidance, format, size ...; see /docs."""
    arguments = {"json": given({"class": class_, **settings})}
    return Call("POST", "/generate", body, arguments, FORMATS.get(settings.get("format") or "png", JSON))


def generate_json(class_: str | int | None = None, **settings: Any) -> Call[dict[str, Any]]:
    """Each image as base64, with the settings that were used."""
    return Call("POST", "/generate", document, {"json": given({"class": class_, "format": "json", **settings})})


def generate_events(class_: str | int | None = None, **settings: Any) -> Call[Event]:
    """Previews while it samples, then images; for `stream`. settings: preview_every too."""
    arguments = {"json": given({"class": class_, "format": "events", **settings})}
    return Call("POST", "/generate", event, arguments, EVENTS)


def edit_json(image: bytes, mask: bytes | None = None, **settings: Any) -> Call[dict[str, Any]]:
    """An image redrawn; with a mask, only where it is white. settings: class_, strength and those of generate."""
    return Call("POST", "/edit", document, edit_arguments(image, mask, settings, "json"))


def edit_events(image: bytes, mask: bytes | None = None, **settings: Any) -> Call[Event]:
    """`edit_json` with previews; for `stream`."""
    return Call("POST", "/edit", event, edit_arguments(image, mask, settings, "events"), EVENTS)


def reconstruct(image: bytes, **settings: Any) -> Call[dict[str, Any]]:
    """Encode and decode an image: {"base64": PNG, "psnr": dB, "size": pixels}. settings: size."""
    return Call(
        "POST", "/reconstruct", reconstructed, {"content": image, "params": {"format": "json", **given(settings)}}
    )


def encode(image: bytes) -> Call[Latents]:
    """The latents of an image, float32 [L, C]."""
    return Call("POST", "/encode", latents, {"content": image, "params": {"format": "npy"}}, NPY)


def decode(z: Latents, **settings: Any) -> Call[bytes]:
    """The image of latents [L, C]. settings: format, size."""
    arguments = {"content": write_latents(z, "npy"), "params": given(settings)}
    return Call("POST", "/decode", body, arguments, FORMATS.get(settings.get("format") or "png", JSON))


def interpolate(start: dict[str, Any], end: dict[str, Any], **settings: Any) -> Call[dict[str, Any]]:
    """A walk between two ends, {"class": 207, "seed": 1} each. settings: n, steps, sampler, guidance, size."""
    values = {"from": given(start), "to": given(end), "format": "json", **given(settings)}
    return Call("POST", "/interpolate", document, {"json": values})


def interpolate_images(start: bytes, end: bytes, **settings: Any) -> Call[dict[str, Any]]:
    """A walk between the latents of two images. settings: n, size."""
    files = {"from": ("from", start), "to": ("to", end)}
    return Call("POST", "/interpolate", document, {"files": files, "params": {"format": "json", **given(settings)}})


def classes(query: str = "") -> Call[list[dict[str, Any]]]:
    """The classes that the model can draw, or those that match."""
    return Call("GET", "/classes", lambda answer: objects(answer.json()), {"params": {"q": query}})


def model() -> Call[dict[str, Any]]:
    """The server's model, engine and limits."""
    return Call("GET", "/model", document)


def models() -> Call[list[str]]:
    """The names of the server's models."""
    return Call("GET", "/v1/models", lambda answer: [str(one["id"]) for one in objects(document(answer)["data"])])


def card() -> Call[str]:
    """The model card, Markdown."""
    return Call("GET", "/model/card", lambda answer: str(answer.text), media="text/markdown")


def class_images() -> Call[bytes]:
    """classes.webp: the images of the classes that dsd-export drew, in the grid that `model` describes."""
    return Call("GET", "/classes.webp", body, media="image/webp")


def checkpoints() -> Call[dict[str, Any]]:
    """The checkpoints of the training run that the server follows."""
    return Call("GET", "/checkpoints", document)


def checkpoint(step: int) -> Call[bytes]:
    """The images that a checkpoint of the run draws, a PNG with one below the other."""
    return Call("GET", f"/checkpoints/{step}", body, media="image/png")


def batcher() -> Call[dict[str, Any]]:
    """The running and waiting tasks of the server."""
    return Call("GET", "/debug/batcher", document)


def edit_arguments(image: bytes, mask: bytes | None, settings: dict[str, Any], form: str) -> dict[str, Any]:
    files = {"image": ("image", image)} | ({} if mask is None else {"mask": ("mask", mask)})
    class_ = settings.pop("class_", None)
    return {"files": files, "params": given({"class": class_, "format": form, **settings})}


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


# Readers of answers, which are httpx responses. Their type is Any, so that this file does not need httpx.


def body(answer: Any) -> bytes:
    return bytes(answer.content)


def document(answer: Any) -> dict[str, Any]:
    return an_object(answer.json())


def reconstructed(answer: Any) -> dict[str, Any]:
    found = document(answer)
    return {**found, "base64": found["images"][0]["base64"]}


def latents(answer: Any) -> Latents:
    return read_npy_of_any_shape(answer.content)


def event(answer: Any) -> Event:
    """Never called: an event stream is read as it arrives."""
    raise AssertionError("a call that returns events is for `stream`, not for `do`")


def an_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its JSON is not an object but {type(value).__name__}")
    return value


def objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"its JSON is not a list but {type(value).__name__}")
    return [an_object(item) for item in value]
