"""What the routes share: the model, the batcher, and how a request's tasks are run, streamed and cancelled."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from dsd_serve.batcher import Batcher, Job, Observer
from dsd_serve.engines import Engine
from dsd_serve.errors import ConfigError, InputError
from dsd_serve.host import About, Host, open_host
from dsd_serve.params import SamplingParams
from dsd_serve.rows import Pixels
from dsd_serve.tasks import OnPreviews, Task
from dsd_serve.triton import RemoteBatcher, RemoteJob, parse_addresses
from server.drain import Drain
from server.metrics import Metrics
from server.schemas import SamplingQuery
from server.security import claim_images, load_keys, parse_origins, renew
from server.settings import Settings
from server.traces import load_traces
from server.uploads import Decoder

log = logging.getLogger(__name__)

AnyJob = Job | RemoteJob
PING_SECONDS = 15  # proxies close streams that are silent for longer


@dataclass(frozen=True)
class Finished:
    """Results in the order of the tasks, and how long they waited and ran, in milliseconds."""

    results: list[Any]
    queue_ms: float
    network_ms: float

    @property
    def server_timing(self) -> str:
        return f"queue;dur={self.queue_ms:.1f}, network;dur={self.network_ms:.1f}"


@dataclass(frozen=True)
class Preview:
    """The decoded clean estimate of task `number` after `step`, uint8 [3, H, W]."""

    number: int
    step: int
    pixels: Pixels


@dataclass(frozen=True)
class Ended:
    """Task `number` is done; `future` has its picture or its error."""

    number: int
    future: "Future[Any]"


Event = Preview | Ended | None  # None: nothing for PING_SECONDS


class Service:
    """One model behind a batcher, with what surrounds it. engine: in place of the one that the settings name."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.keys = load_keys(settings.api_keys, os.environ)
        self.origins = parse_origins(settings.cors_origins)
        self.traces = load_traces(settings.otel)
        self.drain, self.metrics = Drain(), Metrics()
        self.decoder = Decoder(settings)
        self.batcher: Batcher | RemoteBatcher
        if settings.triton:
            self.batcher = open_remote(settings, self.metrics)
        else:
            host = open_embedded(settings, engine, self.metrics)
            self.batcher = host.batcher
            self.serve(host.about)

    def reload_keys(self) -> None:
        """Read the API keys again; those from before stay when that fails, or when there were none."""
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
        if isinstance(self.batcher, RemoteBatcher):
            log.info("waiting for Triton at %s", self.settings.triton)
            self.serve(self.batcher.wait())

    def serve(self, model: About) -> None:
        self.model, self.config = model, model.config
        (log.info if model.invariance.holds else log.warning)("self-test: %s", model.invariance)
        log.info("%s on %s, %d rows a tick", model.name, model.described, model.budget)

    async def run(self, request: Request, asked: Sequence[Task], timeout: float | None = None) -> Finished:
        """Carry out the tasks of one request; cancelled when its client goes away."""
        jobs = self.submit(asked, timeout)
        watcher = asyncio.create_task(cancel_on_disconnect(request, jobs))
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        finally:
            watcher.cancel()
            for job in jobs:
                job.cancel()  # does nothing to those that are done
        first = min(job.submitted for job in jobs)
        started, ended = min(job.started for job in jobs), max(job.ended for job in jobs)
        return Finished(results, 1000 * (started - first), 1000 * (ended - started))

    def stream(self, request: Request, asked: Sequence[Task], timeout: float | None = None) -> AsyncIterator[Event]:
        """Carry out tasks and tell what happens. They are submitted at once: this raises what `submit` raises."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            soon(loop, lambda: queue.put_nowait(event))

        def on_end(number: int) -> Callable[["Future[Any]"], None]:
            return lambda future: tell(Ended(number, future))

        jobs = self.submit(asked, timeout, lambda number, step, pixels: tell(Preview(number, step, pixels)))
        for number, job in enumerate(jobs):
            job.future.add_done_callback(on_end(number))
        watcher = asyncio.create_task(cancel_on_disconnect(request, jobs))

        async def events() -> AsyncIterator[Event]:
            remaining = len(jobs)
            try:
                while remaining:
                    event = await within(PING_SECONDS, queue.get())
                    remaining -= isinstance(event, Ended)
                    yield event
            finally:
                watcher.cancel()
                for job in jobs:
                    job.cancel()

        return events()

    def submit(
        self, asked: Sequence[Task], timeout: float | None, on_preview: OnPreviews | None = None
    ) -> Sequence[AnyJob]:
        """Put the tasks of one request in the queue. Raises what `submit_tasks` and `claim_images` raise."""
        limit = self.settings.max_seconds
        release = claim_images(len(asked))
        try:
            within_limit = limit if timeout is None else min(timeout, limit)
            jobs = self.batcher.submit_tasks(asked, timeout=within_limit, on_preview=on_preview)
        except Exception:
            release()
            raise
        self.traces.follow(jobs)
        loop, remaining = asyncio.get_running_loop(), len(jobs)

        def one_ended() -> None:
            nonlocal remaining
            remaining -= 1
            if not remaining:
                release()

        for job in jobs:
            job.future.add_done_callback(lambda _: soon(loop, one_ended))
        return jobs

    def params(self, query: SamplingQuery) -> list[SamplingParams]:
        """Sampling parameters of each picture; raises InputError above a limit."""
        defaults, limits = self.model.defaults, self.settings
        steps = min(defaults.num_steps, limits.max_steps) if query.steps is None else query.steps
        at_most("n", query.n, limits.max_images)
        at_most("steps", steps, limits.max_steps)
        self.check_size(query.size)
        seed = secrets.randbelow(2**32) if query.seed is None else query.seed
        return [
            SamplingParams(
                seed=seed,
                index=query.index + i,
                num_steps=steps,
                sampler=defaults.sampler if query.sampler is None else query.sampler,
                guidance_scale=defaults.guidance_scale if query.guidance is None else query.guidance,
                guidance_start=query.guidance_start,
                guidance_stop=query.guidance_stop,
                preview_every=query.preview_every,
            )
            for i in range(query.n)
        ]

    def check_walk(self, n: int, size: int | None) -> None:
        at_most("n", n, self.settings.max_images)
        self.check_size(size)

    def check_size(self, size: int | None) -> None:
        at_most("size", size or 1, self.settings.max_size)


def open_remote(settings: Settings, observer: Observer) -> RemoteBatcher:
    return RemoteBatcher(
        parse_addresses(settings.triton),
        max_waiting=settings.max_waiting,
        observer=observer,
    )


def open_embedded(settings: Settings, engine: Engine | None, observer: Observer) -> Host:
    return open_host(
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


def soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call in the loop's thread, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(call)


async def cancel_on_disconnect(request: Request, jobs: Sequence[AnyJob]) -> None:
    """Cancel the jobs when the client closes the connection: they end before the batcher's next tick."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for job in jobs:
        job.cancel()


async def within(seconds: float, awaitable: Awaitable[Event]) -> Event:
    try:
        return await asyncio.wait_for(awaitable, seconds)
    except TimeoutError:
        return None


def at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise InputError(f"{name} must be at most {limit} on this server, got {value}")
