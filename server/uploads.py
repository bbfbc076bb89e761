"""Reading uploaded pictures, within limits."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from dsd_serve.errors import InputError
from server.settings import Settings

MAX_FIELDS = 40


async def read_upload(request: Request, settings: Settings) -> bytes:
    """The file in a request: its body, or the field `image` of a form. 413 when it is larger than allowed."""
    return (await read_uploads(request, ("image",), settings))["image"]


async def read_uploads(
    request: Request, names: Sequence[str], settings: Settings, required: Sequence[str] = ()
) -> dict[str, bytes]:
    """The files of a form by field name, those of `names` that are there; a body that is no form is the first.

    required: which must be there, the first by default. All together may be max_body_mb long.
    """
    body = await read_body(request, int(settings.max_body_mb * 1e6))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files = await form_files(request, body, names) if kind == "multipart/form-data" else {names[0]: body}
    for name in required or names[:1]:
        if not files.get(name):
            raise InputError("the body is empty; send a PNG, JPEG or WebP as the body, or as the field image of a form")
    return files


@dataclass
class Form:
    """What was sent in a form: files and text fields by name."""

    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


async def read_form(request: Request, files: Sequence[str], fields: Collection[str], settings: Settings) -> Form:
    """The named files and text fields of a multipart form; others are refused.

    A name may end with [], as some clients write the items of a list; those of a text field are joined with commas.
    """
    body = await read_body(request, int(settings.max_body_mb * 1e6))
    form = Form()
    for sent, value in await form_items(request, body):
        name = sent.removesuffix("[]")
        if name not in files and name not in fields:
            raise InputError(
                f"there is no field {name[:80]!r} in this form; it may have {', '.join((*files, *fields))}"
            )
        if name in form.files or (name in form.fields and name == sent):
            raise InputError(f"the form has the field {name} twice; it takes one")
        if name in files:
            if isinstance(value, str):
                raise InputError(f"the form field {name} must be a file, as curl -F {name}=@FILE sends it")
            form.files[name] = value
            continue
        try:
            text = value if isinstance(value, str) else value.decode()
        except UnicodeDecodeError:
            raise InputError(f"the form field {name} must be text in UTF-8") from None
        form.fields[name] = f"{form.fields[name]},{text}" if name in form.fields else text
    return form


async def form_items(request: Request, body: bytes) -> list[tuple[str, bytes | str]]:
    """The names of all fields of a multipart form whose bytes have been read already, with bytes of files or text."""

    async def replay() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=MAX_FIELDS, max_fields=MAX_FIELDS) as form:
            return [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
    except MultiPartException as error:
        raise InputError(f"the form cannot be read: {error.message}") from None
    except HTTPException as error:  # Starlette turns its own MultiPartException into a 400
        raise InputError(f"the form cannot be read: {error.detail}") from None


async def read_body(request: Request, max_bytes: int) -> bytes:
    too_large = HTTPException(413, f"the body is larger than {max_bytes / 1e6:g} MB, which is the limit of this server")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


async def form_files(request: Request, body: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The file fields of a multipart form whose bytes have been read already."""
    items = await form_items(request, body)
    files = {name: value for name, value in items if name in names and isinstance(value, bytes)}
    if names[0] not in files:
        sent = ", ".join(name for name, _ in items) or "no fields"
        raise InputError(f"the form must have a file field named {names[0]}, got {sent}")
    return files
