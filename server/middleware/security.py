"""Who may use the server: API keys with limits, which web pages (CORS), and under which names it answers.

A key is written name:key[:requests_per_minute[:images_at_once]], where 0 is no limit; see `load_keys`. With keys,
everything needs one except /health and the documentation, which holds no secret and in which a key is entered.
"""

import hashlib
import hmac
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dsd_serve.errors import ConfigError, InputError, QueueFullError
from server import error_responses
from server.middleware.hosts import AllowedHosts, OwnPages
from server.middleware.request_id import Mistakes

log = logging.getLogger(__name__)

VARIABLE = "DSD_API_KEYS"
FORM = "name:key[:requests_per_minute[:images_at_once]]"
MIN_KEY = 16  # characters; guessing must be hopeless, nothing slows it down
MAX_KEY = 1024  # characters; it must fit into a header
MAX_FILE = 1_000_000  # bytes of a file of keys
OPEN = re.compile(r"/health/.*|/docs(/assets/.*)?|/redoc|/openapi\.json")  # paths that need no key
ORIGIN = re.compile(r"https?://[^/\s?#@*]+")


@dataclass(eq=False)
class ApiKey:
    """A key, of which only the digest is kept, and what its holder may do. 0 is no limit."""

    name: str
    digest: bytes = field(repr=False)
    per_minute: int = 0
    images_at_once: int = 0
    images: int = 0  # in the batcher now
    tokens: float = 0.0
    filled: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = self.per_minute

    def take(self, now: float) -> float:
        """Take a token of the bucket, which holds those of a minute: 0, or the seconds until there is one."""
        if not self.per_minute:
            return 0.0
        rate = self.per_minute / 60
        self.tokens = min(self.per_minute, self.tokens + (now - self.filled) * rate)
        self.filled = now
        if self.tokens < 1:
            return (1 - self.tokens) / rate
        self.tokens -= 1
        return 0.0


current_key: ContextVar[ApiKey | None] = ContextVar("current_key", default=None)


# Reading keys. No message may repeat a key.


def load_keys(path: str, environment: Mapping[str, str]) -> list[ApiKey]:
    """The keys of a file (empty path: none) and those of DSD_API_KEYS, comma separated. Raises ConfigError.

    In the file `#` begins a comment, at the start of a line or after a space.
    """
    keys = []
    if path:
        keys += [parse_key(text, where) for where, text in read_file(Path(path))]
    items = [item.strip() for item in environment.get(VARIABLE, "").split(",")]
    keys += [parse_key(item, f"key {i} of {VARIABLE}") for i, item in enumerate(items, 1) if item]
    for what, values in (("names", [key.name for key in keys]), ("keys", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"the {what} of API keys must differ, and two of {len(keys)} are the same")
    return keys


def renew(keys: list[ApiKey], read: Sequence[ApiKey]) -> None:
    """Put keys that were read again in the place of those before. Who stays keeps what he has used up."""
    if not read:
        raise ConfigError("there is no API key any more, and without one everybody could send requests")
    before = {(key.name, key.digest): key for key in keys}
    renewed = []
    for key in read:
        kept = before.get((key.name, key.digest), key)
        kept.per_minute, kept.images_at_once = key.per_minute, key.images_at_once
        kept.tokens = min(kept.tokens, kept.per_minute)
        renewed.append(kept)
    keys[:] = renewed


def read_file(path: Path) -> list[tuple[str, str]]:
    """(where, text) of each key in a file."""
    # A key given where the file's name belongs must not reach the log.
    file = "the file that api_keys names" if ":" in str(path) else str(path)
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_FILE + 1)
        text = data.decode("utf-8-sig")
        readable_by_all = path.stat().st_mode & 0o004
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the API keys in {file} cannot be read: {reason}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{file} is not a file of API keys: it is larger than {MAX_FILE // 1_000_000} MB")
    if readable_by_all:
        log.warning("everybody on this machine can read the API keys in %s: chmod 600 it", file)
    lines = re.split("\r\n|\r|\n", text)
    found = [(f"line {i} of {file}", re.split(r"(?:^|\s)#", line)[0].strip(" \t")) for i, line in enumerate(lines, 1)]
    found = [(where, line) for where, line in found if line]
    if not found:
        raise ConfigError(f"{file} holds no API key; each line must be {FORM}")
    return found


def parse_key(text: str, where: str) -> ApiKey:
    parts = [part.strip(" \t") for part in text.split(":")]
    if not 2 <= len(parts) <= 4 or not all(re.fullmatch("[0-9]{1,6}", part) for part in parts[2:]):
        raise ConfigError(f"{where} must be {FORM}, the numbers from 0 to 999999")
    name, secret = parts[:2]
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"the name in {where} must be 1 to 64 letters, digits, dots, dashes or underscores")
    if not re.fullmatch(f"[!-~]{{{MIN_KEY},{MAX_KEY}}}", secret):
        raise ConfigError(
            f"the key in {where} must have at least {MIN_KEY} ASCII characters, at most {MAX_KEY}, and no spaces; "
            "this makes one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return ApiKey(name, digest(secret), *map(int, parts[2:]))


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("latin-1", "replace")).digest()


# Checking them.


def find(keys: Sequence[ApiKey], secret: str) -> ApiKey | None:
    """The key that was sent. Looks at all of them in constant time, so that the time taken tells nothing."""
    sent, found = digest(secret), None
    for key in keys:
        if hmac.compare_digest(sent, key.digest):
            found = key
    return found


def sent_key(headers: Headers) -> str:
    """`Authorization: Bearer KEY`, or `X-API-Key: KEY`; empty without either."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def needs_no_key(path: str) -> bool:
    return OPEN.fullmatch(path) is not None


class KeyMiddleware:
    """ASGI middleware that lets in who has a key and stays within its rate."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[ApiKey], used: Callable[[str], None], rejected: Callable[[str], None]
    ) -> None:
        self.app, self.keys, self.used, self.rejected = app, keys, used, rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or needs_no_key(scope["path"]):
            await self.app(scope, receive, send)
            return
        secret = sent_key(Headers(scope=scope))
        key = find(self.keys, secret)
        if key is None:
            self.rejected("unauthorized")
            what = "this API key is not known here" if secret else "this server needs an API key"
            detail = f"{what}; send the header Authorization: Bearer KEY, or X-API-Key: KEY"
            error = HTTPException(401, detail, {"WWW-Authenticate": 'Bearer realm="dsd"'})
            await error_responses.answer(error, scope, receive, send)
            return
        self.used(key.name)
        if wait := key.take(time.monotonic()):
            self.rejected("rate_limit")
            detail = f"the key {key.name} may send {key.per_minute} requests a minute; try again in {math.ceil(wait)} s"
            await error_responses.answer(QueueFullError(detail, wait), scope, receive, send)
            return
        current_key.set(key)
        await self.app(scope, receive, send)


def claim_images(count: int) -> Callable[[], None]:
    """Count `count` images of the key of this request as under way, until the function that this returns is called.

    Raises InputError when the key may never have so many at once, QueueFullError when not now.
    """
    key = current_key.get()
    if key is None or not key.images_at_once:
        return lambda: None
    if count > key.images_at_once:
        raise InputError(f"the key {key.name} may have {key.images_at_once} images at once, got {count}")
    if key.images + count > key.images_at_once:
        raise QueueFullError(
            f"the key {key.name} may have {key.images_at_once} images at once and {key.images} are under way; "
            "try again when they are done",
            1.0,
        )
    key.images += count

    def release() -> None:
        key.images -= count

    return release


def parse_origins(text: str) -> list[str]:
    """Origins of --cors-origins: `https://a.example,https://b.example`, or `*` for every page."""
    origins = [item.strip() for item in text.split(",") if item.strip()]
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"cors_origins must be like https://a.example,https://b.example:8080 (no path, no slash at the end) "
                f"or *, got {origin!r}"
            )
    if "*" in origins and len(origins) > 1:
        raise ConfigError("cors_origins must be either * or a list of origins, got both")
    return origins


def install(
    app: FastAPI,
    *,
    keys: Sequence[ApiKey],
    hosts: Sequence[str],
    origins: Sequence[str],
    used: Callable[[str], None],
    rejected: Callable[[str], None],
) -> None:
    """hosts, origins: as parse_hosts and parse_origins give them. used(name of a key) and rejected(reason) are called
    for each request."""
    if keys:
        app.add_middleware(KeyMiddleware, keys=keys, used=used, rejected=rejected)
    app.add_middleware(OwnPages, origins=origins, rejected=rejected)
    app.add_middleware(AllowedHosts, names=hosts, rejected=rejected)
    if origins:
        app.add_middleware(Mistakes)  # so that a page may read this answer too
        # Outside of the others: a browser's preflight request carries no key, and a page may read every refusal
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[
                "*"
            ],  # which pages may send requests is decided by their origin; clients add headers of theirs
            allow_private_network=True,
            expose_headers=["*"],  # X-DSD-*, X-Request-ID, Retry-After, ETag ...
        )
