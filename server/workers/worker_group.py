"""The main process of a server with HTTP workers: it owns the address and the backend, and answers no HTTP itself."""

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any

from dsd_serve.backends import ENGINE_PROCESS_STATES, Backend, Job, ModelInfo
from dsd_serve.backends.process.child_process import ChildProcess
from dsd_serve.backends.process.engine_messages import NotLoaded, Ready, Status, error_of
from dsd_serve.backends.process.supervisor import Supervisor
from dsd_serve.backends.process.task_server import STATUS_EVERY, TaskServer
from dsd_serve.backends.triton.remote import TritonBackend
from dsd_serve.errors import ClosedError, ConfigError
from dsd_serve.locked_folders import delete_abandoned, new_locked_folder
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array
from server.front import close, listen_again
from server.keys import load_keys
from server.lifecycle import LAST_ANSWERS, address_of, handled, on_terminal
from server.model_opening import Opener, announce, sources
from server.models import Models
from server.settings import Settings
from server.site import parse_origins
from server.telemetry import shared_metrics
from server.telemetry.metrics import Metrics
from server.telemetry.model_metrics import PROCESS_STATES, ModelMetrics
from server.workers.shared_counts import GroupCounts
from server.workers.worker_messages import Counts, Drain, ReloadKeys, Serving, StartWorker, Workers, from_worker
from server.workers.worker_settings import of_one_worker, values_of

log = logging.getLogger(__name__)

MODULE = "server.workers.worker_process"
STEADY = 10.0  # seconds for which a worker must serve before its next end counts as the first
CHECK_TRITON = 0.5  # seconds between two messages while Triton's model is not known
TURN = 0.1  # seconds between two turns of the main thread
END_WITHIN = LAST_ANSWERS + 5.0  # seconds for a worker to end, after the grace period


def serve(settings: Settings, sockets: list[socket.socket]) -> None:
    """Serve until a signal ends it. Raises DSDError when it cannot start."""
    load_keys(settings.api_keys, os.environ)  # what a worker would find wrong after the model was loaded
    parse_origins(settings.cors_origins)
    with contextlib.ExitStack() as stack:
        try:
            delete_abandoned("metrics", tempfile.gettempdir())
            folder = str(new_locked_folder("metrics", tempfile.gettempdir()))
        except OSError as error:
            raise ConfigError(
                f"HTTP workers need a folder for their metrics, which TMPDIR can name ({error.strerror}); "
                "--http-workers 1 needs none"
            ) from None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        shared_metrics.share(folder, "main")
        metrics = Metrics()
        backend, info = open_backend(settings, metrics)
        stack.callback(backend.close, 0)
        more = [listen_again(sockets) for _ in range(settings.http_workers - 1)]
        for of_worker in more:
            stack.callback(close, of_worker)
        WorkerGroup(settings, [sockets, *more], backend, info, metrics, folder).run()


def open_backend(settings: Settings, metrics: Metrics) -> tuple[Backend, ModelInfo | None]:
    """The backend of the settings, and its model, unless it comes from Triton. Raises DSDError."""
    model_metrics = ModelMetrics(metrics, Models())
    opener = Opener(settings, model_metrics, None, live=False)
    if settings.triton:
        return opener.remote(), None
    ((name, place),) = sources(settings.model)
    served = opener.open(name, place)
    if settings.engine_apart:
        for state in ENGINE_PROCESS_STATES:
            metrics.gauge("dsd_engine_process", PROCESS_STATES, partial(model_metrics.num_in, state), state=state)
    return served.backend, served.info


class WorkerGroup:
    """The workers, and the signals, which mean what they mean to a server without workers."""

    def __init__(
        self,
        settings: Settings,
        sockets: Sequence[Sequence[socket.socket]],
        backend: Backend,
        info: ModelInfo | None,
        metrics: Metrics,
        folder: str,
    ) -> None:
        self.settings, self.folder = settings, folder
        self.sockets = sockets  # of each worker
        self.backend, self.info, self.metrics = backend, info, metrics
        self.lock = threading.Lock()
        self.counts = GroupCounts(settings.http_workers)
        self.workers = [HttpWorker(self, number) for number in range(settings.http_workers)]
        self.shown: tuple[float, dict[str, Any]] = (-math.inf, {})  # the last snapshot, and when it was made
        self.on_terminal = on_terminal()
        self.leaving = self.hung_up = False
        self.drained_at: float | None = None
        metrics.watch_backend(backend, lambda: self.leaving)
        metrics.watch_workers(lambda: sum(worker.state == "ready" for worker in self.workers))

    # In the main thread.

    def run(self) -> None:
        """Until a signal ends it and the workers have ended. Raises the error of a worker that cannot start."""
        with self.signals():
            if self.info is None:
                threading.Thread(target=self.wait_for_triton, name="wait", daemon=True).start()
            for worker in self.workers:
                worker.thread.start()
            try:
                for worker in self.workers:
                    while not worker.first.done() and not self.leaving:
                        time.sleep(TURN / 5)
                    if worker.first.done():
                        worker.first.result()
                if self.leaving:
                    return
                log.info(
                    "running on %s with %d HTTP workers (Ctrl-C ends it)",
                    address_of(self.sockets[0][0]),
                    len(self.workers),
                )
                while any(worker.thread.is_alive() for worker in self.workers):
                    self.turn()
                    time.sleep(TURN)
            finally:
                self.drain(0)
                for worker in self.workers:
                    worker.thread.join()

    def turn(self) -> None:
        self.metrics.refresh()
        if self.hung_up:
            self.hung_up = False
            if self.on_terminal and not on_terminal():
                self.leaving = True
            else:
                self.tell(ReloadKeys())
        if self.leaving and self.drained_at is None:
            log.info("shutting down; requests in flight have %g s to finish", self.settings.grace)
            self.drain(self.settings.grace)

    def drain(self, grace: float) -> None:
        """Let the workers finish what they have, and end."""
        if self.drained_at is None:
            self.drained_at = time.monotonic()
        for worker in self.workers:
            worker.drain(self.drained_at + grace + (END_WITHIN if grace else 0.0))

    def tell(self, message: Any) -> None:
        for worker in self.workers:
            worker.send(message)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        with (
            handled("SIGINT", self.handle_exit),
            handled("SIGTERM", self.handle_exit),
            handled("SIGHUP", self.handle_hangup),
        ):
            yield

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        if self.leaving:
            shutil.rmtree(self.folder, ignore_errors=True)
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # and the workers end with this process
        self.leaving = True

    def handle_hangup(self, number: int, frame: FrameType | None) -> None:
        self.hung_up = True

    # In other threads.

    def wait_for_triton(self) -> None:
        assert isinstance(self.backend, TritonBackend)
        log.info("waiting for Triton at %s", self.settings.triton)
        with contextlib.suppress(ClosedError):  # it is closed at the end
            info = self.backend.wait()
            announce(info)
            self.info = info

    def snapshot(self) -> dict[str, Any]:
        """That of the backend, made once for all workers; the one that shows that nothing is left is new."""
        now = time.monotonic()
        if now >= self.shown[0] + STATUS_EVERY or not self.backend.num_running + self.backend.num_waiting:
            self.shown = (now, self.backend.snapshot())
        return self.shown[1]

    def wake_others(self, worker: "HttpWorker") -> None:
        """Let the threads of the other workers tell them what is new."""
        for other in self.workers:
            child = other.child
            if other is not worker and child is not None:
                child.mailbox.ring()

    def who_runs(self) -> Workers:
        return Workers(
            [worker.pid or 0 for worker in self.workers], [worker.state == "ready" for worker in self.workers]
        )


class HttpWorker(Supervisor):
    """One HTTP worker, which is started again whenever it ends, and its tasks."""

    def __init__(self, group: WorkerGroup, number: int) -> None:
        super().__init__(f"HTTP worker {number + 1}", threading.Condition())
        self.group, self.number = group, number
        self.tasks: WorkerTasks | None = None
        self.opened: ChildProcess | None = None
        self.ready_since = math.inf
        self.known: Workers | None = None  # the others' counts that it has

    def drain(self, until: float) -> None:
        """Let it finish what it has and end; it is killed at `until`, a time of `time.monotonic`."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.stop_at = min(self.stop_at, until)
        self.send(Drain())

    # In its thread.

    def open(self) -> ChildProcess:
        group, settings = self.group, self.group.settings
        self.tasks = self.known = None
        with group.lock:
            group.counts.begin(self.number)
        descriptors = [[one.fileno() for one in of_worker] for of_worker in group.sockets]
        self.opened = ChildProcess(
            MODULE,
            lambda endpoint: StartWorker(
                endpoint,
                os.getpid(),
                self.number + 1,
                descriptors,
                values_of(of_one_worker(settings)),
                group.folder,
            ),
            from_worker,
            descriptors=sorted({one for of_worker in descriptors for one in of_worker}),
            stdout=None,
            without="--http-workers 1 needs none",
        )
        return self.opened

    def due(self) -> float:
        group, child = self.group, self.opened
        assert child is not None
        if self.tasks is None and (info := group.info) is not None:
            self.tasks = WorkerTasks(self, child, group.backend, info)
            times = group.backend.times
            child.mailbox.put(Ready(info.to_dict(), times.tick, times.row), wake=False)
        with group.lock:
            counts = group.counts.take(self.number)
        if counts is not None:
            child.mailbox.put(counts, wake=False)
        if self.known != (known := group.who_runs()):
            self.known = known
            child.mailbox.put(known, wake=False)
        if self.tasks is None:
            child.mailbox.put(Status(group.backend.not_ready, 0.0, 0.0, []), wake=False)
            return CHECK_TRITON
        return min(STATUS_EVERY, self.tasks.report())

    def take(self, message: Any, arrays: Sequence[Array]) -> None:
        match message:
            case Counts():
                with self.group.lock:
                    self.group.counts.note(self.number, message)
                if message.images or message.connections or message.tokens:
                    self.group.wake_others(self)
            case Serving():
                self.ready_since = time.monotonic()
                self.is_ready()
            case NotLoaded():
                raise error_of(message.failure)
            case _:
                if self.tasks is not None:
                    self.tasks.take(message, arrays)

    def late(self, now: float) -> None:
        if now > self.ready_since + STEADY:
            self.ends = 0

    def lost(self) -> None:
        self.ready_since = math.inf
        if self.tasks is not None:
            self.tasks.cancel_all()
        with self.group.lock:
            self.group.counts.forget(self.number)
        shared_metrics.forget_gauges(self.group.folder, f"worker-{self.number + 1}")

    def restarted(self) -> None:
        self.group.metrics.worker_restarts.inc()


class WorkerTasks(TaskServer):
    """The tasks of a worker, which the backend of the main process admits together with those of all others."""

    def __init__(self, worker: HttpWorker, child: ChildProcess, backend: Backend, info: ModelInfo) -> None:
        super().__init__(child.mailbox, backend, info, self.admit)
        self.group = worker.group
        self.said: tuple[str | None, str | None] = (None, None)

    def admit(self, tasks: Sequence[Task], deadline: float, on_preview: OnPreviews | None) -> Sequence[Job]:
        timeout = None if math.isinf(deadline) else max(0.001, deadline - time.monotonic())
        return self.backend.submit_tasks(tasks, timeout=timeout, on_preview=on_preview)

    def busy(self) -> bool:
        return bool(self.jobs) or self.backend.num_running + self.backend.num_waiting > 0

    def report(self) -> float:
        if self.said != (said := (self.backend.not_ready, self.backend.given_up)):
            self.said, self.reported = said, -math.inf
        return super().report()

    def status(self) -> Status:
        status, backend, tasks = super().status(), self.backend, self.all()
        own_running = len(status.running)
        own_waiting = len(tasks) - own_running
        own_seconds = backend.times.of_rows(sum(job.rows_left for _, job in tasks))
        status.given_up = backend.given_up
        status.others_running = max(0, backend.num_running - own_running)
        status.others_waiting = max(0, backend.num_waiting - own_waiting)
        status.others_seconds = max(0.0, backend.seconds_ahead() - own_seconds)
        status.snapshot = self.group.snapshot()
        return status
