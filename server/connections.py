"""The connections of a server: their number, and which one is closed for a new one."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from server.http_heads import RejectedRequest

if TYPE_CHECKING:
    from server.settings import Settings

log = logging.getLogger(__name__)

RESERVE = 16  # connections above the limit, which are answered with an error, or normally to /health
QUIET = 60  # seconds between two log lines about the same shortage
CUTS = ("refused", "slow_head", "slow_body", "unread", "crowded")  # reasons for which the server closes a connection


class Connection(Protocol):
    """A connection as the ConnectionLimiter sees it."""

    address: str

    @property
    def unsent(self) -> int: ...
    def abort(self) -> None: ...
    def check(self, now: float) -> None: ...


class ConnectionLimiter:
    """The connections of one server. When there are too many, the one that has been idle longest is closed.

    cut: called with one of CUTS for each connection that the server closes of its own accord.
    """

    def __init__(self, settings: Settings, cut: Callable[[str], None] = lambda reason: None) -> None:
        self.settings, self.cut = settings, cut
        self.open: set[Connection] = set()
        self.by_address: Counter[str] = Counter()
        self.others: dict[
            str, int
        ] = {}  # connections of each address to the other HTTP workers, where they are limited
        # Those between two requests, or before the end of a head: by address, the longest idle first.
        self.idle: defaultdict[str, dict[Connection, None]] = defaultdict(dict)
        self.said: dict[str, float] = {}

    def enter(self, new: Connection) -> RejectedRequest | None:
        """Register a connection. Returns the error for its requests if no idle connection could be closed for it."""
        address, most, most_each = (
            new.address,
            self.settings.max_connections,
            self.settings.max_connections_per_address,
        )
        self.open.add(new)
        self.by_address[address] += 1
        refused = None
        from_there = self.by_address[address] + self.others.get(address, 0)
        if most_each and from_there > most_each and not self.drop_idle(address):
            refused = RejectedRequest(429, f"this address already has {most_each} connections, the maximum")
        if len(self.open) > most:
            self.say("crowd", f"{most} connections are open, the limit of --max-connections; idle ones are closed")
            busiest = max(self.idle, key=lambda one: len(self.idle[one]), default=None)
            if busiest is None or not self.drop_idle(busiest):
                refused = RejectedRequest(
                    503, f"the server already has {most} connections, the maximum; try again soon"
                )
        if len(self.open) > most + RESERVE:
            self.cut("crowded")
            new.abort()
        else:
            self.rests(new)
        return refused

    def leave(self, connection: Connection) -> None:
        self.works(connection)
        if connection in self.open:
            self.open.discard(connection)
            self.by_address[connection.address] -= 1
            if not self.by_address[connection.address]:
                del self.by_address[connection.address]

    def rests(self, connection: Connection) -> None:
        """Mark a connection as idle: it may be closed for a new one."""
        self.works(connection)
        self.idle[connection.address][connection] = None

    def works(self, connection: Connection) -> None:
        """Mark a connection as busy: it may not be closed for a new one."""
        if (idle := self.idle.get(connection.address)) is not None:
            idle.pop(connection, None)
            if not idle:
                del self.idle[connection.address]

    def drop_idle(self, address: str) -> bool:
        longest = next(iter(self.idle.get(address, ())), None)
        if longest is not None:
            self.cut("crowded")
            longest.abort()
        return longest is not None

    def check(self, now: float) -> None:
        """End the connections of clients that are too slow. now: time of the loop, in seconds."""
        for connection in list(self.open):
            connection.check(now)

    @property
    def unsent(self) -> int:
        """Bytes of answers that clients have not taken yet, not counting the system's buffers."""
        return sum(connection.unsent for connection in self.open)

    def say(self, about: str, sentence: str) -> None:
        """Log a shortage, at most once in QUIET seconds."""
        now = time.monotonic()
        if now - self.said.get(about, -QUIET) >= QUIET:
            self.said[about] = now
            log.warning(sentence)


def network_of(host: str) -> str:
    """The network that counts as one address: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return host
