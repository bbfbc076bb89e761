"""Clients of the HTTP API, used by the page, the benchmarks and the tests: `Client`, and `AsyncClient` for asyncio."""

from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from dsd_serve import calls
from dsd_serve.calls import Call, Event, EventReader
from dsd_serve.client_answers import MAX_ANSWER, Body, T, check_end, events, result, unreachable
from dsd_serve.errors import ConfigError
from dsd_serve.local_hosts import is_this_machine
from dsd_serve.rows import Latents

KEEP_ALIVE = 4.0  # seconds an idle connection is reused: less than any server keeps it, or requests would be lost


class Client:
    """Calls a DSD server.

    api_key: for a server that requires one. timeout: seconds that may pass without a byte. max_bytes: maximum size of
    an answer, or of one event. `do` and `stream` send any call of calls.py; the other methods are shortcuts.

    Raises ServerError: with the server's own sentence and status; with status 502 for an answer that does not come from
    a DSD server, is cut off, or larger than max_bytes; with 503 when the server cannot be reached. A redirect is not
    followed, because it would send the API key and the request elsewhere; the error names the new address. A GET that
    was lost because the connection closed is sent once more. Raises ConfigError for a wrong address or key.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        timeout: float = 300.0,
        api_key: str = "",
        max_bytes: int = MAX_ANSWER,
    ) -> None:
        import httpx

        self.httpx = httpx
        self.url, self.max_bytes = checked(url), max_bytes
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE)
        self.http = httpx.Client(limits=limits, **options(self.url, timeout, api_key))

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def do(self, call: Call[T]) -> T:
        """Send a call and read its answer."""
        return result(self.url, call, self.request(call.method, call.path, call.media, **call.arguments))

    def stream(self, call: Call[Event]) -> Iterator[Event]:
        """The events of a call as they arrive, `done` last. Closing the iterator cancels the rest."""
        try:
            answer = self.send(call.method, call.path, call.arguments)
            try:
                body = Body(self.url, answer, call.media, self.max_bytes)
                if body.wrong:
                    body.take(answer.iter_bytes())
                    raise body.refusal()
                reader = EventReader(self.max_bytes)
                for chunk in answer.iter_bytes():
                    yield from events(self.url, reader, chunk)
                check_end(self.url, reader)
            finally:
                answer.close()
        except self.httpx.RequestError as error:
            raise unreachable(self.url, error) from None

    def generate(self, class_: str | int | None = None, **settings: Any) -> bytes:
        """An image as bytes. settings: seed, n, steps, sampler, guidance, format, size; see /docs of the server."""
        return self.do(calls.generate(class_, **settings))

    def generate_json(self, class_: str | int | None = None, **settings: Any) -> dict[str, Any]:
        """All images of a request as base64, with the settings that were used."""
        return self.do(calls.generate_json(class_, **settings))

    def generate_events(self, class_: str | int | None = None, **settings: Any) -> Iterator[Event]:
        """Previews during sampling, then the images: events `preview`, `image` or `error`, and `done`."""
        return self.stream(calls.generate_events(class_, **settings))

    def edit(self, image: bytes, mask: bytes | None = None, **settings: Any) -> dict[str, Any]:
        """An image redrawn towards class_ by strength, or only where a mask is white; images as base64."""
        return self.do(calls.edit_json(image, mask, **settings))

    def reconstruct(self, image: bytes, **settings: Any) -> dict[str, Any]:
        """Encode and decode an image: {"base64": PNG, "psnr": dB, "size": pixels}. settings: size."""
        return self.do(calls.reconstruct(image, **settings))

    def encode(self, image: bytes) -> Latents:
        """The latents of an image, float32 [L, C]."""
        return self.do(calls.encode(image))

    def decode(self, z: Latents, **settings: Any) -> bytes:
        """The image of latents [L, C]. settings: format, size."""
        return self.do(calls.decode(z, **settings))

    def interpolate(self, start: dict[str, Any], end: dict[str, Any], **settings: Any) -> dict[str, Any]:
        """A walk between two ends like {"class": 207, "seed": 1}; images as base64."""
        return self.do(calls.interpolate(start, end, **settings))

    def classes(self, query: str = "") -> list[dict[str, Any]]:
        """The classes that the model can draw, or those that match."""
        return self.do(calls.classes(query))

    def model(self) -> dict[str, Any]:
        """The server's model, engine and limits."""
        return self.do(calls.model())

    def debug(self) -> dict[str, Any]:
        """The running and waiting tasks of the server."""
        return self.do(calls.batcher())

    def request(self, method: str, path: str, media: str = "", **arguments: Any) -> Any:
        """Send any request. Returns the httpx response, whose status is 2xx and whose type is `media` if given."""
        try:
            answer = self.send(method, path, arguments)
            try:
                body = Body(self.url, answer, media, self.max_bytes)
                body.take(answer.iter_bytes())
            finally:
                answer.close()
        except self.httpx.RequestError as error:
            raise unreachable(self.url, error) from None
        return body.answer()

    def send(self, method: str, path: str, arguments: dict[str, Any]) -> Any:
        """The httpx response to a request; its body is not yet read."""
        request = self.http.build_request(method, path, **arguments)
        try:
            return self.http.send(request, stream=True)
        except (self.httpx.NetworkError, self.httpx.RemoteProtocolError):
            if method != "GET":
                raise
            return self.http.send(request, stream=True)


class AsyncClient:
    """`Client` for asyncio, for calls of calls.py. Any number of calls may run at a time; the server limits them. For
    one event loop; `close` it at the end."""

    def __init__(
        self,
        url: str = "http://localhost:8000",
        timeout: float = 300.0,
        api_key: str = "",
        max_bytes: int = MAX_ANSWER,
    ) -> None:
        import httpx

        self.httpx = httpx
        self.url, self.max_bytes = checked(url), max_bytes
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=KEEP_ALIVE)
        self.http = httpx.AsyncClient(limits=limits, **options(self.url, timeout, api_key))

    def point_to(self, url: str) -> None:
        """Call the server at another address from now on."""
        self.url = self.http.base_url = checked(url)

    async def close(self) -> None:
        await self.http.aclose()

    async def do(self, call: Call[T]) -> T:
        """Send a call and read its answer."""
        try:
            answer = await self.send(call.method, call.path, call.arguments)
            try:
                body = Body(self.url, answer, call.media, self.max_bytes)
                await body.take_async(answer.aiter_bytes())
            finally:
                await answer.aclose()
        except self.httpx.RequestError as error:
            raise unreachable(self.url, error) from None
        return result(self.url, call, body.answer())

    async def stream(self, call: Call[Event]) -> AsyncGenerator[Event, None]:
        """The events of a call as they arrive, `done` last. Closing the iterator cancels the rest."""
        try:
            answer = await self.send(call.method, call.path, call.arguments)
            try:
                body = Body(self.url, answer, call.media, self.max_bytes)
                if body.wrong:
                    await body.take_async(answer.aiter_bytes())
                    raise body.refusal()
                reader = EventReader(self.max_bytes)
                async for chunk in answer.aiter_bytes():
                    for event in events(self.url, reader, chunk):
                        yield event
                check_end(self.url, reader)
            finally:
                await answer.aclose()
        except self.httpx.RequestError as error:
            raise unreachable(self.url, error) from None

    async def send(self, method: str, path: str, arguments: dict[str, Any]) -> Any:
        """The httpx response to a request; its body is not yet read."""
        request = self.http.build_request(method, path, **arguments)
        try:
            return await self.http.send(request, stream=True)
        except (self.httpx.NetworkError, self.httpx.RemoteProtocolError):
            if method != "GET":
                raise
            return await self.http.send(request, stream=True)


# Shared by both.


def checked(url: str) -> str:
    """The address of a server without a slash at its end. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ConfigError(f"the address of a server must be like http://localhost:8000, got {url[:80]!r}")
    return url.rstrip("/")


def options(url: str, timeout: float, api_key: str) -> dict[str, Any]:
    """The options of both httpx clients. A server on this machine is never reached through a proxy."""
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("an API key must be printable ASCII characters")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    trust_env = not is_this_machine(urlsplit(url).hostname or "")
    return {"base_url": url, "timeout": timeout, "headers": headers, "trust_env": trust_env, "follow_redirects": False}
