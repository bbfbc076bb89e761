"""Reading of server answers by clients: within limits, with an error if an answer is not as requested."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from dsd_serve.calls import Call, Event, EventReader
from dsd_serve.errors import ServerError

T = TypeVar("T")
MAX_ANSWER = 2**28  # bytes of an answer, or of one event; the default limit
MAX_SENTENCE = 65_536  # bytes read of an answer that is rejected anyway
NOT_OURS = 502  # status of the ServerError for an answer that is not a DSD server's
NOT_THERE = 503  # its status if there is no answer
TAGS = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)
TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)


class Body:
    """The bytes of an answer: all if it is as requested, otherwise only those that the error quotes."""

    def __init__(self, url: str, answer: Any, media: str, max_bytes: int) -> None:
        self.url, self.head, self.media, self.max_bytes = url, answer, media, max_bytes
        self.kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.wrong = not answer.is_success or bool(media and self.kind != media)
        self.chunks: list[bytes] = []
        self.size = 0

    def enough(self, chunk: bytes) -> bool:
        """Add bytes; True when there are enough."""
        self.chunks.append(chunk)
        self.size += len(chunk)
        if self.wrong:
            return self.size >= MAX_SENTENCE
        if self.size > self.max_bytes:
            raise ServerError(
                f"the answer of the server at {self.url} is larger than {self.max_bytes / 1e6:.0f} MB, the limit of "
                "this client (max_bytes)",
                NOT_OURS,
            )
        return False

    def take(self, chunks: Iterator[bytes]) -> None:
        for chunk in chunks:
            if self.enough(chunk):
                return

    async def take_async(self, chunks: AsyncIterator[bytes]) -> None:
        async for chunk in chunks:
            if self.enough(chunk):
                return

    def answer(self) -> Any:
        """The answer as an httpx response with its body. Raises ServerError if it is not as requested."""
        if self.wrong:
            raise self.refusal()
        coded = ("content-encoding", "content-length", "transfer-encoding")  # the bytes are decoded
        headers = [(name, value) for name, value in self.head.headers.multi_items() if name not in coded]
        response = type(self.head)(self.head.status_code, headers=headers, content=b"".join(self.chunks))
        response.request = self.head.request
        return response

    def refusal(self) -> ServerError:
        """The error of an answer: the server's sentence, or ours if it does not come from a DSD server."""
        status, text = self.head.status_code, b"".join(self.chunks)[:MAX_SENTENCE].decode("utf-8", "replace")
        if self.head.is_error and (sentence := sentence_in(text)):
            return ServerError(sentence, status, seconds_in(self.head.headers.get("retry-after", "")))
        got = f"the server at {self.url} answered {status}"
        if self.head.is_error:
            return ServerError(f"{got}{gist(text)}", status)
        if self.head.is_redirect:
            place = str(self.head.headers.get("location", ""))[:200]
            return ServerError(f"{got}, a redirect to {place!r}, which is not followed; give the new address", NOT_OURS)
        kind = f"as {self.kind[:80]}" if self.kind else "without a type"
        return ServerError(
            f"{got} {kind}{gist(text)}, and not {self.media or 'with success'}; is dsd-serve at this address?", NOT_OURS
        )


def seconds_in(header: str) -> float | None:
    """The seconds of a Retry-After header, None without one. Its other form, a date, is not read."""
    return float(header) if header.isascii() and header.isdigit() and len(header) < 10 else None


def sentence_in(text: str) -> str:
    """The sentence of a problem document, or of OpenAI's errors; empty if there is none."""
    try:
        found = json.loads(text)
        sentence = found["detail"] if "detail" in found else found["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(sentence)[:1000]


def gist(text: str) -> str:
    """The title of a web page, or the first words of any other text, to quote after the status."""
    titles = [found.strip() for found in TITLE.findall(text)]
    words = next((title for title in titles if title), None) or TAGS.sub(" ", text)
    words = " ".join("".join(c if c.isprintable() else " " for c in words[:2000]).split())
    return f": {words[:200]!r}" if words else ""


def result(url: str, call: Call[T], answer: Any) -> T:
    try:
        return call.read(answer)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise unreadable(url, f"its answer to {call.path}", error) from None


def events(url: str, reader: EventReader, chunk: bytes) -> Iterator[Event]:
    try:
        yield from reader.feed(chunk)
    except (ValueError, RecursionError) as error:
        raise unreadable(url, "its event stream", error) from None


def check_end(url: str, reader: EventReader) -> None:
    if not reader.done:
        raise ServerError(f"the event stream of the server at {url} ended before the event `done`", NOT_OURS)


def unreadable(url: str, what: str, error: Exception) -> ServerError:
    why = f"{type(error).__name__}: {str(error)[:200]}"
    return ServerError(f"the server at {url} is not understood: {what} cannot be read ({why})", NOT_OURS)


def unreachable(url: str, error: Exception) -> ServerError:
    import httpx

    if isinstance(error, httpx.DecodingError):
        return unreadable(url, "its answer", error)
    why = str(error)[:200] or type(error).__name__
    return ServerError(f"the server at {url} cannot be reached: {why}; is dsd-serve running?", NOT_THERE)
