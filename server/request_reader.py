"""Reading requests: settings in JSON, uploaded files and the fields of forms, within limits.

A route that takes images does

    form = await read_uploads(request, files=("image", "mask"), fields=("strength",))
    pixels = await form.read_image("image", service.decoder, size)

or `await read_images(request, service.decoder, size)`. A form gives each of its files away once, so nothing of the body
is left when all are read, however long the drawing takes; then it is not counted any more.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Scope

from dsd_serve.errors import InputError, shown
from dsd_serve.form_header import form_header
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.rows import Pixels
from dsd_serve.strict_json import read_json
from server import error_responses
from server.request_memory import RequestResources, resources_of

Model = TypeVar("Model", bound=BaseModel)
Read = TypeVar("Read")

NO_OBJECT = "the body must be a JSON object, with the header content-type: application/json"

MAX_FIELD_BYTES = 10_000
ANY_BYTES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # curl says the last of any file


def media_type(scope: Scope) -> str:
    """The type of a request's body, in lower case and without parameters; empty without the header."""
    kind: str | None = scope.get("dsd.media_type")
    if kind is None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        scope["dsd.media_type"] = kind
    return kind


async def read_settings(request: Request, model: type[Model], *, openai: bool = False) -> Model:
    """The settings in a JSON body, in which numbers must be numbers.

    The body must be said to be JSON, which pages of other sites cannot do unasked; otherwise 415, under /v1 400. Only
    there a query string is ignored, as OpenAI's API does.
    """
    kind = media_type(request.scope)
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(400 if openai else 415, f"{NO_OBJECT}, not {shown(kind)}" if kind else NO_OBJECT)
    if request.scope["query_string"] and not openai:
        raise InputError("the settings are in the JSON body here; nothing may be in the query string")
    values: Any = read_json(b"".join([chunk async for chunk in request.stream()]))
    resources_of(request.scope).drop("body")
    if not isinstance(values, dict):
        raise InputError(f"{NO_OBJECT}, got {shown(values)}")
    return error_responses.validated(model, values, strict=True)


@dataclass
class Form:
    """Uploaded files and text fields by name. A body that is not a form is the first file.

    held: what its request holds; when the last file has been read, nothing of the body.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    held: RequestResources = field(default_factory=lambda: RequestResources(None))

    async def read_image(self, name: str, decoder: "Decoder", size: int, *, opacity: bool = False) -> Pixels:
        """The pixels of an uploaded image, as `Decoder.read` gives them. Its bytes are gone afterwards."""
        pixels = await decoder.read(self.files.pop(name), size, opacity=opacity, who=self.held.who)
        self.done()
        return pixels

    def parse(self, name: str, parser: Callable[[bytes], Read]) -> Read:
        """The parsed file. Its bytes are freed."""
        parsed = parser(self.files.pop(name))
        self.done()
        return parsed

    def done(self) -> None:
        if not self.files:
            self.held.drop("body")


async def read_uploads(
    request: Request,
    files: Sequence[str] = ("image",),
    fields: Collection[str] = (),
    media_types: Collection[str] = (),
) -> Form:
    """The named files and text fields of a form; or the body, as the first of the files, which must be there.

    media_types: accepted types of the body, in addition to images. Raises InputError for a form that is not as
    described, and 415 for another type of body. The size and time of the body are limited by BodyLimits.
    """
    kind = media_type(request.scope)
    if kind == "multipart/form-data":
        form = await read_form(request, files, fields)
    elif kind in ANY_BYTES or kind.startswith("image/") or kind in media_types:
        form = Form({files[0]: b"".join([chunk async for chunk in request.stream()])})
    else:
        types = " or ".join(media_types) or "image/png or its like"
        raise HTTPException(
            415, f"send the file as the body, with content-type {types}, or as a form, not {shown(kind)}"
        )
    name = files[0]
    if name not in form.files:
        raise InputError(f"the form has no file in the field {name}; curl -F {name}=@FILE sends one")
    if not form.files[name]:
        what = f"file in the form field {name}" if kind == "multipart/form-data" else "body"
        raise InputError(f"the {what} is empty; send a file as the body, or as the field {name} of a form")
    form.held = resources_of(request.scope)
    return form


async def read_form(request: Request, files: Sequence[str], fields: Collection[str]) -> Form:
    """Parse a multipart form as it comes in. Nothing is written to disk."""
    parser = FormParser(request, files, fields)
    try:
        parts = await parser.parse()
    except MultiPartException as error:
        raise unreadable(str(error.__cause__ or error.message)) from None
    if not parser.complete:
        raise InputError("the form cannot be read: it ends before its closing boundary; send the whole form")
    form = Form(held=resources_of(request.scope))
    texts: dict[str, list[str]] = {}
    for sent, value in parts.multi_items():
        name = sent.removesuffix("[]")
        if isinstance(value, UploadFile):
            form.files[name] = await value.read()
            await value.close()
        else:
            texts.setdefault(name, []).append(value)
    form.fields = {name: ",".join(values) for name, values in texts.items()}
    return form


def unreadable(reason: str) -> InputError:
    """The error for a form that the parser refused. reason: in the parser's words."""
    reason = reason[:1].lower() + reason[1:200].rstrip(".")
    rule = (
        "its parts must begin with the boundary that content-type names, and its lines end in CR LF"
        if "boundary" in reason
        else "it must be multipart/form-data, as curl -F and browsers send it"
    )
    return InputError(f"the form cannot be read ({reason}): {rule}")


class FormParser(MultiPartParser):
    """Starlette's parser, restricted to the named files and text fields. Every file stays in memory.

    Raises InputError if the form has no boundary, and from within `parse` at the first part that is not as described.
    """

    spool_max_size = 0  # bytes of a file in memory; 0 is no limit, because BodyLimits counts them

    def __init__(self, request: Request, files: Sequence[str], fields: Collection[str]) -> None:
        header = form_header(request.headers["content-type"])
        super().__init__(Headers({"content-type": header}), request.stream())
        self.files, self.fields = files, fields
        self.names: set[str] = set()
        self.sizes: Counter[str] = Counter()  # bytes of text by name, in all parts
        self.complete = False

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        name = part.field_name.removesuffix("[]")  # as some clients write the items of a list
        if name not in self.files and name not in self.fields:
            known = ", ".join([*self.files, *self.fields])
            raise InputError(f"unknown form field {shown(name)}; this form takes {known}")
        if name in self.names and (name in self.files or name == part.field_name):
            raise InputError(f"the form has the field {name} twice; it takes one")
        if name in self.files and part.file is None:
            raise InputError(f"the form field {name} must be a file, as curl -F {name}=@FILE sends it")
        if name in self.fields:
            part.file = None  # text, even if the client gave it a file name
        self.names.add(name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        super().on_part_data(data, start, end)
        part = self._current_part
        if part.file is None:
            self.sizes[part.field_name] += end - start
            if self.sizes[part.field_name] > MAX_FIELD_BYTES:
                raise InputError(f"the form field {part.field_name} has more than {MAX_FIELD_BYTES} bytes")

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is not None:
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, part.data.decode()))  # where Starlette falls back to Latin-1
        except UnicodeDecodeError:
            raise InputError(f"the form field {part.field_name} must be text in UTF-8") from None

    def on_end(self) -> None:
        self.complete = True


async def read_images(
    request: Request, decoder: Decoder, size: int, files: Sequence[str] = ("image",)
) -> dict[str, Pixels]:
    """The centre squares of the images in a request, by name: its body is the first, or it is a form with those that it
    has of `files`."""
    form = await read_uploads(request, files)
    return {name: await form.read_image(name, decoder, size) for name in list(form.files)}


async def read_file(request: Request, name: str, media_types: Collection[str], parser: Callable[[bytes], Read]) -> Read:
    """The parsed file of a request: its body, or the field `name` of a form."""
    form = await read_uploads(request, (name,), media_types=media_types)
    return form.parse(name, parser)
