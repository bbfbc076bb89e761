"""The names, origins and path under which a server is reached, as --allowed-hosts, --cors-origins and --root-path."""

import ipaddress
import re

from starlette.types import Scope

from dsd_serve.errors import ConfigError

HEALTH = "/health"  # health checks are at this path and those below it

LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"{LABEL}(\.{LABEL})*")


def parse_hosts(text: str) -> list[str]:
    """Names of --allowed-hosts: `images.example.com,*.example.org`, or `*` for any. Raises ConfigError."""
    names = [item.strip() for item in text.split(",") if item.strip()]
    if "*" in names:
        if len(names) > 1:
            raise ConfigError("allowed_hosts must be either * or a list of names, got both")
        return names
    return [parse_host(name) for name in names]


def parse_host(text: str) -> str:
    star = "*." if text.startswith("*.") else ""
    name = text[len(star) :].lower().rstrip(".")
    try:
        name = name if is_address(name) or name.isascii() else name.encode("idna").decode()  # as browsers send it
    except UnicodeError:
        name = ""
    if not (NAME.fullmatch(name) or (is_address(name) and not star)):
        raise ConfigError(
            "allowed_hosts must be names like images.example.com,*.example.org (no https://, no port, no path) or *, "
            f"got {text[:80]!r}"
        )
    return star + name


def is_address(name: str) -> bool:
    """True for an IP address, an IPv6 one with or without brackets."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


ORIGIN = re.compile(r"https?://[^/\s?#@*]+")


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


KEY = "dsd.root_path"
SEGMENT = r"/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+"
PREFIX = re.compile(f"({SEGMENT})+")
LONGEST = 200


def parse_prefix(text: str) -> str:
    """The prefix of --root-path, empty for none. Raises ConfigError."""
    prefix = text.strip().rstrip("/")
    if prefix and not is_sane(prefix):
        raise ConfigError(
            f"root_path must be a path like /dsd, of letters, digits and ._~- between slashes, got {text[:80]!r}"
        )
    return prefix


def is_sane(prefix: str) -> bool:
    """True if links may begin with this prefix: it is a path, names no other host and does not lead upwards."""
    return len(prefix) <= LONGEST and bool(PREFIX.fullmatch(prefix))


def root_path(scope: Scope) -> str:
    """The prefix of links for this request, such as /dsd; empty at the root."""
    return str(scope.get(KEY, ""))
