"""Reading uploaded pictures, within limits."""

from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from dsd_serve.errors import InputError
from server.settings import Settings


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

    async def replay() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    files = {}
    try:
        async with Request(request.scope, replay).form(max_files=4, max_fields=16) as form:
            for name in names:
                field = form.get(name)
                if isinstance(field, UploadFile):
                    files[name] = await field.read()
            if names[0] not in files:
                raise InputError(
                    f"the form must have a file field named {names[0]}, got {', '.join(form) or 'no fields'}"
                )
            return files
    except MultiPartException as error:
        raise InputError(f"the form cannot be read: {error.message}") from None
    except HTTPException as error:  # Starlette turns its own MultiPartException into a 400
        raise InputError(f"the form cannot be read: {error.detail}") from None
