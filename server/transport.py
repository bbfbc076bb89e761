"""The sending side of a connection: counts what is written, and may begin an answer early."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

VERSION = b"HTTP/1.1 "  # what every answer begins with


class Line:
    """A transport as uvicorn uses it. `close` goes to the protocol, which may have to read on for a while."""

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self.transport, self.on_close = transport, on_close
        self.written = 0  # bytes
        self.begun = False  # VERSION was sent ahead of the rest of the answer
        self.closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if self.closing:
            return
        if self.begun:
            self.begun = False
            data = data.removeprefix(VERSION)
        self.written += len(data)
        self.transport.write(data)

    def begin_answer(self) -> None:
        self.write(VERSION)
        self.begun = True

    @property
    def unsent(self) -> int:
        return self.transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self.closing or self.transport.is_closing()

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.on_close()
