"""A guard between visitors and Gradio: an allow-list of routes, no requests from other sites, bounded uploads."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsd_serve.errors import InputError
from dsd_serve.form_header import form_header
from dsd_serve.origins import is_foreign
from ui.paths import FILE, READABLE, UPLOAD, UPLOAD_PROGRESS, WRITABLE
from ui.private_files import MAX_FILE, FolderFullError, Uploads
from ui.site_head import rewritten

MAX_FILES = 4  # of one upload
ELSEWHERE = (
    "this server accepts requests from its own pages only, got one from {origin}; if that is a proxy in front of it, "
    "make it pass the Host header on (nginx: proxy_set_header Host $http_host)"
)


class GuardedBlocks(gr.Blocks):
    """Blocks whose events, however they are called, get their files through `uploads`."""

    def __init__(self, uploads: Uploads, **settings: Any) -> None:
        self.uploads = uploads
        super().__init__(**settings)

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> dict[str, Any]:
        session = settings.get("session_hash") or ""
        if not isinstance(block_fn, int) and block_fn.queue and settings.get("event_id") is None:
            raise gr.Error("this event needs the queue: POST /gradio_api/queue/join", print_exception=False)
        if not isinstance(block_fn, int) and block_fn.fn is None:
            raise gr.Error("this event runs in the browser only", print_exception=False)
        try:
            admitted = self.uploads.admit(inputs, session)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        output = await super().process_api(block_fn, admitted, *args, **settings)
        self.uploads.record(output.get("data"), session)
        return output


class Guard:
    """ASGI middleware around the page: 404 for Gradio's routes that it does not need, 403 for pages of other sites."""

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no WebSocket
        response = await self.respond(scope, receive)
        if response is not None:
            await response(scope, receive, send)
            return

        async def without_cors(message: Message) -> None:
            """Without the CORS headers of Gradio, which allow every origin."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
            await send(message)

        await self.app(scope, receive, with_our_head(without_cors, scope) if path_of(scope) == "/" else without_cors)

    async def respond(self, scope: Scope, receive: Receive) -> Response | None:
        """The response to a request that does not go to Gradio; None for one that does."""
        method, path = scope["method"], path_of(scope)
        headers = Headers(scope=scope)
        if method in ("GET", "HEAD"):
            if path == UPLOAD_PROGRESS:
                return StreamingResponse(iter(['data: {"msg": "done"}\n\n']), media_type="text/event-stream")
            if path.startswith(FILE):
                allowed = self.uploads.may_fetch(path.removeprefix(FILE))
            else:
                allowed = READABLE.fullmatch(path) is not None
            return None if allowed else not_found()
        if method != "POST" or not (path == UPLOAD or WRITABLE.fullmatch(path)):
            return not_found()
        if (origin := foreign_origin(headers)) is not None:
            return JSONResponse({"detail": ELSEWHERE.format(origin=origin[:80])}, 403)
        return await self.upload(scope, receive) if path == UPLOAD else None

    async def upload(self, scope: Scope, receive: Receive) -> Response:
        """Store the files of a form's field `files`. Responds with a list of their paths, as Gradio does."""
        address = (scope.get("client") or ("unknown",))[0]
        with self.uploads.receiving(address) as receiving:

            async def counted() -> Message:
                message = await receive()
                receiving.take(len(message.get("body", b"")))
                if receiving.size > MAX_FILES * MAX_FILE:
                    raise too_large()
                return message

            content_type = Headers(scope=scope).get("content-type", "")
            if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
                return PlainTextResponse("an upload must be a multipart/form-data form with files", 415)
            try:
                header = Headers({"content-type": form_header(content_type)})
                async with Request({**scope, "headers": header.raw}, counted).form(
                    max_files=MAX_FILES, max_fields=MAX_FILES
                ) as form:
                    files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                    if any((file.size or 0) > MAX_FILE for file in files):
                        raise too_large()
                    paths = [
                        await self.uploads.keep(file.file, file.filename or "", file.size or 0, address)
                        for file in files
                    ]
            except InputError as error:
                return PlainTextResponse(str(error), 422)
            except FolderFullError as error:
                return PlainTextResponse(str(error), 507)
            except MultiPartException as error:
                return PlainTextResponse(f"the form cannot be read: {error.message[:200]}", 400)
            except HTTPException as error:
                return PlainTextResponse(str(error.detail)[:200], error.status_code)
        return JSONResponse(paths)


def install(app: FastAPI, uploads: Uploads) -> None:
    app.add_middleware(Guard, uploads=uploads)


def with_our_head(send: Send, scope: Scope) -> Send:
    """A `send` of the page with our own head (ui/site_head.py)."""
    base, query = str(Request(scope).base_url), scope.get("query_string", b"").decode("latin-1")
    start: Message = {}
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = rewritten(b"".join(parts), base, query)
            headers = MutableHeaders(raw=start["headers"])
            if body or "content-length" not in headers:  # a response to HEAD has a length and no body
                headers["content-length"] = str(len(body))
            await send({**start, "headers": headers.raw})
            await send({"type": "http.response.body", "body": body})

    return collect


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request below the root path."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def not_found() -> Response:
    return JSONResponse({"detail": "Not Found"}, 404)


def too_large() -> HTTPException:
    return HTTPException(413, f"an upload may have at most {MAX_FILES} files of {MAX_FILE / 1e6:g} MB each")


def foreign_origin(headers: Headers) -> str | None:
    """The other site whose page sent this request; None for the page's own requests and for programs."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    hosts = headers.getlist("host") + headers.getlist("x-forwarded-host")
    return origin or site if is_foreign(origin, site, hosts) else None
