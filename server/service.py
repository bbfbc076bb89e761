"""The model and its backend, and running, streaming and cancelling the tasks of a request."""

import asyncio
import logging
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request

from dsd_serve.backends import Backend, Job, ModelInfo, Observer
from dsd_serve.backends.row_budget import MAX_BUDGET
from dsd_serve.backends.triton.addresses import parse_addresses
from dsd_serve.backends.triton.remote import TritonBackend
from dsd_serve.engines import Engine
from dsd_serve.errors import CancelledError, ConfigError, InputError, QueueFullError, shown
from dsd_serve.imaging import codec
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.labels import ImageClass
from dsd_serve.loading import load
from dsd_serve.memory import Memory
from dsd_serve.model import Model
from dsd_serve.params import SamplingParams, from_api
from dsd_serve.programs import OnPreviews, Task
from server.keys import claim_images, load_keys, renew
from server.middleware.drain import Drain
from server.request_memory import RequestResources, resources_of
from server.responses import Encoder
from server.schemas import EditQuery, End, GenerateRequest, SamplingQuery
from server.settings import Settings
from server.site import parse_origins
from server.stream_events import PING_SECONDS, Done, Event, EventQueue, Preview, PreviewMemory, soon, within
from server.telemetry.metrics import Metrics
from server.telemetry.traces import load_traces

if TYPE_CHECKING:
    from dsd_serve.backends.process.process_backend import ProcessBackend

log = logging.getLogger(__name__)

ALL = "all"  # among the counts of clients, which begin with "the"


@dataclass(frozen=True)
class Results:
    """Results in the order of the tasks, and how long they waited and ran, in milliseconds."""

    results: list[Any]
    queue_ms: float
    network_ms: float

    @property
    def server_timing(self) -> str:
        return f"queue;dur={self.queue_ms:.1f}, network;dur={self.network_ms:.1f}"


class Service:
    """One model on its backend, with the limits and counters of the server.

    engine: replaces the one from the settings, in this process. worker: the backend and the metrics of an HTTP worker,
    whose main process has the model; `serve` is then called with it.
    """

    def __init__(
        self, settings: Settings, engine: Engine | None = None, *, worker: tuple[Backend, Metrics] | None = None
    ) -> None:
        self.settings = settings
        self.keys = load_keys(settings.api_keys, os.environ)
        self.origins = parse_origins(settings.cors_origins)
        self.traces = load_traces(settings.otel)
        self.drain = Drain()
        self.decoder = Decoder(int(settings.max_megapixels * 1e6), int(settings.max_decode_mb * 1e6))
        self.uploads = Memory(int(settings.max_uploads_mb * 1e6))
        self.encoder = Encoder(settings)
        self.unanswered = 0  # images of requests whose answer has not been sent
        self.shares: Counter[str] = Counter()  # the same, of each client
        self.others: dict[str, int] = {}  # the same of the other HTTP workers: of each client, and of ALL
        self.previews = PreviewMemory()
        self.is_worker = worker is not None
        if worker is not None:
            self.backend, self.metrics = worker
            return
        self.metrics = Metrics()
        self.backend, info = open_backend(settings, self.metrics, engine)
        if info is not None:
            self.serve(info)
            announce(info)

    def reload_keys(self) -> None:
        """Reload the API keys. The old ones stay if that fails, or if the server was started without keys."""
        if not self.keys:
            log.info("there are no API keys to read again, so SIGHUP has no effect")
            return
        try:
            renew(self.keys, load_keys(self.settings.api_keys, os.environ))
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys were read again", len(self.keys))

    def wait_for_triton(self) -> None:
        """Wait until a server of --triton is ready, however long it takes. Raises ClosedError if closed meanwhile."""
        if isinstance(self.backend, TritonBackend):
            log.info("waiting for Triton at %s", self.settings.triton)
            info = self.backend.wait()
            self.serve(info)
            announce(info)

    def serve(self, model: ModelInfo) -> None:
        self.model, self.config = model, model.config
        model.table.prepare()

    async def run(self, request: Request, tasks: Sequence[Task], timeout: float | None = None) -> Results:
        """Run the tasks of one request; cancelled when its client disconnects."""
        jobs = self.submit(request, tasks, timeout)
        watcher = watch(request, jobs)
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        except CancelledError:
            if watcher.done():
                watcher.result()  # raises the error of the rest of the request
            raise
        finally:
            watcher.cancel()
            for job in jobs:
                job.cancel()  # has no effect on finished jobs
        first = min(job.submitted for job in jobs)
        started, ended = min(job.started for job in jobs), max(job.ended for job in jobs)
        return Results(results, 1000 * (started - first), 1000 * (ended - started))

    def stream(self, request: Request, tasks: Sequence[Task], timeout: float | None = None) -> AsyncIterator[Event]:
        """Run tasks and yield their events. They are submitted at once, with the errors of `submit`."""
        loop = asyncio.get_running_loop()
        queue = EventQueue(self.previews)
        resources_of(request.scope).put("previews", queue.close)

        def put(event: Preview | Done) -> None:
            soon(loop, lambda: queue.put(event))

        def on_end(number: int) -> Callable[["Future[Any]"], None]:
            return lambda future: put(Done(number, future))

        jobs = self.submit(request, tasks, timeout, lambda number, step, pixels: put(Preview(number, step, pixels)))
        for number, job in enumerate(jobs):
            job.future.add_done_callback(on_end(number))
        watcher = watch(request, jobs)

        async def events() -> AsyncIterator[Event]:
            remaining = len(jobs)
            try:
                while remaining:
                    event = await within(PING_SECONDS, queue.get())
                    remaining -= isinstance(event, Done)
                    yield event
            finally:
                watcher.cancel()
                for job in jobs:
                    job.cancel()

        return events()

    def submit(
        self, request: Request, tasks: Sequence[Task], timeout: float | None, on_preview: OnPreviews | None = None
    ) -> Sequence[Job]:
        """Queue the tasks of one request. Raises the errors of `submit_tasks`, `claim_images` and `count`.

        They count until the answer has been sent, or until more tasks of the same request follow.
        """
        limit, held = self.settings.max_seconds, resources_of(request.scope)
        within_limit = limit if timeout is None else min(timeout, limit)
        held.drop("key")
        held.put("key", claim_images(len(tasks), self.others))
        self.count(held, len(tasks))
        jobs = self.backend.submit_tasks(tasks, timeout=within_limit, on_preview=on_preview)
        held.deadline = asyncio.get_running_loop().time() + within_limit
        self.traces.follow(jobs)
        return jobs

    def count(self, held: RequestResources, count: int) -> None:
        """Count images until they are sent. Raises QueueFullError if too many images are unsent, or if one client
        would have more than half of the queue."""
        held.drop("images")
        who, limit = held.who, self.settings.max_waiting
        unanswered = self.unanswered + self.others.get(ALL, 0)
        if unanswered + count > 2 * limit + MAX_BUDGET:
            self.metrics.rejected("queue_full")
            raise QueueFullError(f"{unanswered} images wait to be drawn, encoded and sent; try again later", 5.0)
        share = 0 if who is None else self.shares[who] + self.others.get(who, 0)
        if len(self.keys) != 1 and share and share + count > max(1, limit // 2):
            self.metrics.rejected("queue_full")
            raise QueueFullError(
                f"{who} has {share} images under way, and half of the {limit} that may wait is the most for "
                "one; try again when some are done",
                max(1.0, self.backend.seconds_ahead() / 2),
            )
        self.add_images(who, count)
        held.put("images", lambda: self.add_images(who, -count))

    def add_images(self, who: str | None, count: int) -> None:
        self.unanswered += count
        if who is not None:
            self.shares[who] += count
            if not self.shares[who]:
                del self.shares[who]

    def params(self, query: SamplingQuery) -> list[SamplingParams]:
        """Sampling parameters of each image; raises InputError above a limit."""
        defaults, limits = self.model.defaults, self.settings
        steps = min(defaults.num_steps, limits.max_steps) if query.steps is None else query.steps
        at_most("n", query.n, limits.max_images)
        at_most("steps", steps, limits.max_steps)
        self.check_size(query.size)
        seed = secrets.randbelow(2**32) if query.seed is None else query.seed
        first = from_api({**query.model_dump(), "seed": seed, "steps": steps}, defaults)
        return [replace(first, index=first.index + i) for i in range(query.n)]

    def class_of(self, query: GenerateRequest | EditQuery | End, param: str = "class") -> ImageClass | None:
        """The class that a request names; None for an edit towards none, or if the model has no classes.

        Raises InputError, which names the parameter `param`.
        """
        optional = isinstance(query, EditQuery)
        if self.config.num_classes and not optional and "class_" not in query.model_fields_set:
            raise InputError(f"{param} is missing", param)
        return self.model.find_class(query.class_, param, optional)

    def side(self, size: int | None) -> int:
        """Side of the images of an answer, in pixels; None stands for the network's own."""
        return size or self.config.image_size

    def check_walk(self, n: int, size: int | None) -> None:
        at_most("n", n, self.settings.max_images)
        self.check_size(size)

    def check_size(self, size: int | None) -> None:
        at_most("size", size or 1, self.settings.max_size)

    def check_fits(self, chosen: str, n: int, size: int | None, columns: int | None = None) -> None:
        """Raise InputError when one file of the chosen format cannot hold n images of that size side by side."""
        codec.check_fits(chosen, n, size or self.config.image_size, columns)

    def check_answer(self, chosen: str, n: int, size: int | None, columns: int | None = None) -> None:
        """`check_fits`, and raise InputError when the answer would need more memory than all answers may take."""
        self.check_fits(chosen, n, size, columns)
        self.encoder.check_images(chosen, n, self.side(size), columns)


def announce(model: ModelInfo) -> None:
    """Log what is served, and what is remarkable about it."""
    if model.table.warning:
        log.warning("%s", model.table.warning)
    (log.info if model.invariance.holds else log.warning)("self-test: %s", model.invariance)
    log.info("%s on %s, %d rows a tick", model.name, model.described, model.budget)


def open_backend(
    settings: Settings, metrics: Metrics, engine: Engine | None = None
) -> tuple[Backend, ModelInfo | None]:
    """The backend of the settings, and its model unless only Triton knows it. engine: see `Service`."""
    if settings.triton:
        return open_remote(settings, metrics), None
    if settings.engine_apart and engine is None:
        apart = open_apart(settings, metrics)
        metrics.watch_process(lambda: apart.pid)
        return apart, apart.info
    opened = open_embedded(settings, engine, metrics)
    return opened.backend, opened.info


def open_remote(settings: Settings, observer: Observer) -> TritonBackend:
    return TritonBackend(
        parse_addresses(settings.triton),
        max_waiting=settings.max_waiting,
        observer=observer,
    )


def open_apart(settings: Settings, observer: Observer) -> "ProcessBackend":
    from dsd_serve.backends.process.engine_messages import EngineSettings  # here: most servers need no ZeroMQ
    from dsd_serve.backends.process.process_backend import ProcessBackend

    return ProcessBackend(
        EngineSettings(
            model=str(settings.model),
            engine=settings.engine,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            row_budget=settings.row_budget,
        ),
        max_waiting=settings.max_waiting,
        max_seconds=settings.max_wait,
        observer=observer,
    )


def open_embedded(settings: Settings, engine: Engine | None, observer: Observer) -> Model:
    return load(
        settings.model,
        engine or settings.engine,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        row_budget=settings.row_budget,
        max_waiting=settings.max_waiting,
        max_seconds=settings.max_wait,
        observer=observer,
    )


def watch(request: Request, jobs: Sequence[Job]) -> "asyncio.Task[None]":
    watcher = asyncio.create_task(cancel_on_disconnect(request, jobs))
    watcher.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, or asyncio logs it
    return watcher


async def cancel_on_disconnect(request: Request, jobs: Sequence[Job]) -> None:
    """Cancel the jobs when the client closes the connection: they end before the batcher's next tick."""
    try:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    finally:  # also when the body of a request that should have none is too large
        for job in jobs:
            job.cancel()


def at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise InputError(f"{name} must be at most {limit} on this server, got {shown(value)}", name)
