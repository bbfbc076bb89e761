"""The server of an HTTP worker: the application that dsd-serve runs, with the backend of its main process."""

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from dsd_serve.errors import DSDError, EngineError
from server.app import create_app
from server.connections import ConnectionLimiter
from server.front import configure
from server.lifecycle import DrainingServer
from server.service import Service
from server.settings import Settings
from server.startup import StartupApp
from server.telemetry import logs, shared_metrics
from server.telemetry.metrics import Metrics
from server.workers.shared_counts import WorkerCounts
from server.workers.worker_backend import WorkerBackend
from server.workers.worker_messages import Counts, Drain, ReloadKeys, Serving, StartWorker, Workers
from server.workers.worker_settings import settings_of

log = logging.getLogger(__name__)

REFRESH_EVERY = 10  # ticks of the loop, of 0.1 s


def run(start: StartWorker) -> None:
    """Serve until the main process ends this."""
    settings = settings_of(start.settings)
    logs.configure(settings.log_level, settings.log_format, start.number)
    shared_metrics.share(start.folder, f"worker-{start.number}")
    metrics = Metrics(shown := CollectorRegistry())
    backend = WorkerBackend(
        start.endpoint, max_waiting=settings.max_waiting, max_seconds=settings.max_wait, refusals=metrics
    )
    shared_metrics.show_all(shown, start.folder, start.parent, lambda: backend.pids, lambda: backend.engine_pid)
    try:
        serve(settings, backend, metrics, Listening(start.number - 1, start.sockets))
    except DSDError as error:
        backend.cannot_serve(error)
    except Exception as error:
        log.exception("the HTTP worker failed")
        backend.cannot_serve(EngineError(f"an HTTP worker failed: {error!r}"))


def serve(settings: Settings, backend: WorkerBackend, metrics: Metrics, listening: "Listening") -> None:
    """Serve until the main process ends it. Raises DSDError when it cannot start."""
    service = Service(settings, worker=(backend, metrics))
    limiter = ConnectionLimiter(settings, metrics.connection_cut)
    metrics.watch_connections(limiter)

    def make() -> FastAPI:
        service.wait()
        return create_app(service)

    backend.answered.wait()
    opening: StartupApp | None = None
    if not backend.known.is_set():
        opening = StartupApp(make, lambda: service.not_ready, service.close, service.drain.begin)
    config = configure(opening or make(), limiter)
    gc.collect()  # as in main.py
    gc.freeze()
    WorkerServer(config, limiter, service, backend, listening).run(listening.own)
    if opening is not None and opening.failed is not None:
        log.error("this HTTP worker cannot serve: %s", opening.failed)
        raise opening.failed


class Listening:
    """The sockets of all workers. Each accepts from its own, and from those of workers that do not answer now."""

    def __init__(self, number: int, descriptors: list[list[int]]) -> None:
        self.number = number
        self.sockets = [[socket.socket(fileno=one) for one in of_worker] for of_worker in descriptors]
        self.own = self.sockets[number]
        self.taken_over: dict[int, list[asyncio.Server]] = {}

    async def follow(self, answering: list[bool], protocol: Callable[[], asyncio.Protocol]) -> None:
        """Take over the sockets of workers that do not answer, and leave them to those that do."""
        loop = asyncio.get_running_loop()
        for number, sockets in enumerate(self.sockets):
            if number == self.number or sockets == self.own:
                continue
            if answering[number]:
                self.leave(number)
            elif number not in self.taken_over:
                self.taken_over[number] = [await loop.create_server(protocol, sock=one.dup()) for one in sockets]

    def leave(self, number: int) -> None:
        for server in self.taken_over.pop(number, ()):
            server.close()

    def close(self) -> None:
        for number in list(self.taken_over):
            self.leave(number)


class WorkerServer(DrainingServer):
    """Obeys the main process where another server obeys signals, and exchanges counts with the other workers."""

    def __init__(
        self,
        config: uvicorn.Config,
        limiter: ConnectionLimiter,
        service: Service,
        backend: WorkerBackend,
        listening: Listening,
    ) -> None:
        super().__init__(config, limiter, service.drain, service.close, service.settings.grace, service.reload_keys)
        self.orders, self.send, self.listening = backend.orders, backend.send, listening
        self.metrics, self.counts = service.metrics, WorkerCounts(service, limiter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def serves(self, listening: socket.socket) -> None:
        self.send(Serving())

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s; True ends the server."""
        while self.orders:
            await self.obey(self.orders.popleft())
        changed = self.counts.report()
        if counter % REFRESH_EVERY == 0:
            self.metrics.refresh()
        if counter % REFRESH_EVERY == 0 or changed != Counts({}, {}, {}):
            self.send(changed)
        return await super().on_tick(counter)

    async def obey(self, order: Counts | Drain | ReloadKeys | Workers) -> None:
        match order:
            case Counts():
                self.counts.note(order)
            case Drain():
                self.leave()
            case ReloadKeys():
                self.reload()
            case Workers():
                await self.listening.follow(order.answering, self.protocol)

    def protocol(self) -> asyncio.Protocol:
        """A new connection, as uvicorn makes it for its own sockets."""
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=None
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.listening.close()
        await super().shutdown(sockets)
