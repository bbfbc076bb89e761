"""Requests that are rejected before the application sees them: rules for their heads, and the answers."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from server import error_responses

WITH_BODY = ("POST", "PUT", "PATCH")  # methods whose bodies are read
MAX_HEAD = 65_536  # bytes of request line and headers; also of chunk extensions or trailers without any body between


class RejectedRequest(Exception):
    """A request that is answered before it reaches the application: status and sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def check_head(version: str, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Raises RejectedRequest for heads that the parser accepts although RFC 9110 and 9112 forbid them."""
    if version == "0.9":
        raise RejectedRequest(400, "the request line must end in HTTP/1.1 or HTTP/1.0")
    if version not in ("1.0", "1.1"):
        raise RejectedRequest(505, f"this server speaks HTTP/1.1, not HTTP/{version}")
    if method == b"CONNECT":
        raise RejectedRequest(400, "this server is not a proxy: it does not take CONNECT")
    if not target.startswith(b"/") and b"://" not in target:
        raise RejectedRequest(400, f"the path must begin with /, got {shown(target)}")
    hosts, codings, expectations = (
        [value for name, value in headers if name == key] for key in (b"host", b"transfer-encoding", b"expect")
    )
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise RejectedRequest(400, f"a request must have one Host header, got {len(hosts)}")
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise RejectedRequest(400, f"Transfer-Encoding must be chunked, got {shown(b', '.join(codings))}")
    if version == "1.1" and any(value.lower() != b"100-continue" for value in expectations):
        raise RejectedRequest(417, f"Expect must be 100-continue, got {shown(b', '.join(expectations))}")


def shown(value: bytes) -> str:
    return repr(value[:80].decode("latin-1"))


def malformed(error: httptools.HttpParserError, data: bytes) -> RejectedRequest:
    """The rejection of a request that cannot be parsed, with a hint where the parser's reason gives none."""
    reason = str(error)
    if reason == "Pause on PRI/Upgrade":
        return RejectedRequest(505, "this server speaks HTTP/1.1, not HTTP/2")
    if data.startswith(b"\x16\x03"):
        return RejectedRequest(400, "this server speaks plain HTTP: use http:// and not https://")
    if isinstance(error, httptools.HttpParserInvalidURLError) and any(byte > 0x7F for byte in data[:MAX_HEAD]):
        return RejectedRequest(400, "the URL must be ASCII: percent-encode what is not, as gr%C3%B6%C3%9Fe")
    if isinstance(error, httptools.HttpParserCallbackError):
        return RejectedRequest(400, "the URL must be a path such as /generate?class=207, of at most 65,535 bytes")
    return RejectedRequest(400, f"this is not a valid HTTP/1.1 request: {reason}")


def answer_of(refused: RejectedRequest, headers: list[tuple[bytes, bytes]]) -> bytes:
    """A problem document with its head."""
    body = error_responses.problem(refused.status, refused.sentence).body
    lines = [name + b": " + value for name, value in headers]
    lines += [
        b"content-type: " + error_responses.MEDIA_TYPE.encode(),
        b"content-length: %d" % len(body),
        b"connection: close",
    ]
    return STATUS_LINE[refused.status] + b"\r\n".join([*lines, b"", body])
