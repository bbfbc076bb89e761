"""Clients of the HTTP API, used by the page, the benchmarks and the tests: `Client`, and `AsyncClient` for asyncio."""

from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dsd_serve import calls
from dsd_serve.calls import Call, Event, EventReader, error_of
from dsd_serve.errors import ServerError
from dsd_serve.rows import Latents

T = TypeVar("T")

LOCAL = ("localhost", "127.0.0.1", "::1")


class Client:
    """Calls a DSD server. Raises ServerError with the server's own sentence, or one that says it cannot be reached.

    api_key: for a server that asks for one. `do` and `stream` send any call of calls.py; the other methods are short
    for the usual ones.
    """

    def __init__(self, url: str = "http://localhost:8000", timeout: float = 300.0, api_key: str = "") -> None:
        import httpx

        self.httpx = httpx
        self.url = url.rstrip("/")
        self.http = httpx.Client(**options(self.url, timeout, api_key))

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
        return call.read(self.request(call.method, call.path, **call.arguments))

    def stream(self, call: Call[Event]) -> Iterator[Event]:
        """The events of a call as they come. Closing the iterator cancels what the server has not done yet."""
        reader = EventReader()
        try:
            with self.http.stream(call.method, call.path, **call.arguments) as answer:
                if answer.is_error:
                    answer.read()
                    raise error_of(answer)
                for line in answer.iter_lines():
                    if event := reader.line(line):
                        yield event
        except self.httpx.TransportError as error:
            raise unreachable(self.url, error) from None

    def generate(self, class_: str | int, **settings: Any) -> bytes:
        """A picture as bytes. settings: seed, n, steps, sampler, guidance, format, size; see /docs of the server."""
        return self.do(calls.generate(class_, **settings))

    def generate_json(self, class_: str | int, **settings: Any) -> dict[str, Any]:
        """All pictures of a request as base64, with the settings that were used."""
        return self.do(calls.generate_json(class_, **settings))

    def generate_events(self, class_: str | int, **settings: Any) -> Iterator[Event]:
        """Previews while it samples, then the pictures: events `preview`, `image` or `error`, and `done`."""
        return self.stream(calls.generate_events(class_, **settings))

    def edit(self, picture: bytes, mask: bytes | None = None, **settings: Any) -> dict[str, Any]:
        """A picture redrawn towards class_ by strength, or where a mask is white; pictures as base64."""
        return self.do(calls.edit_json(picture, mask, **settings))

    def reconstruct(self, picture: bytes, **settings: Any) -> dict[str, Any]:
        """Encode and decode a picture: {"base64": PNG, "psnr": dB, "size": pixels}. settings: size."""
        return self.do(calls.reconstruct(picture, **settings))

    def encode(self, picture: bytes) -> Latents:
        """The latents of a picture, float32 [L, C]."""
        return self.do(calls.encode(picture))

    def decode(self, z: Latents, **settings: Any) -> bytes:
        """The picture of latents [L, C]. settings: format, size."""
        return self.do(calls.decode(z, **settings))

    def interpolate(self, start: dict[str, Any], end: dict[str, Any], **settings: Any) -> dict[str, Any]:
        """A walk between two ends like {"class": 207, "seed": 1}; pictures as base64."""
        return self.do(calls.interpolate(start, end, **settings))

    def classes(self, query: str = "") -> list[dict[str, Any]]:
        """The classes that the model can draw, or those that match."""
        return self.do(calls.classes(query))

    def model(self) -> dict[str, Any]:
        """What the server serves."""
        return self.do(calls.model())

    def debug(self) -> dict[str, Any]:
        """What runs and waits on the server now."""
        return self.do(calls.batcher())

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """Any request; its httpx response, which is no error."""
        try:
            answer = self.http.request(method, path, **arguments)
        except self.httpx.TransportError as error:
            raise unreachable(self.url, error) from None
        if answer.is_error:
            raise error_of(answer)
        return answer


class AsyncClient:
    """The same for asyncio, for calls of calls.py. Any number of calls may be under way at a time: the server says
    when they are too many. One event loop; `close` at the end."""

    def __init__(self, url: str = "http://localhost:8000", timeout: float = 300.0, api_key: str = "") -> None:
        import httpx

        self.httpx = httpx
        self.url = url.rstrip("/")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self.http = httpx.AsyncClient(limits=limits, **options(self.url, timeout, api_key))

    def point_to(self, url: str) -> None:
        """Call the server at another address from now on."""
        self.url = self.http.base_url = url.rstrip("/")

    async def close(self) -> None:
        await self.http.aclose()

    async def do(self, call: Call[T]) -> T:
        """Send a call and read its answer."""
        try:
            answer = await self.http.request(call.method, call.path, **call.arguments)
        except self.httpx.TransportError as error:
            raise unreachable(self.url, error) from None
        if answer.is_error:
            raise error_of(answer)
        return call.read(answer)

    async def stream(self, call: Call[Event]) -> AsyncGenerator[Event, None]:
        """The events of a call as they come. Closing the iterator cancels what the server has not done yet."""
        reader = EventReader()
        try:
            async with self.http.stream(call.method, call.path, **call.arguments) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise error_of(answer)
                async for line in answer.aiter_lines():
                    if event := reader.line(line):
                        yield event
        except self.httpx.TransportError as error:
            raise unreachable(self.url, error) from None


def options(url: str, timeout: float, api_key: str) -> dict[str, Any]:
    """What both clients tell httpx. A server on this machine is never asked through a proxy."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url, "timeout": timeout, "headers": headers, "trust_env": urlsplit(url).hostname not in LOCAL}


def unreachable(url: str, error: Exception) -> ServerError:
    why = str(error) or type(error).__name__
    return ServerError(f"the server at {url} cannot be reached: {why}; is dsd-serve running?", 503)
