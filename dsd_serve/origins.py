"""Detection of requests from web pages of other sites, for both servers, the API and the page."""

from collections.abc import Iterable
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


def is_foreign(origin: str | None, fetch_site: str | None, hosts: Iterable[str]) -> bool:
    """Whether a page of another site made the browser send this request. False for programs, which send no Origin.

    origin, fetch_site: the headers Origin and Sec-Fetch-Site, None where they are missing. hosts: the values of Host
    and X-Forwarded-Host, each a comma-separated list. Browsers send Sec-Fetch-Site where the connection is secure or
    local, else Origin only. A page cannot send X-Forwarded-Host without permission (CORS); a proxy that replaces Host
    may.
    """
    if fetch_site is not None:
        return fetch_site not in ("same-origin", "none")
    return origin is not None and not any(
        same_place(origin, host.strip()) for value in hosts for host in value.split(",")
    )


def same_place(origin: str, host: str) -> bool:
    """Whether an Origin names the same host and port as a Host header. The scheme may differ: a proxy may add TLS."""
    try:
        page = urlsplit(origin)
        here = urlsplit(f"{page.scheme}://{host}")
        default = DEFAULT_PORTS.get(page.scheme)
        return (
            bool(page.hostname) and page.hostname == here.hostname and (page.port or default) == (here.port or default)
        )
    except ValueError:
        return False
