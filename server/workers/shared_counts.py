"""Counts for limits that hold over all HTTP workers: each worker reports its own, the main process adds up the others'.

They are about 0.2 s old, so that a limit may be exceeded by what other workers accepted in that time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from server.connections import ConnectionLimiter
from server.keys import ApiKey
from server.service import ALL, Service
from server.workers.worker_messages import Counts


def changes(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """The new values of what differs; 0 for what is gone."""
    return {name: now.get(name, 0) for name in {*before, *now} if before.get(name, 0) != now.get(name, 0)}


def apply(counts: dict[str, int], changed: Mapping[str, int]) -> None:
    """Change counts as a message says."""
    for name, value in changed.items():
        if value:
            counts[name] = value
        else:
            counts.pop(name, None)


class WorkerCounts:
    """The counts of one worker, and those of all others as its service and its limiter know them. For one thread."""

    def __init__(self, service: Service, limiter: ConnectionLimiter) -> None:
        self.service, self.limiter = service, limiter
        self.images: dict[str, int] = {}  # as last reported
        self.connections: dict[str, int] = {}

    def report(self) -> Counts:
        """The counts that changed since the last report."""
        service, limiter = self.service, self.limiter
        images = dict(service.shares)
        if service.unanswered:
            images[ALL] = service.unanswered
        connections = dict(limiter.by_address) if limiter.settings.max_connections_per_address else {}
        found = Counts(
            changes(self.images, images),
            changes(self.connections, connections),
            {key.name: key.taken for key in service.keys if key.taken},
        )
        self.images, self.connections = images, connections
        for key in service.keys:
            key.taken = 0
        return found

    def note(self, message: Counts) -> None:
        """The changes in the counts of the other workers."""
        apply(self.service.others, message.images)
        apply(self.limiter.others, message.connections)
        for key in self.service.keys:
            spend(key, message.tokens.get(key.name, 0))


def spend(key: ApiKey, count: int) -> None:
    """Take tokens that other workers took; the bucket may owe some, but not for longer than a minute."""
    key.tokens = max(key.tokens - count, -key.per_minute)


class GroupCounts:
    """The counts of all workers, in the main process. Guarded by the lock of the group."""

    def __init__(self, workers: int) -> None:
        self.images: Sequence[dict[str, int]] = [{} for _ in range(workers)]
        self.connections: Sequence[dict[str, int]] = [{} for _ in range(workers)]
        self.unsent = [Counts({}, {}, {}) for _ in range(workers)]

    def note(self, worker: int, message: Counts) -> None:
        """A worker reports changes."""
        for own, changed, field in (
            (self.images, message.images, "images"),
            (self.connections, message.connections, "connections"),
        ):
            apply(own[worker], changed)
            for other, unsent in enumerate(self.unsent):
                if other != worker:
                    getattr(unsent, field).update({name: self.of_others(own, other, name) for name in changed})
        for other, unsent in enumerate(self.unsent):
            if other != worker:
                unsent.tokens = dict(Counter(unsent.tokens) + Counter(message.tokens))

    def forget(self, worker: int) -> None:
        """A worker has ended, with all that it counted."""
        zero = [dict.fromkeys(own[worker], 0) for own in (self.images, self.connections)]
        self.note(worker, Counts(zero[0], zero[1], {}))

    def begin(self, worker: int) -> None:
        """A worker starts, without the counts of the others."""
        all_of = [
            {name: self.of_others(own, worker, name) for name in set().union(*own)}
            for own in (self.images, self.connections)
        ]
        self.unsent[worker] = Counts(all_of[0], all_of[1], {})

    def take(self, worker: int) -> Counts | None:
        """New counts for a worker, if there are any."""
        unsent = self.unsent[worker]
        if not (unsent.images or unsent.connections or unsent.tokens):
            return None
        self.unsent[worker] = Counts({}, {}, {})
        return unsent

    @staticmethod
    def of_others(own: Sequence[Mapping[str, int]], worker: int, name: str) -> int:
        return sum(counts.get(name, 0) for number, counts in enumerate(own) if number != worker)
