"""Messages between the main process and an HTTP worker, beside those about tasks in `engine_messages`."""

from typing import Any

import msgspec
from msgspec import Struct

from dsd_serve.backends.process.engine_messages import (
    Cancel,
    Failed,
    Finished,
    NotLoaded,
    PreviewMade,
    Ready,
    Start,
    Started,
    Status,
    Submit,
)


class StartWorker(Start):
    """number: of the worker, from 1. sockets: the descriptors of each worker, bound to the address, all of which it
    inherits. settings: of the server. folder: of the metrics."""

    number: int
    sockets: list[list[int]]
    settings: dict[str, Any]
    folder: str


# From both.


class Counts(Struct, tag=True, array_like=True):
    """What changed in the counts that limits hold for, over all workers.

    images: under way, of each client and of ALL. connections: of each address. tokens: taken from the buckets of API
    keys since the last such message, by their names. From a worker they are its own, to a worker those of all others.
    """

    images: dict[str, int]
    connections: dict[str, int]
    tokens: dict[str, int]


# From a worker, whose Counts are its heartbeat too.


class Serving(Struct, tag=True, array_like=True):
    """The worker answers requests."""


# From the main process.


class Drain(Struct, tag=True, array_like=True):
    """Refuse new requests, finish those in flight, and end."""


class ReloadKeys(Struct, tag=True, array_like=True):
    """Read the API keys again."""


class Workers(Struct, tag=True, array_like=True):
    """The process numbers of all workers, 0 for one that does not run; and which of them answer."""

    pids: list[int]
    answering: list[bool]


FromWorker = Submit | Cancel | Counts | Serving | NotLoaded
FromMain = Ready | Status | Started | PreviewMade | Finished | Failed | Counts | Drain | ReloadKeys | Workers
from_worker = msgspec.msgpack.Decoder(list[FromWorker])
from_main = msgspec.msgpack.Decoder(list[FromMain])
