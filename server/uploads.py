"""Reading uploaded pictures, within limits."""

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from dsd_serve.errors import InputError


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """The picture in a request: its body, or the field `image` of a form. 413 when it is larger than max_bytes."""
    too_large = HTTPException(413, f"the body is larger than {max_bytes / 1e6:g} MB, which is the limit of this server")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    data = await form_file(request, bytes(body)) if kind == "multipart/form-data" else bytes(body)
    if not data:
        raise InputError("the body is empty; send a PNG, JPEG or WebP as the body, or as the field image of a form")
    return data


async def form_file(request: Request, body: bytes) -> bytes:
    """The field `image` of a multipart form whose bytes have been read already."""

    async def replay() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=4, max_fields=16) as form:
            field = form.get("image")
            if not isinstance(field, UploadFile):
                raise InputError(f"the form must have a file field named image, got {', '.join(form) or 'no fields'}")
            return await field.read()
    except MultiPartException as error:
        raise InputError(f"the form cannot be read: {error.message}") from None
    except HTTPException as error:  # Starlette turns its own MultiPartException into a 400
        raise InputError(f"the form cannot be read: {error.detail}") from None
