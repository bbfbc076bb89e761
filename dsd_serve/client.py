"""A client of the HTTP API, used by the demo page, the benchmarks and the tests."""

from types import TracebackType
from typing import Any

from dsd_serve.errors import ServerError


class Client:
    """Calls a DSD server. Raises ServerError with the server's own sentence, or one that says it cannot be reached."""

    def __init__(self, url: str = "http://localhost:8000", timeout: float = 300.0) -> None:
        import httpx

        self.httpx = httpx
        self.url = url.rstrip("/")
        self.http = httpx.Client(base_url=self.url, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def generate(self, class_: str | int, **settings: Any) -> bytes:
        """A picture as bytes. settings: seed, n, steps, sampler, guidance, format, size; see /docs of the server."""
        return bytes(self.request("POST", "/generate", json={"class": class_, **given(settings)}).content)

    def generate_json(self, class_: str | int, **settings: Any) -> dict[str, Any]:
        """All pictures of a request as base64, with the settings that were used."""
        answer = self.request("POST", "/generate", json={"class": class_, "format": "json", **given(settings)})
        return dict(answer.json())

    def reconstruct(self, picture: bytes, **settings: Any) -> dict[str, Any]:
        """Encode and decode a picture: {"base64": PNG, "psnr": dB, "size": pixels}. settings: size."""
        answer = self.request("POST", "/reconstruct", content=picture, params={"format": "json", **given(settings)})
        found = dict(answer.json())
        return {**found, "base64": found["images"][0]["base64"]}

    def classes(self, query: str = "") -> list[dict[str, Any]]:
        """The classes that the model can draw, or those that match."""
        return list(self.request("GET", "/classes", params={"q": query}).json())

    def model(self) -> dict[str, Any]:
        """What the server serves."""
        return dict(self.request("GET", "/model").json())

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self.http.request(method, path, **arguments)
        except self.httpx.TransportError as error:
            raise ServerError(
                f"the server at {self.url} cannot be reached: {error}; is dsd-serve running?", 503
            ) from None
        if answer.is_error:
            raise ServerError(detail(answer), answer.status_code)
        return answer


def given(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def detail(answer: Any) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status_code}: {answer.text[:200]}"
