"""What stands between visitors and Gradio: an allow-list of its routes, no requests of other sites, bounded uploads."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsd_serve.errors import InputError
from ui.private_files import MAX_FILE, FolderFullError, Uploads

MAX_FILES = 4  # of one upload
NAME = "[A-Za-z0-9_-]{1,64}"
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
    rf"|/(assets|static|svelte)/.*"
    rf"|/studio/(state|class/[0-9]{{1,9}}\.png)"
    rf"|/gradio_api/(info|startup-events|queue/data|theme\.css|heartbeat/{NAME}|call/(v2/)?{NAME}/{NAME})"
)
WRITE = re.compile(rf"/gradio_api/(queue/join|cancel|run/predict|call/(v2/)?{NAME})")
UPLOAD = "/gradio_api/upload"
PROGRESS = "/gradio_api/upload_progress"
FILE = "/gradio_api/file="
# Gradio writes the address of the server into its page, as the Host header of the request says it. Behind a proxy that
# does not pass Host on, as nginx by default, only the browser knows the right one.
MARK = b"<script data-gradio-mode>"
AT_OWN_ADDRESS = (
    b"<script>gradio_config.root = location.origin + "
    b"new URL(gradio_config.root, location.href).pathname.replace(/\\/$/, '')</script>"
)
ELSEWHERE = (
    "this server takes requests of its own pages only, and this one comes from {origin}; if that is a proxy in front "
    "of it, let it pass the header Host on (nginx: proxy_set_header Host $http_host)"
)


class GuardedBlocks(gr.Blocks):
    """Blocks whose every event, however it is called, gets its files through `uploads`."""

    def __init__(self, uploads: Uploads, **settings: Any) -> None:
        self.uploads = uploads
        super().__init__(**settings)

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **settings: Any) -> dict[str, Any]:
        session = settings.get("session_hash") or ""
        if not isinstance(block_fn, int) and block_fn.queue and settings.get("event_id") is None:
            raise gr.Error("this event goes through the queue: POST /gradio_api/queue/join", print_exception=False)
        try:
            admitted = self.uploads.admit(inputs, session)
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from None
        output = await super().process_api(block_fn, admitted, *args, **settings)
        self.uploads.made(output.get("data"), session)
        return output


class Guard:
    """ASGI middleware around the page. 404 for routes of Gradio that it does not need, 403 for pages of other sites."""

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no WebSocket
        answer = await self.answer(scope, receive)
        if answer is not None:
            await answer(scope, receive, send)
            return

        async def without_cors(message: Message) -> None:
            """Gradio allows every origin by itself."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
            await send(message)

        await self.app(scope, receive, rewritten(without_cors) if path_of(scope) == "/" else without_cors)

    async def answer(self, scope: Scope, receive: Receive) -> Response | None:
        """The answer to what does not go to Gradio; None for what does."""
        method, path = scope["method"], path_of(scope)
        headers = Headers(scope=scope)
        if method in ("GET", "HEAD"):
            if path == PROGRESS:
                return StreamingResponse(iter(['data: {"msg": "done"}\n\n']), media_type="text/event-stream")
            if path.startswith(FILE):
                allowed = self.uploads.may_fetch(path.removeprefix(FILE))
            else:
                allowed = READ.fullmatch(path) is not None
            return None if allowed else missing()
        if method != "POST" or not (path == UPLOAD or WRITE.fullmatch(path)):
            return missing()
        if (origin := foreign_origin(headers)) is not None:
            return JSONResponse({"detail": ELSEWHERE.format(origin=origin[:80])}, 403)
        return await self.upload(scope, receive) if path == UPLOAD else None

    async def upload(self, scope: Scope, receive: Receive) -> Response:
        """Store the files of a form, named `files`; the answer is the list of their paths, as Gradio's own."""
        address = (scope.get("client") or ("unknown",))[0]
        with self.uploads.receiving(address) as receiving:

            async def counted() -> Message:
                message = await receive()
                receiving.take(len(message.get("body", b"")))
                if receiving.size > MAX_FILES * MAX_FILE:
                    raise too_large()
                return message

            request = Request(scope, counted)
            try:
                if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
                    return PlainTextResponse("an upload must be a form with files, multipart/form-data", 415)
                async with request.form(max_files=MAX_FILES, max_fields=MAX_FILES) as form:
                    files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                    if any((file.size or 0) > MAX_FILE for file in files):
                        raise too_large()
                    paths = [
                        await self.uploads.keep(file.file, file.filename or "", file.size or 0, address)
                        for file in files
                    ]
            except FolderFullError as error:
                return PlainTextResponse(str(error), 507)
            except MultiPartException as error:
                return PlainTextResponse(f"the form cannot be read: {error.message[:200]}", 400)
            except HTTPException as error:
                return PlainTextResponse(str(error.detail)[:200], error.status_code)
        return JSONResponse(paths)


def install(app: FastAPI, uploads: Uploads) -> None:
    app.add_middleware(Guard, uploads=uploads)


def rewritten(send: Send) -> Send:
    """Sends the page itself with AT_OWN_ADDRESS in it."""
    start: Message = {}
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = b"".join(parts).replace(MARK, AT_OWN_ADDRESS + MARK, 1)
            headers = MutableHeaders(raw=start["headers"])
            if body or "content-length" not in headers:  # the answer to HEAD has a length and no body
                headers["content-length"] = str(len(body))
            await send({**start, "headers": headers.raw})
            await send({"type": "http.response.body", "body": body})

    return collect


def path_of(scope: Mapping[str, Any]) -> str:
    """The path below the root path."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def missing() -> Response:
    return JSONResponse({"detail": "Not Found"}, 404)


def too_large() -> HTTPException:
    return HTTPException(413, f"a file may have at most {MAX_FILE / 1e6:g} MB, and an upload {MAX_FILES} files")


def foreign_origin(headers: Headers) -> str | None:
    """The other site whose page sends this request; None for the page's own, and for programs, which name none.

    Browsers send Sec-Fetch-Site where the connection is secure or local, else Origin. A proxy that does not pass Host
    on may set X-Forwarded-Host: a page of another site cannot, because it would need permission (CORS) to do so.
    """
    origin = headers.get("origin")
    site = headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):
        return None
    if site is not None:
        return origin or site
    if origin is None:
        return None
    hosts = {headers.get("host"), *headers.get("x-forwarded-host", "").replace(" ", "").split(",")}
    return None if urlsplit(origin).netloc in hosts - {"", None} else origin
