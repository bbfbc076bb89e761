"""How much memory requests take in all, and what one request holds until its answer has been sent."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from dsd_serve.memory import Claim
from server.keys import current_key
from server.settings import Settings

MAX_PREVIEWS = 32_000_000  # bytes of previews that wait to be sent
BESIDES = 118_000_000  # bytes: images drawn but not yet encoded, buffers of connections, what the allocator keeps


def memory_bound(settings: Settings) -> int:
    """Bytes that all requests together take at most, besides what the server has at rest."""
    budgets = settings.max_uploads_mb + settings.max_decode_mb + settings.max_encode_mb
    return int(budgets * 1e6) + MAX_PREVIEWS + BESIDES


@dataclass
class Held:
    """What one request holds; all of it is given back when its answer has been sent, or the client is gone."""

    who: str | None
    deadline: float | None = None  # of the event loop's clock: when the answer is of no use any more
    claims: set[Claim] = field(default_factory=set)
    calls: dict[str, Callable[[], None]] = field(default_factory=dict)

    def put(self, name: str, release: Callable[[], None]) -> None:
        """Call `release` at the end; what was put under this name before is released now."""
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


def held_by(scope: Scope) -> Held:
    """What the request of this scope holds."""
    held: Held | None = scope.get("dsd.held")
    if held is None:
        held = scope["dsd.held"] = Held(client_of(scope))
    return held


def client_of(scope: Scope) -> str | None:
    """Whose share a request takes of, in words: its API key, else its address.

    None for this machine itself, where a proxy or the page asks for many.
    """
    if (key := current_key.get()) is not None:
        return f"the key {key.name}"
    address = (scope.get("client") or ("",))[0]
    try:
        local = ipaddress.ip_address(address).is_loopback
    except ValueError:
        local = True  # a Unix socket, or a test
    return None if local else f"the address {address}"
