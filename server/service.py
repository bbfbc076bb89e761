"""What the routes share: the model, the batcher, and how a request's programs are run, streamed and cancelled."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from dsd_serve.batcher import Batcher, Job
from dsd_serve.checkpoint import ModelDir, read_model_dir
from dsd_serve.engines import Engine, load_engine
from dsd_serve.engines.selftest import invariance, mixture
from dsd_serve.errors import InputError
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Cost, OnPreview, Program
from dsd_serve.rows import Pixels
from server.drain import Drain
from server.metrics import Metrics
from server.schemas import SamplingQuery
from server.security import claim_images, load_keys
from server.settings import Settings
from server.traces import load_traces
from server.uploads import Decoder

log = logging.getLogger(__name__)

Programs = Sequence[tuple[Program, Cost]]
PING_SECONDS = 15  # proxies close streams that are silent for longer


@dataclass(frozen=True)
class Finished:
    """Results in the order of the programs, and how long they waited and ran, in milliseconds."""

    results: list[Any]
    queue_ms: float
    network_ms: float

    @property
    def server_timing(self) -> str:
        return f"queue;dur={self.queue_ms:.1f}, network;dur={self.network_ms:.1f}"


@dataclass(frozen=True)
class Preview:
    """The decoded clean estimate of program `number` after `step`, uint8 [3, H, W]."""

    number: int
    step: int
    pixels: Pixels


@dataclass(frozen=True)
class Ended:
    """Program `number` is done; `future` has its picture or its error."""

    number: int
    future: "Future[Any]"


Event = Preview | Ended | None  # None: nothing for PING_SECONDS


class Service:
    """One model directory on one engine behind one batcher. engine: in place of the one that the settings name."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.keys = load_keys(settings.api_keys, os.environ)
        self.traces = load_traces(settings.otel)
        self.drain, self.metrics = Drain(), Metrics()
        self.model: ModelDir = read_model_dir(settings.model)
        self.decoder = Decoder(settings)
        # In a thread that ends: flushing denormals holds for the whole thread, and this one will serve HTTP.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self.load, engine).result()
        (log.info if self.invariance.holds else log.warning)("self-test: %s", self.invariance)
        log.info("%s on %s, %d rows a tick", self.model.name, self.described, self.batcher.budget)

    def load(self, engine: Engine | None) -> None:
        """Load the engine, unless one is given, test it, and start the batcher."""
        settings = self.settings
        self.engine = engine or load_engine(
            settings.engine,
            settings.model,
            settings.device,
            settings.threads,
            flush_denormals=True,
            precision=settings.precision,
        )
        self.config = self.engine.config
        self.fingerprint = self.model.fingerprint(settings.precision)
        self.described = {key: str(value) for key, value in self.engine.describe().items()}
        self.invariance = invariance(self.engine, mixture(self.config, (1, 2, 1), seed=0))
        self.batcher = Batcher(
            self.engine,
            budget=settings.row_budget,
            max_waiting=settings.max_waiting,
            max_seconds=settings.max_wait,
            observer=self.metrics,
        )

    async def run(self, request: Request, programs: Programs, timeout: float | None = None) -> Finished:
        """Run the programs of one request; cancelled when its client goes away."""
        jobs = self.submit(programs, timeout)
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

    def stream(
        self, request: Request, programs: Callable[[Callable[[int], OnPreview]], Programs], timeout: float | None = None
    ) -> AsyncIterator[Event]:
        """Run programs and tell what happens. They are submitted at once, so that this raises what `submit` raises.

        programs: is given a function that makes the `on_preview` of the program with that number.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            soon(loop, lambda: queue.put_nowait(event))

        def on_preview(number: int) -> OnPreview:
            return lambda step, pixels: tell(Preview(number, step, pixels))

        def on_end(number: int) -> Callable[["Future[Any]"], None]:
            return lambda future: tell(Ended(number, future))

        jobs = self.submit(programs(on_preview), timeout)
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

    def submit(self, programs: Programs, timeout: float | None) -> list[Job]:
        """Put the programs of one request in the queue. Raises what `Batcher.submit_all` and `claim_images` raise."""
        limit = self.settings.max_seconds
        release = claim_images(len(programs))
        try:
            traced = [(self.traces.traced(program), cost) for program, cost in programs]
            jobs = self.batcher.submit_all(traced, timeout=limit if timeout is None else min(timeout, limit))
        except Exception:
            release()
            raise
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


def soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call in the loop's thread, from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(call)


async def cancel_on_disconnect(request: Request, jobs: Sequence[Job]) -> None:
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
