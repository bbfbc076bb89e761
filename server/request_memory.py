"""Bounds of the memory of all requests, and the resources that one request holds until its answer is sent."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from dsd_serve.memory import Claim
from server.connections import network_of
from server.keys import current_key
from server.settings import Settings

TEST_CLIENT = "testclient"  # the address of Starlette's TestClient

MAX_PREVIEWS = 32_000_000  # bytes of previews that wait to be sent
BESIDES = 118_000_000  # bytes: images drawn but not yet encoded, buffers of connections, what the allocator keeps


def memory_bound(settings: Settings) -> int:
    """Upper bound of the memory of all requests, in bytes above idle."""
    budgets = settings.max_uploads_mb + settings.max_decode_mb + settings.max_encode_mb
    return int(budgets * 1e6) + MAX_PREVIEWS + BESIDES


@dataclass
class RequestResources:
    """Resources of one request, released when its answer has been sent or the client is gone."""

    who: str | None
    deadline: float | None = None  # time of the event loop after which the answer is useless
    claims: set[Claim] = field(default_factory=set)
    calls: dict[str, Callable[[], None]] = field(default_factory=dict)

    def put(self, name: str, release: Callable[[], None]) -> None:
        """Register `release` for the end of the request. What was registered under this name before is released now."""
        self.drop(name)
        self.calls[name] = release

    def drop(self, name: str) -> None:
        if (release := self.calls.pop(name, None)) is not None:
            release()

    def release(self) -> None:
        for claim in self.claims:
            claim.release()
        self.claims.clear()
        for name in list(self.calls):
            self.drop(name)


def resources_of(scope: Scope) -> RequestResources:
    """The resources of this scope's request."""
    held: RequestResources | None = scope.get("dsd.held")
    if held is None:
        held = scope["dsd.held"] = RequestResources(client_of(scope))
    return held


def client_of(scope: Scope) -> str | None:
    """The client whose share a request counts against, as text: its API key, else its address.

    None for this machine itself, where a proxy or the page sends the requests of many clients.
    """
    if (key := current_key.get()) is not None:
        return key.who
    address = (scope.get("client") or ("",))[0]
    try:
        found = ipaddress.ip_address(address)
        if (getattr(found, "ipv4_mapped", None) or found).is_loopback:  # mapped: IPv4 on a socket of both
            return None
    except ValueError:
        if not address or address == TEST_CLIENT:  # a Unix socket, or a test
            return None
    network = network_of(address)
    return f"the {'network' if '/' in network else 'address'} {network[:80]}"
