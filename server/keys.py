"""API keys: reading them, finding the one that was sent, and the limits of its holder.

A key is written name:key[:requests_per_minute[:images_at_once]], where 0 means no limit; see `load_keys`.
"""

import hashlib
import hmac
import logging
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers

from dsd_serve.errors import ConfigError, InputError, QueueFullError

log = logging.getLogger(__name__)

VARIABLE, ADMIN_VARIABLE = "DSD_API_KEYS", "DSD_ADMIN_KEY"
FORM = "name:key[:requests_per_minute[:images_at_once]]"
MIN_KEY = 16  # characters; too many to guess, because attempts are not slowed down
MAX_KEY = 1024  # characters; it must fit into a header
MAX_FILE = 1_000_000  # bytes of a file of keys


@dataclass(eq=False)
class ApiKey:
    """An API key, of which only the digest is kept, and its limits. 0 means no limit."""

    name: str
    digest: bytes = field(repr=False)
    per_minute: int = 0
    images_at_once: int = 0
    images: int = 0  # in the batcher now
    tokens: float = 0.0
    taken: int = 0  # tokens since the last report to the other HTTP workers
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
        self.taken += 1
        return 0.0

    @property
    def who(self) -> str:
        """Its holder in sentences, and among the clients whose shares are limited."""
        return f"the key {self.name}"


current_key: ContextVar[ApiKey | None] = ContextVar("current_key", default=None)


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
    """Replace the keys by reloaded ones. A key that stays keeps the quota that it has used."""
    if not read:
        raise ConfigError("there is no API key left, and without one anyone could send requests")
    before = {(key.name, key.digest): key for key in keys}
    renewed = []
    for key in read:
        kept = before.get((key.name, key.digest), key)
        kept.per_minute, kept.images_at_once = key.per_minute, key.images_at_once
        kept.tokens = min(kept.tokens, kept.per_minute)
        renewed.append(kept)
    keys[:] = renewed


def read_file(path: Path, setting: str = "api_keys", kind: str = "API key", form: str = FORM) -> list[tuple[str, str]]:
    """(where, text) of each key in a file. setting, kind, form: for sentences."""
    # A key given where the file's name belongs must not reach the log.
    is_key = ":" in str(path) or (setting == "admin_key" and not path.exists())
    file = f"the file that {setting} names" if is_key else str(path)
    try:
        with path.open("rb") as opened:
            data = opened.read(MAX_FILE + 1)
        text = data.decode("utf-8-sig")
        mode = path.stat().st_mode
        readable_by_all = stat.S_ISREG(mode) and mode & stat.S_IROTH
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"the {kind}s in {file} cannot be read: {reason}") from None
    if len(data) > MAX_FILE:
        raise ConfigError(f"{file} is not a file of {kind}s: it is larger than {MAX_FILE // 1_000_000} MB")
    lines = re.split("\r\n|\r|\n", text)
    found = [(f"line {i} of {file}", re.split(r"(?:^|\s)#", line)[0].strip(" \t")) for i, line in enumerate(lines, 1)]
    found = [(where, line) for where, line in found if line]
    if not found:
        raise ConfigError(f"{file} holds no {kind}; each line must be {form}")
    if readable_by_all:
        log.warning("every user of this machine can read the %ss in %s: chmod 600 it", kind, file)
    return found


def parse_key(text: str, where: str) -> ApiKey:
    parts = [part.strip(" \t") for part in text.split(":")]
    if not 2 <= len(parts) <= 4 or not all(re.fullmatch("[0-9]{1,6}", part) for part in parts[2:]):
        raise ConfigError(f"{where} must be {FORM}, the numbers from 0 to 999999")
    name, secret = parts[:2]
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"the name in {where} must be 1 to 64 letters, digits, dots, dashes or underscores")
    check_secret(secret, where)
    return ApiKey(name, digest(secret), *map(int, parts[2:]))


def check_secret(secret: str, where: str) -> None:
    if not re.fullmatch(f"[!-~]{{{MIN_KEY},{MAX_KEY}}}", secret):
        raise ConfigError(
            f"the key in {where} must have at least {MIN_KEY} ASCII characters, at most {MAX_KEY}, and no spaces; "
            "this makes one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )


def sent_key(headers: Headers) -> str:
    """`Authorization: Bearer KEY`, or `X-API-Key: KEY`; empty without either."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def load_admin_key(path: str, environment: Mapping[str, str]) -> bytes | None:
    """The digest of the key of /admin: that of a file (empty path: none) or of DSD_ADMIN_KEY. Raises ConfigError."""
    found = read_file(Path(path), "admin_key", "admin key", "a key") if path else []
    if text := environment.get(ADMIN_VARIABLE, "").strip():
        found.append((ADMIN_VARIABLE, text))
    if len(found) > 1:
        raise ConfigError(f"there must be one admin key, got {len(found)}")
    if not found:
        return None
    where, secret = found[0]
    check_secret(secret, where)
    return digest(secret)


def is_same(secret: str, known: bytes) -> bool:
    """Whether a secret has this digest, in constant time."""
    return hmac.compare_digest(digest(secret), known)


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("latin-1", "replace")).digest()


def find(keys: Sequence[ApiKey], secret: str) -> ApiKey | None:
    """The key with this secret, or None. All keys are compared in constant time, so that timing reveals nothing."""
    sent, found = digest(secret), None
    for key in keys:
        if hmac.compare_digest(sent, key.digest):
            found = key
    return found


def claim_images(count: int, others: Mapping[str, int]) -> Callable[[], None]:
    """Count `count` images as under way for the key of this request. Returns the function that ends this.

    others: images of each client in the other HTTP workers. Raises InputError if the key may never have so many at
    once, QueueFullError if it may not now.
    """
    key = current_key.get()
    if key is None or not key.images_at_once:
        return lambda: None
    if count > key.images_at_once:
        raise InputError(f"the key {key.name} may have {key.images_at_once} images at once, got {count}")
    under_way = key.images + others.get(key.who, 0)
    if under_way + count > key.images_at_once:
        raise QueueFullError(
            f"the key {key.name} may have {key.images_at_once} images at once and {under_way} are under way; "
            "try again when they are done",
            1.0,
        )
    key.images += count

    def release() -> None:
        key.images -= count

    return release
