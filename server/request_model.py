"""The model of one request: its classes, defaults and limits, and running, streaming and cancelling its tasks."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from dsd_serve.backends import Job
from dsd_serve.backends.row_budget import MAX_BUDGET
from dsd_serve.errors import CancelledError, DeadlineError, InputError, QueueFullError, shown
from dsd_serve.imaging import codec
from dsd_serve.labels import ImageClass
from dsd_serve.params import MAX_SEED, SamplingParams, check_sampler, from_api
from dsd_serve.programs import OnPreviews, Task
from server.keys import claim_images
from server.model_slot import Served
from server.request_memory import RequestResources, resources_of
from server.schemas import EditQuery, End, GenerateRequest, SamplingQuery
from server.service import ALL, Service
from server.stream_events import PING_SECONDS, Done, Event, EventQueue, Preview, soon, within


@dataclass(frozen=True)
class Results:
    """Results in the order of the tasks, and how long they waited and ran, in milliseconds."""

    results: list[Any]
    queue_ms: float
    network_ms: float

    @property
    def server_timing(self) -> str:
        return f"queue;dur={self.queue_ms:.1f}, network;dur={self.network_ms:.1f}"


class RequestModel:
    """The model that a request uses, from its beginning to its end, whatever is served under the same name meanwhile.

    service: the server, with its limits and counters. waited: seconds for which the model was loaded.
    """

    def __init__(self, service: Service, served: Served, waited: float = 0.0) -> None:
        self.service, self.waited = service, waited
        self.settings, self.decoder, self.encoder = service.settings, service.decoder, service.encoder
        self.info, self.config, self.backend = served.info, served.info.config, served.backend

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
        queue = EventQueue(self.service.previews)
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
        within_limit = (limit if timeout is None else min(timeout, limit)) - self.waited
        if within_limit <= 0:
            raise DeadlineError("the model was loaded too late for this request; send it again")
        held.drop("key")
        held.put("key", claim_images(len(tasks), self.service.others))
        self.count(held, len(tasks))
        jobs = self.backend.submit_tasks(tasks, timeout=within_limit, on_preview=on_preview)
        held.deadline = asyncio.get_running_loop().time() + within_limit
        self.service.traces.follow(jobs)
        return jobs

    def count(self, held: RequestResources, count: int) -> None:
        """Count images until they are sent. Raises QueueFullError if too many images are unsent, or if one client
        would have more than half of the queue."""
        held.drop("images")
        who, limit, service = held.who, self.settings.max_waiting, self.service
        unanswered = service.unanswered + service.others.get(ALL, 0)
        if unanswered + count > 2 * limit + MAX_BUDGET:
            service.metrics.rejected("queue_full")
            raise QueueFullError(f"{unanswered} images wait to be drawn, encoded and sent; try again later", 5.0)
        share = 0 if who is None else service.shares[who] + service.others.get(who, 0)
        if len(service.keys) != 1 and share and share + count > max(1, limit // 2):
            service.metrics.rejected("queue_full")
            raise QueueFullError(
                f"{who} has {share} images under way, and half of the {limit} that may wait is the most "
                "for one; try again when some are done",
                max(1.0, self.backend.seconds_ahead() / 2),
            )
        service.add_images(who, count)
        held.put("images", lambda: service.add_images(who, -count))

    def params(self, query: SamplingQuery) -> list[SamplingParams]:
        """Sampling parameters of each image; raises InputError above a limit."""
        defaults, limits = self.info.defaults, self.settings
        steps = min(defaults.num_steps, limits.max_steps) if query.steps is None else query.steps
        at_most("n", query.n, limits.max_images)
        at_most("steps", steps, limits.max_steps)
        self.check_size(query.size)
        check_sampler(defaults.sampler if query.sampler is None else query.sampler, self.config.flow_map)
        seed = secrets.randbelow(2**32) if query.seed is None else query.seed
        first = from_api({**query.model_dump(), "seed": seed, "steps": steps}, defaults)
        if first.index + query.n - 1 > MAX_SEED:
            most = MAX_SEED - query.n + 1
            raise InputError(f"index must be at most {most} for {query.n} images, got {first.index}", "index")
        return [replace(first, index=first.index + i) for i in range(query.n)]

    def class_of(self, query: GenerateRequest | EditQuery | End, param: str = "class") -> ImageClass | None:
        """The class that a request names; None for an edit towards none, or if the model has no classes.

        Raises InputError, which names the parameter `param`.
        """
        optional = isinstance(query, EditQuery)
        if self.config.num_classes and not optional and "class_" not in query.model_fields_set:
            raise InputError(f"{param} is missing", param)
        return self.info.find_class(query.class_, param, optional)

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


async def use_model(request: Request, name: str | None = None, timeout: float | None = None) -> RequestModel:
    """The model that a request names, until its answer has been sent. Raises the errors of `Models.use`."""
    service: Service = request.app.state.service
    limit = service.settings.max_seconds
    served, release, waited = await service.models.use(name, limit if timeout is None else min(timeout, limit))
    resources_of(request.scope).put("model", release)
    return RequestModel(service, served, waited)


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
