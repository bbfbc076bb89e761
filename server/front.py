"""The parts that dsd-serve and dsd-ui share: how they start and listen, and the checks of every request.

Its imports are light, so that Ctrl-C ends the program silently while the rest is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dsd_serve.errors import ConfigError, DSDError, shown

if TYPE_CHECKING:
    import argparse

    import uvicorn
    from starlette.types import ASGIApp

    from server.connections import ConnectionLimiter
    from server.settings import Settings

BOUNDS = (
    "head_timeout",
    "body_timeout",
    "write_timeout",
    "keep_alive",
    "max_connections",
    "max_connections_per_address",
    "max_body_mb",
    "max_uploads_mb",
    "allowed_hosts",
    "root_path",
)
# One address stands for both families: a socket of its own for each keeps IPv4 addresses what they are in logs.
EVERYWHERE = {"::": ("::", "0.0.0.0"), "": ("::", "0.0.0.0")}


@contextlib.contextmanager
def starting(program: str) -> Iterator[None]:
    """Around all of a program: an error of ours ends it in a sentence, Ctrl-C while it loads in silence (exit 130)."""
    for descriptor in range(3):  # where one is closed, no file or socket may take its number and be written to
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    signals = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    if signals:
        # An exception would come out of whatever is being imported, which may make another one of it.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        if hasattr(signal, "SIGHUP") and not (sys.stdin and sys.stdin.isatty()):
            before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
            if before[signal.SIGHUP] is signal.SIG_DFL:  # the sender cannot see that the server is still starting
                signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        yield
    except DSDError as error:
        for handler in logging.getLogger().handlers:
            handler.flush()  # what was logged comes first
        sys.exit(f"{program}: {error}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a host, with the same port; port 0 is one that the system chooses.

    Nobody can connect before the server runs. Raises ConfigError when an address cannot be had.
    """
    bound: list[socket.socket] = []
    refused: OSError | None = None
    try:
        for family, kind, protocol, _, address in addresses_of(host, port):
            try:
                opened = socket.socket(family, kind, protocol)
            except OSError as error:  # a family that this machine does not have
                refused = error
                continue
            bound.append(opened)
            if os.name == "posix":
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                opened.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                refused = error  # localhost may name ::1 where there is no IPv6
                bound.pop().close()
            else:
                port = port or opened.getsockname()[1]
    except OSError as error:
        refused = error
    if refused is not None and (not bound or refused.errno == errno.EADDRINUSE):
        close(bound)
        raise ConfigError(why_not(host, port, refused)) from None
    return bound


def listen_again(sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """Further sockets at the same addresses; the system distributes new connections evenly over all of them.

    They are the same sockets where the system cannot do that, so that those who listen compete for connections.
    """
    if not sys.platform.startswith("linux"):
        return list(sockets)
    again = []
    for one in sockets:
        # After it was bound, so that another program at this address is still an error.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened = socket.socket(one.family, one.type, one.proto)
        again.append(opened)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if one.family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(one.getsockname())
    return again


def addresses_of(host: str, port: int) -> list[Any]:
    found = []
    for one in EVERYWHERE.get(host, (host,)):
        try:
            found += socket.getaddrinfo(one, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except ValueError:  # what cannot be a name at all
            raise OSError(errno.EINVAL, "it is not a name") from None
    return list(dict.fromkeys(found))


def close(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        one.close()


def why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {shown(host)} is in use by another program; choose another with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs rights that this program does not have; choose one from 1024 with --port"
    return f"host must be an address of this machine, or a name of one, got {shown(host)} ({error.strerror or error})"


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """`listen`, and close the sockets in the end."""
    sockets = listen(host, port)
    try:
        yield sockets
    finally:
        close(sockets)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add to another program those flags of dsd-serve that hold for any server."""
    from server import settings

    group = parser.add_argument_group("limits and names")
    for name in BOUNDS:
        settings.add_flag(group, name, getattr(settings.Settings(), name))


def configure(app: ASGIApp, limiter: ConnectionLimiter) -> uvicorn.Config:
    """Uvicorn's configuration of an application, with limits on its connections."""
    import uvicorn

    from server.http_protocol import BoundedProtocol
    from server.lifecycle import LAST_ANSWERS

    def connection(*args: Any, **kwargs: Any) -> BoundedProtocol:
        return BoundedProtocol(limiter, *args, **kwargs)

    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]  # called as a class would be
        ws="none",
        log_config=None,  # its lines go through ours
        access_log=False,
        timeout_keep_alive=limiter.settings.keep_alive,  # type: ignore[arg-type]  # a float does as well
        timeout_graceful_shutdown=LAST_ANSWERS + 1,
        reset_contextvars=True,
    )


def guarded(app: ASGIApp, settings: Settings) -> ASGIApp:
    """An application behind the limits on bodies and the names of hosts that dsd-serve has, below the same prefix."""
    from dsd_serve.memory import Memory
    from server.middleware.body_limits import BodyLimits
    from server.middleware.hosts import AllowedHosts
    from server.middleware.prefix import RootPath, below_prefix
    from server.site import parse_hosts, parse_prefix

    names = [*parse_hosts(settings.allowed_hosts), settings.host]
    limited = AllowedHosts(BodyLimits(below_prefix(app), settings, Memory(int(settings.max_uploads_mb * 1e6))), names)
    return RootPath(limited, parse_prefix(settings.root_path))


def serve_page(make: Callable[[], tuple[ASGIApp, Sequence[Callable[[], None]]]], options: argparse.Namespace) -> None:
    """Serve an application that has no batcher, until a signal ends it.

    make: gives the application, and the calls that end its streams. options: host, port and the flags of `add_flags`.
    Raises ConfigError when one of them is wrong, or the address cannot be had.
    """
    from server import settings
    from server.connections import ConnectionLimiter
    from server.lifecycle import BoundedServer
    from server.telemetry import logs

    flags, defaults = vars(options), settings.Settings()
    values = {name: settings.choose(name, flags[name], getattr(defaults, name)) for name in BOUNDS}
    port = settings.convert("port", "port", options.port, defaults.port)
    known = settings.Settings(host=options.host, port=port, **values)
    settings.check(known)
    logs.configure(known.log_level, known.log_format)
    with listening(known.host, known.port) as sockets:
        app, at_end = make()
        limiter = ConnectionLimiter(known)
        BoundedServer(configure(guarded(app, known), limiter), limiter, at_end=at_end).run(sockets)
