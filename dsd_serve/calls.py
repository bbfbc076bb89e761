"""The requests of the HTTP API as plain values: what is sent, and how the answer is read. client.py sends them."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from dsd_serve.errors import ServerError
from dsd_serve.rows import Latents

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. `arguments` are those of httpx's request; `read` makes the result of its response."""

    method: str
    path: str
    read: Callable[[Any], T]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """A server-sent event: name is preview, image, error or done, data what /docs describes under that name."""

    name: str
    data: dict[str, Any]


class EventReader:
    """Lines of an event stream -> events."""

    def __init__(self) -> None:
        self.name, self.data = "", ""

    def line(self, text: str) -> Event | None:
        """The event that this line ends, if it ends one."""
        if text.startswith("event:"):
            self.name = text[6:].strip()
        elif text.startswith("data:"):
            self.data += text[5:].strip()
        elif not text and self.data:
            event = Event(self.name, json.loads(self.data))
            self.name, self.data = "", ""
            return event
        return None


def generate(class_: str | int, **settings: Any) -> Call[bytes]:
    """Pictures of a class in one file. settings: seed, n, steps, sampler, guidance, format, size ...; see /docs."""
    return Call("POST", "/generate", body, {"json": {"class": class_, **given(settings)}})


def generate_json(class_: str | int, **settings: Any) -> Call[dict[str, Any]]:
    """Each picture as base64, with the settings that were used."""
    return Call("POST", "/generate", document, {"json": {"class": class_, "format": "json", **given(settings)}})


def generate_events(class_: str | int, **settings: Any) -> Call[Event]:
    """Previews while it samples, then pictures; for `stream`. settings: preview_every too."""
    return Call("POST", "/generate", event, {"json": {"class": class_, "format": "events", **given(settings)}})


def edit_json(picture: bytes, mask: bytes | None = None, **settings: Any) -> Call[dict[str, Any]]:
    """A picture redrawn, where a mask is white if there is one. settings: class_, strength and those of generate."""
    return Call("POST", "/edit", document, edit_arguments(picture, mask, settings, "json"))


def edit_events(picture: bytes, mask: bytes | None = None, **settings: Any) -> Call[Event]:
    """The same with previews; for `stream`."""
    return Call("POST", "/edit", event, edit_arguments(picture, mask, settings, "events"))


def reconstruct(picture: bytes, **settings: Any) -> Call[dict[str, Any]]:
    """Encode and decode a picture: {"base64": PNG, "psnr": dB, "size": pixels}. settings: size."""
    return Call(
        "POST", "/reconstruct", reconstructed, {"content": picture, "params": {"format": "json", **given(settings)}}
    )


def encode(picture: bytes) -> Call[Latents]:
    """The latents of a picture, float32 [L, C]."""
    return Call("POST", "/encode", latents, {"content": picture, "params": {"format": "npy"}})


def decode(z: Latents, **settings: Any) -> Call[bytes]:
    """The picture of latents [L, C]. settings: format, size."""
    buffer = io.BytesIO()
    np.save(buffer, z.astype(np.float32), allow_pickle=False)
    return Call("POST", "/decode", body, {"content": buffer.getvalue(), "params": given(settings)})


def interpolate(start: dict[str, Any], end: dict[str, Any], **settings: Any) -> Call[dict[str, Any]]:
    """A walk between two ends, {"class": 207, "seed": 1} each. settings: n, steps, sampler, guidance, size."""
    wanted = {"from": start, "to": end, "format": "json", **given(settings)}
    return Call("POST", "/interpolate", document, {"json": wanted})


def interpolate_pictures(start: bytes, end: bytes, **settings: Any) -> Call[dict[str, Any]]:
    """A walk between the latents of two pictures. settings: n, size."""
    files = {"from": ("from", start), "to": ("to", end)}
    return Call("POST", "/interpolate", document, {"files": files, "params": {"format": "json", **given(settings)}})


def classes(query: str = "") -> Call[list[dict[str, Any]]]:
    """The classes that the model can draw, or those that match."""
    return Call("GET", "/classes", lambda answer: list(answer.json()), {"params": {"q": query}})


def model() -> Call[dict[str, Any]]:
    """What the server serves."""
    return Call("GET", "/model", document)


def card() -> Call[str]:
    """The model card, Markdown."""
    return Call("GET", "/model/card", lambda answer: str(answer.text))


def batcher() -> Call[dict[str, Any]]:
    """What runs and waits on the server now."""
    return Call("GET", "/debug/batcher", document)


def edit_arguments(picture: bytes, mask: bytes | None, settings: dict[str, Any], form: str) -> dict[str, Any]:
    files = {"image": ("image", picture)} | ({} if mask is None else {"mask": ("mask", mask)})
    class_ = settings.pop("class_", None)
    return {"files": files, "params": given({"class": class_, "format": form, **settings})}


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


# Reading answers, which are httpx responses. Their type is not named: this file needs no httpx.


def body(answer: Any) -> bytes:
    return bytes(answer.content)


def document(answer: Any) -> dict[str, Any]:
    return dict(answer.json())


def reconstructed(answer: Any) -> dict[str, Any]:
    found = document(answer)
    return {**found, "base64": found["images"][0]["base64"]}


def latents(answer: Any) -> Latents:
    return np.asarray(np.load(io.BytesIO(answer.content), allow_pickle=False), np.float32)


def event(answer: Any) -> Event:
    """An event stream is read line by line, never as one answer."""
    raise AssertionError("a call that gives events is for `stream`, not for `do`")


def error_of(answer: Any) -> ServerError:
    """What went wrong, as the server said it; the body of the response must have been read."""
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"the server answered {answer.status_code}: {answer.text[:200]}"
    return ServerError(detail, answer.status_code)
