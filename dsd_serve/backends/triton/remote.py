"""The backend that sends tasks to Triton servers over gRPC.

A task goes to the server with the fewest tasks under way, as a stream of its own, so that previews arrive as they are
made and the task can be cancelled. Every server has a health check each second; one that fails it is left out until it
succeeds again, and its jobs end with ClosedError. A broken stream ends its own job only, and the server is checked at
once. All servers must have the same model, by its fingerprint.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dsd_serve.backends import ModelInfo, Observer, outcome_of, task_messages
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.backends.triton import results
from dsd_serve.backends.triton.addresses import channel_options
from dsd_serve.backends.triton.connection import RemoteServer, TritonJob
from dsd_serve.backends.triton.results import Description, WrongAnswer
from dsd_serve.config import ModelConfig
from dsd_serve.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    DSDError,
    EngineError,
    EngineUnavailableError,
    QueueFullError,
)
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array

log = logging.getLogger(__name__)

SHOWN = ("not_ready", "running", "waiting", "seconds_ahead", "budget")  # of an instance
REFUSED_FOR, AFTER_REFUSAL = 10.0, 0.02  # seconds for which an instance is looked for, and between two requests
MARGIN = 5.0  # seconds after its deadline at which a task is dropped here if the server has not done so


class TritonBackend:
    """Owns one thread with the connections. All methods may be called from any thread.

    addresses: of `parse_addresses`. max_waiting: images in progress; beyond that, QueueFullError. The servers limit
    the work in their queues. Raises EngineUnavailableError without Triton's client.
    """

    given_up = None  # servers may always come back
    times = TickTimes()  # the servers estimate, with times of their own

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        max_waiting: int = 256,
        observer: Observer | None = None,
    ) -> None:
        try:
            from tritonclient.grpc import aio
        except ImportError as error:
            raise EngineUnavailableError(
                f"--triton needs the client of Triton, which cannot be imported ({error}): pip install '.[triton]'"
            ) from None
        self.max_waiting = max_waiting
        self.observer = observer or Observer()
        self.info: ModelInfo | None = None  # of the first server that answered
        self.known = threading.Event()  # set once there is an info
        self.closed = False
        self.lock = threading.Lock()
        self.num_under_way = 0
        self.jobs: set[TritonJob] = set()  # those that the loop has begun
        self.turns = itertools.count()
        self.loop = asyncio.new_event_loop()
        self.connect = lambda address: aio.InferenceServerClient(address, channel_args=channel_options(address))
        self.servers: list[RemoteServer] = []
        opened = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, args=(list(addresses), opened), name="triton", daemon=True)
        self.thread.start()
        opened.wait()

    # For callers.

    def wait(self, seconds: float | None = None) -> ModelInfo:
        """The model of the servers, once one of them is ready. Raises ClosedError if none is ready in time."""
        if not self.known.wait(seconds) or self.info is None or self.closed:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        return self.info

    def submit_tasks(
        self, tasks: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> list[TritonJob]:
        """Send tasks to the servers; see `Batcher.submit_tasks`. on_preview: called from the thread.

        Raises ClosedError when no server is ready, QueueFullError when too many tasks are in progress. A rejection by
        a server fails the job.
        """
        if (reason := self.not_ready) is not None:
            self.observer.rejected("draining" if self.closed else "dead")
            raise ClosedError(reason)
        if (full := self.queue_full(len(tasks))) is not None:
            raise full
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        jobs = [TritonJob(number, deadline, task, on_preview, self.wake) for number, task in enumerate(tasks)]
        with self.lock:
            self.num_under_way += len(jobs)
        if not self.wake(lambda: self.begin(jobs)):
            for job in jobs:
                self.end(job, None, None, ClosedError("the server is shutting down"))
        return jobs

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """The error if there is no room for `count` more tasks now, else None."""
        under_way = self.num_under_way
        if under_way + count <= self.max_waiting:
            return None
        self.observer.rejected("queue_full")
        return QueueFullError(
            f"{under_way} images are under way; this server takes at most {self.max_waiting}; try again later",
            max(1.0, self.seconds_ahead() / 2),
        )

    def seconds_ahead(self) -> float:
        """Estimated seconds of the least busy instance's queue, at its last health check."""
        return min((one.seconds_ahead for one in self.ready_instances), default=0.0)

    @property
    def ready_servers(self) -> list[RemoteServer]:
        return [server for server in self.servers if server.not_ready is None]

    @property
    def ready_instances(self) -> list[Description]:
        return [one for server in self.servers for one in server.ready_instances]

    @property
    def not_ready(self) -> str | None:
        """The reason why nothing is served now, or None."""
        if self.closed:
            return "the server is shutting down"
        if self.ready_servers:
            return None
        return f"no Triton server is ready: {'; '.join(f'{one.address} {one.not_ready}' for one in self.servers)}"

    @property
    def ready(self) -> bool:
        return self.not_ready is None

    @property
    def config(self) -> ModelConfig:
        if self.info is None:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        return self.info.config

    @property
    def budget(self) -> int:
        """The largest of the instances, at their last health checks."""
        return max((one.budget for one in self.ready_instances), default=0 if self.info is None else self.info.budget)

    @property
    def num_running(self) -> int:
        """Tasks that have started on the servers, at their last health checks."""
        return sum(one.running for one in self.ready_instances)

    @property
    def num_waiting(self) -> int:
        """Tasks in the servers' queues, at their last health checks."""
        return sum(one.waiting for one in self.ready_instances)

    def snapshot(self) -> dict[str, Any]:
        """The servers and the tasks in progress, as plain values."""
        return {
            "under_way": self.num_under_way,
            "not_ready": self.not_ready,
            "servers": [
                {
                    "address": server.address,
                    "not_ready": server.not_ready,
                    "under_way": len(server.jobs),
                    "instances": {
                        one.instance: {name: getattr(one, name) for name in SHOWN} for one in server.instances.values()
                    },
                }
                for server in self.servers
            ],
        }

    def drain(self) -> None:
        """Accept nothing more, and finish what was accepted."""
        self.closed = True

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        self.drain()
        self.known.set()  # ends `wait`
        if not self.thread.is_alive():
            return True
        finished = bool(asyncio.run_coroutine_threadsafe(self.finish(timeout), self.loop).result())
        self.wake(self.loop.stop)
        self.thread.join()
        return finished

    def wake(self, call: Callable[[], object]) -> bool:
        """Call in the thread; False when it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(call)
            return True
        return False

    # In the thread.

    def run_loop(self, addresses: Sequence[str], opened: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)

        async def open_() -> None:
            self.servers = [
                RemoteServer(address, self.connect(address), self.accepts, self.known.set) for address in addresses
            ]
            self.watchers = [asyncio.create_task(server.watch()) for server in self.servers]
            opened.set()

        self.loop.run_until_complete(open_())
        self.loop.run_forever()
        self.loop.close()

    async def finish(self, timeout: float | None) -> bool:
        jobs = [job.running for job in self.jobs if job.running is not None]
        left = (await asyncio.wait(jobs, timeout=timeout))[1] if jobs else set()
        for one in (*left, *self.watchers):
            one.cancel()
        await asyncio.gather(*left, *self.watchers, return_exceptions=True)
        for server in self.servers:
            await server.client.close()
        return not left

    def accepts(self, info: ModelInfo) -> str | None:
        """The reason why a server with this model is left out, or None. The first model is the one that is served."""
        if self.info is None:
            self.info = info
        if info.fingerprint == self.info.fingerprint:
            return None
        return f"serves another model ({info.name}, {info.fingerprint[:12]}, not {self.info.fingerprint[:12]})"

    def begin(self, jobs: Sequence[TritonJob]) -> None:
        self.jobs.update(jobs)
        for job in jobs:
            job.running = self.loop.create_task(self.carry_out(job))
            job.running.add_done_callback(partial(self.never_began, job))

    def never_began(self, job: TritonJob, running: "asyncio.Task[None]") -> None:
        """asyncio does not enter a coroutine that is cancelled before its first step."""
        if running.cancelled():
            self.end(job, None, None, CancelledError("the job was cancelled"))

    async def carry_out(self, job: TritonJob) -> None:
        """From the choice of a server to the end of the job; never raises."""
        result: Any = None
        error: DSDError | None = None
        server: RemoteServer | None = None
        try:
            if job.cancelled:
                raise CancelledError("the job was cancelled")
            server = self.choose()
            server.jobs.add(job)
            until = None if math.isinf(job.deadline) else job.deadline - time.monotonic() + MARGIN
            async with asyncio.timeout(until):
                result = await self.answer_of_any(server, job)
        except TimeoutError:
            error = DeadlineError("the result was not ready in time and was dropped")
        except asyncio.CancelledError:
            error = CancelledError("the job was cancelled")
            if server is not None and server.not_ready is not None and not job.cancelled:
                error = ClosedError(f"Triton at {server.address} {server.not_ready}; send the request again")
        except DSDError as failed:
            error = failed
        except WrongAnswer as failed:
            log.error("Triton at %s sent an invalid answer: %s", server.address if server else "", failed)
            error = EngineError(f"Triton sent an invalid answer: {failed}")
        except Exception as failed:
            reason = server.reason_of(failed) if server else repr(failed)
            error = ClosedError(f"the connection to Triton broke ({reason}); send the request again")
            if server is not None:
                server.doubt(failed)
        self.end(job, server, result, error)

    def choose(self) -> RemoteServer:
        """The ready server with the fewest jobs; ties are broken in turn."""
        ready = self.ready_servers
        if not ready:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        turn = next(self.turns)
        return min((ready[(turn + i) % len(ready)] for i in range(len(ready))), key=lambda server: len(server.jobs))

    async def answer_of_any(self, server: RemoteServer, job: TritonJob) -> Any:
        """The result of a job, from the first instance of a server that does not refuse it.

        Triton chooses the instance, so one that refuses may be asked several times.
        """
        until = math.inf
        while True:
            dead = server.dead_instances
            try:
                return await self.answer(server, job)
            except Exception as error:
                until = min(until, time.monotonic() + REFUSED_FOR)
                if not server.refused(error, dead) or time.monotonic() > until:
                    raise
            await asyncio.sleep(AFTER_REFUSAL)

    async def answer(self, server: RemoteServer, job: TritonJob) -> Any:
        """The result of a job, from a server. Calls its on_preview."""
        inputs, parameters = task_messages.to_wire(job.task)
        if not math.isinf(job.deadline):
            parameters["max_seconds"] = max(0.001, job.deadline - time.monotonic())
        result: Array | None = None
        reader = results.ResponseReader(job.task, self.config)
        async for outputs in server.stream(inputs, parameters):
            response = reader.read(outputs)
            if isinstance(response, results.Preview):
                if job.on_preview is not None:
                    job.on_preview(job.number, response.step, response.pixels)
                continue
            job.started = max(job.submitted, time.monotonic() - response.ran)
            self.observer.started(response.queued)
            result = response.result
        if result is None:
            raise WrongAnswer("it ends before the result")
        return result

    def end(self, job: TritonJob, server: RemoteServer | None, result: Any, error: DSDError | None) -> None:
        """Resolve the future of a job; a second end changes nothing."""
        if job.ended:
            return
        self.jobs.discard(job)
        if server is not None:
            server.jobs.discard(job)
        with self.lock:
            self.num_under_way -= 1
        self.observer.finished(outcome_of(error))
        job.resolve(result, error)
