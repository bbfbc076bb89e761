"""Uvicorn servers that handle signals. At SIGTERM or SIGINT dsd-serve keeps listening, finishes running requests and
refuses new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from server.connections import ConnectionLimiter

if TYPE_CHECKING:  # dsd-ui has none
    from server.middleware.drain import Drain

log = logging.getLogger(__name__)

LAST_ANSWERS = 5  # seconds for answers on their way once everything else is over


class BoundedServer(uvicorn.Server):
    """Uvicorn with limits on its connections. SIGTERM or SIGINT shuts it down gracefully, with exit code 0; a
    second signal ends it at once.

    SIGHUP calls `reload`, and shuts it down gracefully only when its terminal is gone. at_end: called before the
    connections are closed.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limiter: ConnectionLimiter,
        *,
        at_end: Sequence[Callable[[], None]] = (),
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self.limiter, self.at_end, self.reload = limiter, at_end, reload
        self.leaving = self.hung_up = False
        self.on_terminal = on_terminal()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals(), handled("SIGHUP", self.handle_hangup):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.leaving:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.leaving = True
        self.leave()  # a signal handler must not log, and may have interrupted anything

    def leave(self) -> None:
        self.should_exit = True

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        self.hung_up = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self.serves(sockets[0])

    def serves(self, listening: socket.socket) -> None:
        """Called when the server answers on this socket."""
        log.info("running on %s (Ctrl-C ends it)", address_of(listening))

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s; True ends the server."""
        if counter % 5 == 0:
            self.limiter.check(asyncio.get_running_loop().time())
        if counter % 10 == 0:
            self.check_descriptors()
        if self.hung_up:
            self.hung_up = False
            if self.on_terminal and not on_terminal():
                self.handle_exit(signal.SIGHUP, None)
            else:
                self.reload()
        if self.should_exit:
            for call in self.at_end:
                call()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.get_running_loop().call_later(LAST_ANSWERS, self.close_connections)
        await super().shutdown(sockets)
        closing.cancel()

    def close_connections(self) -> None:
        """Close what is left, before uvicorn cancels it with a traceback for each."""
        log.warning("%d connections are closed in the middle of their answers", len(self.limiter.open))
        for connection in list(self.limiter.open):
            connection.abort()

    def check_descriptors(self) -> None:
        """Log that the process has no file descriptor left: uvloop then closes new connections silently."""
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.limiter.say(
                    "descriptors",
                    f"no file descriptor is left with {len(self.limiter.open)} connections open, so new ones are "
                    "closed; raise ulimit -n, or lower --max-connections",
                )


class DrainingServer(BoundedServer):
    """Listens until the last request ends, where uvicorn closes its socket at SIGTERM and new clients cannot connect.

    After `grace` seconds requests that still run are cancelled by `close`. A second signal ends the process at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limiter: ConnectionLimiter,
        drain: Drain,
        close: Callable[[float], object],
        grace: float,
        reload: Callable[[], None],
    ) -> None:
        super().__init__(config, limiter, at_end=drain.at_end, reload=reload)
        self.drain, self.close, self.grace = drain, close, grace
        self.logged = False

    def leave(self) -> None:
        self.drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s; True ends the server."""
        if self.drain.began is not None and not self.should_exit:
            self.log_once(f"shutting down; {self.drain.in_flight} requests in flight have {self.grace:g} s to finish")
            over = time.monotonic() - self.drain.began >= self.grace
            if over and self.drain.in_flight:
                log.warning("%d requests did not finish in time and are cancelled", self.drain.in_flight)
                await asyncio.to_thread(self.close, 0.0)  # their clients get 503
            self.should_exit = over or not self.drain.in_flight
        return await super().on_tick(counter)

    def log_once(self, sentence: str) -> None:
        if not self.logged:
            log.info(sentence)
        self.logged = True


def address_of(listening: socket.socket) -> str:
    """The URL of a server that listens on this socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def handled(name: str, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle a signal, unless the system lacks it or it is ignored, as SIGHUP is under nohup.

    Does nothing outside the main thread.
    """
    number = getattr(signal, name, None)
    before = None if number is None else signal.getsignal(number)
    if number is None or before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def on_terminal() -> bool:
    """True if standard input is a terminal that still exists."""
    try:
        return sys.stdin is not None and os.isatty(sys.stdin.fileno())
    except (OSError, ValueError):
        return False
