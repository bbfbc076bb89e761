"""The same `submit_tasks` as a Batcher's, carried out by Triton servers over gRPC.

Tasks go to the server with the fewest of them under way, each as a stream of its own, so that its previews come as they
are made and that it can be cancelled. A server that does not answer when it is asked how it is, every second, is left
out until it does, and what it was working on ends with ClosedError. A stream that breaks ends its own job only, and the
server is asked at once. All servers must have the same model, told by its fingerprint.
"""

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import math
import os
import re
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsd_serve.backends import About
from dsd_serve.backends.batcher import OUTCOMES, Observer
from dsd_serve.backends.triton import messages
from dsd_serve.backends.triton.messages import WrongAnswer
from dsd_serve.config import ModelConfig
from dsd_serve.errors import (
    CancelledError,
    ClosedError,
    ConfigError,
    DeadlineError,
    DSDError,
    EngineError,
    EngineUnavailableError,
    QueueFullError,
    shown,
)
from dsd_serve.rows import Array
from dsd_serve.tasks import OnPreviews, Task

log = logging.getLogger(__name__)

HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]+)?\]")

ASK_EVERY = 1.0  # seconds between two questions how a server is
ASK_AGAIN = 0.25  # the same of one that is not ready
ANSWER_WITHIN = 5.0  # seconds; a machine under full load is slow, not dead
MARGIN = 5.0  # seconds after its deadline at which a task is given up here, should the server not do it
MOST_BYTES = 64_000_000  # of one answer; the largest is an image of 4096 x 4096 pixels
CHANNEL = (
    ("grpc.max_receive_message_length", MOST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # a server that is back is found within a second
)


def parse_addresses(text: str) -> list[str]:
    """Addresses of `HOST:PORT[,HOST:PORT]`, with the gRPC port. Raises ConfigError."""
    addresses = [item.strip() for item in text.split(",")]
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ConfigError(
                f"triton must be HOST:PORT[,HOST:PORT] with Triton's gRPC port (8001), an IPv6 address in brackets, "
                f"got {shown(address)}"
            )
    if repeated := [address for address in addresses if addresses.count(address) > 1]:
        raise ConfigError(f"triton names {repeated[0]} twice; give each server once")
    return addresses


def is_local(address: str) -> bool:
    """Whether HOST:PORT is this machine."""
    host = address.rpartition(":")[0].strip("[]").partition("%")[0].lower()
    try:
        number = ipaddress.ip_address(host)
        number = getattr(number, "ipv4_mapped", None) or number
        return number.is_loopback or number.is_unspecified
    except ValueError:
        return host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")


def channel_options(address: str) -> list[tuple[str, int]]:
    """What gRPC is told of a channel. A server on this machine is never asked through a proxy."""
    return [*CHANNEL, ("grpc.enable_http_proxy", 0)] if is_local(address) else list(CHANNEL)


def proxy_of(address: str) -> str | None:
    """The variable that makes gRPC ask a proxy for HOST:PORT, where there is one. Its value may hold a password."""
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy", "")  # noqa: SIM112 gRPC's spelling
    bypass = urllib.request.proxy_bypass_environment  # type: ignore[attr-defined]  # the stubs leave it out
    if is_local(address) or bypass(address, {"no": exempt}):
        return None
    return next((name for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), None)


@dataclass(eq=False)
class RemoteJob:
    """A task on its way, with what a `batcher.Job` has. started is estimated from what the server tells at the end."""

    number: int  # among those of its request
    task: Task
    deadline: float
    on_preview: OnPreviews | None
    batcher: "RemoteBatcher"
    future: "Future[Any]" = field(default_factory=Future)
    running: "asyncio.Task[None] | None" = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    ended: float = 0.0

    def cancel(self) -> None:
        self.cancelled = True
        if not self.future.done():
            self.batcher.soon(self.stop)

    def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()


class RemoteServer:
    """One Triton server, from the loop's side."""

    def __init__(self, address: str, client: Any) -> None:
        self.address, self.client = address, client
        self.not_ready: str | None = "has not answered yet"
        self.told: dict[str, Any] = {}  # its last answer to `describe`
        self.jobs: set[RemoteJob] = set()
        self.ask = asyncio.Event()  # set: ask at once how it is

    def lost(self, reason: str) -> None:
        """It does not answer: leave it out, and end what it was working on."""
        if reason != self.not_ready:
            log.warning("Triton at %s %s; it is left out until it is back", self.address, reason)
        self.not_ready = reason
        for job in list(self.jobs):
            job.stop()

    def doubt(self, reason: str) -> None:
        """A stream broke: give it nothing more until it has answered how it is, which it is asked now."""
        if self.not_ready is None:
            log.warning("Triton at %s %s; it is asked how it is", self.address, reason)
            self.not_ready = reason
        self.ask.set()

    def reason_of(self, error: BaseException) -> str:
        """Why it does not work, to follow its address in a sentence."""
        if isinstance(error, BrokenServer):
            return f"answers: {' '.join(str(error).split())[:200]}"
        if isinstance(error, WrongAnswer):
            return f"gives a wrong answer: {error}"
        details = getattr(error, "details", None)
        text = " ".join(str(details() if callable(details) else error).split())[:200] or type(error).__name__
        name = proxy_of(self.address)
        through = f"; it is asked through the proxy of {name}, and no_proxy names what is not" if name else ""
        return f"does not answer ({text}{through})"


class RemoteBatcher:
    """Owns one thread with the connections. All methods may be called from any thread.

    addresses: of `parse_addresses`. max_waiting: images that may be under way from here; above, QueueFullError. How
    much work may be ahead of them is for the servers to say. Raises EngineUnavailableError without Triton's client.
    """

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
                f"--triton needs the client of Triton, which cannot be imported ({error}): "
                "pip install 'dsd-serve[triton]'"
            ) from None
        self.max_waiting = max_waiting
        self.observer = observer or Observer()
        self.about: About | None = None  # of the first server that answered
        self.known = threading.Event()  # about is there
        self.closed = False
        self.lock = threading.Lock()
        self.num_under_way = 0
        self.jobs: set[RemoteJob] = set()  # those under way that the loop has begun
        self.turns = itertools.count()
        self.loop = asyncio.new_event_loop()
        self.connect = lambda address: aio.InferenceServerClient(address, channel_args=channel_options(address))
        self.servers: list[RemoteServer] = []
        opened = threading.Event()
        self.thread = threading.Thread(target=self.run_loop, args=(list(addresses), opened), name="triton", daemon=True)
        self.thread.start()
        opened.wait()

    # What callers use.

    def wait(self, seconds: float | None = None) -> About:
        """What the servers serve, once one of them is ready. Raises ClosedError when none was in time."""
        if not self.known.wait(seconds) or self.about is None or self.closed:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        return self.about

    def submit_tasks(
        self, asked: Sequence[Task], *, timeout: float | None = None, on_preview: OnPreviews | None = None
    ) -> list[RemoteJob]:
        """Send tasks to the servers; see `Batcher.submit_tasks`. on_preview: is called from the thread.

        Raises ClosedError when no server is ready, QueueFullError when too much is under way here. What a server
        refuses fails its job.
        """
        if (reason := self.not_ready) is not None:
            self.observer.rejected("draining" if self.closed else "dead")
            raise ClosedError(reason)
        if (full := self.queue_full(len(asked))) is not None:
            raise full
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        jobs = [RemoteJob(number, task, deadline, on_preview, self) for number, task in enumerate(asked)]
        with self.lock:
            self.num_under_way += len(jobs)
        if not self.soon(lambda: self.begin(jobs)):
            for job in jobs:
                self.end(job, None, None, ClosedError("the server is shutting down"))
        return jobs

    def queue_full(self, count: int = 1) -> QueueFullError | None:
        """Why `count` more tasks would not be taken now, for want of room; None when there is room."""
        under_way = self.num_under_way
        if under_way + count <= self.max_waiting:
            return None
        self.observer.rejected("queue_full")
        return QueueFullError(
            f"{under_way} images are under way; this server takes at most {self.max_waiting}; try again later",
            max(1.0, self.seconds_ahead() / 2),
        )

    def seconds_ahead(self) -> float:
        """Estimated seconds of the least busy server's queue, as it last told."""
        return min((server.told["seconds_ahead"] for server in self.ready_servers), default=0.0)

    @property
    def ready_servers(self) -> list[RemoteServer]:
        return [server for server in self.servers if server.not_ready is None]

    @property
    def not_ready(self) -> str | None:
        """Why nothing would be served now, or None."""
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
        if self.about is None:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        return self.about.config

    @property
    def budget(self) -> int:
        return 0 if self.about is None else self.about.budget

    @property
    def num_running(self) -> int:
        """Programs that have begun on the servers, as they last told."""
        return sum(int(server.told["running"]) for server in self.ready_servers)

    @property
    def num_waiting(self) -> int:
        """Programs in the servers' queues, as they last told."""
        return sum(int(server.told["waiting"]) for server in self.ready_servers)

    def snapshot(self) -> dict[str, Any]:
        """The servers, and what is under way from here, as plain values."""
        return {
            "under_way": self.num_under_way,
            "not_ready": self.not_ready,
            "servers": [
                {
                    "address": server.address,
                    "not_ready": server.not_ready,
                    "under_way": len(server.jobs),
                    **{name: server.told.get(name) for name in ("running", "waiting", "seconds_ahead")},
                }
                for server in self.servers
            ],
        }

    def drain(self) -> None:
        """Take nothing more, and go on with what is there."""
        self.closed = True

    def close(self, timeout: float | None = None) -> bool:
        """Drain, and after `timeout` seconds cancel what is left. True if all finished."""
        self.drain()
        self.known.set()  # who waits for a server waits no longer
        if not self.thread.is_alive():
            return True
        finished = bool(asyncio.run_coroutine_threadsafe(self.finish(timeout), self.loop).result())
        self.soon(self.loop.stop)
        self.thread.join()
        return finished

    def soon(self, call: Any) -> bool:
        """Call in the thread; False when it has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(call)
            return True
        return False

    # The thread.

    def run_loop(self, addresses: Sequence[str], opened: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)

        async def open_() -> None:
            self.servers = [RemoteServer(address, self.connect(address)) for address in addresses]
            self.watchers = [asyncio.create_task(self.watch(server)) for server in self.servers]
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

    async def watch(self, server: RemoteServer) -> None:
        """Ask a server again and again how it is."""
        while True:
            try:
                told = await asyncio.wait_for(self.describe(server), ANSWER_WITHIN)
            except TimeoutError:
                server.lost(f"has not answered for {ANSWER_WITHIN:g} s")
            except Exception as error:  # grpc and tritonclient raise many kinds; each means that it is not ready
                server.lost(server.reason_of(error))
            else:
                self.heard(server, told)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.ask.wait(), ASK_AGAIN if server.not_ready else ASK_EVERY)

    async def describe(self, server: RemoteServer) -> dict[str, Any]:
        server.ask.clear()
        told: dict[str, Any] | None = None
        async for outputs in self.stream(server, {}, messages.DESCRIBE):
            if told is not None:
                raise WrongAnswer("a second description follows the first")
            told = messages.read_description(outputs)
        if told is None:
            raise WrongAnswer("it ends before the description")
        return told

    def heard(self, server: RemoteServer, told: dict[str, Any]) -> None:
        try:
            about = About.from_dict(told["about"])
        except Exception:  # it may be anything
            server.lost("has another version of this software, which cannot be understood")
            return
        if self.about is None:
            self.about = about
        if about.fingerprint != self.about.fingerprint:
            server.lost(
                f"serves another model ({about.name}, {about.fingerprint[:12]}, not {self.about.fingerprint[:12]})"
            )
            return
        server.told = told
        if told["not_ready"] is not None:
            server.lost(told["not_ready"])
            return
        if server.not_ready is not None:
            log.info("Triton at %s is ready: %s", server.address, about.described)
        server.not_ready = None
        self.known.set()

    def begin(self, jobs: Sequence[RemoteJob]) -> None:
        self.jobs.update(jobs)
        for job in jobs:
            job.running = self.loop.create_task(self.carry_out(job))
            job.running.add_done_callback(partial(self.never_began, job))

    def never_began(self, job: RemoteJob, running: "asyncio.Task[None]") -> None:
        """asyncio does not enter a coroutine that is cancelled before its first step."""
        if running.cancelled():
            self.end(job, None, None, CancelledError("the job was cancelled"))

    async def carry_out(self, job: RemoteJob) -> None:
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
                result = await self.answer(server, job)
        except TimeoutError:
            error = DeadlineError("the result was not there in time and was given up")
        except asyncio.CancelledError:
            error = CancelledError("the job was cancelled")
            if server is not None and server.not_ready is not None and not job.cancelled:
                error = ClosedError(f"Triton at {server.address} {server.not_ready}; send the request again")
        except DSDError as failed:
            error = failed
        except WrongAnswer as failed:
            log.error("Triton at %s gives a wrong answer: %s", server.address if server else "", failed)
            error = EngineError(f"Triton gave a wrong answer: {failed}")
        except Exception as failed:
            reason = server.reason_of(failed) if server else repr(failed)
            error = ClosedError(f"the connection to Triton broke ({reason}); send the request again")
            if server is not None:
                server.doubt(reason)
        self.end(job, server, result, error)

    def choose(self) -> RemoteServer:
        """The ready server with the least under way; among equals they take turns."""
        ready = self.ready_servers
        if not ready:
            raise ClosedError(self.not_ready or "no Triton server is ready")
        turn = next(self.turns)
        return min((ready[(turn + i) % len(ready)] for i in range(len(ready))), key=lambda server: len(server.jobs))

    async def answer(self, server: RemoteServer, job: RemoteJob) -> Any:
        """The result of a job; calls its on_preview."""
        inputs, parameters = messages.to_wire(job.task)
        if not math.isinf(job.deadline):
            parameters["max_seconds"] = max(0.001, job.deadline - time.monotonic())
        result: Array | None = None
        answers = messages.Answers(job.task, self.config)
        async for outputs in self.stream(server, inputs, parameters):
            told = answers.read(outputs)
            if isinstance(told, messages.Preview):
                if job.on_preview is not None:
                    job.on_preview(job.number, told.step, told.pixels)
                continue
            job.started = max(job.submitted, time.monotonic() - told.ran)
            self.observer.started(told.queued)
            result = told.result
        if result is None:
            raise WrongAnswer("it ends before the result")
        return result

    async def stream(
        self, server: RemoteServer, inputs: Mapping[str, Array], parameters: messages.Parameters
    ) -> AsyncIterator[dict[str, Array]]:
        """The output tensors of each response. Ended early, it cancels the request.

        Raises BrokenServer, WrongAnswer, and what gRPC raises.
        """
        from tritonclient.grpc import InferInput
        from tritonclient.utils import np_to_triton_dtype

        tensors = []
        for name, array in inputs.items():
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))

        async def one() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": messages.MODEL, "inputs": tensors, "parameters": dict(parameters)}

        call = server.client.stream_infer(one())
        try:
            async for answer, failed in call:
                if failed is not None:
                    text = str(failed.message())
                    raise messages.error_from_text(text) or BrokenServer(text)
                yield tensors_of(answer)
        except BaseException:
            call.cancel()
            raise

    def end(self, job: RemoteJob, server: RemoteServer | None, result: Any, error: DSDError | None) -> None:
        """Resolve the future of a job; a second end changes nothing."""
        if job.ended:
            return
        job.ended = time.monotonic()
        self.jobs.discard(job)
        if server is not None:
            server.jobs.discard(job)
        with self.lock:
            self.num_under_way -= 1
        self.observer.finished(OUTCOMES.get(type(error), "failed"))
        if not job.future.set_running_or_notify_cancel():
            return  # the caller cancelled the future itself
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)


def tensors_of(answer: Any) -> dict[str, Array]:
    """The output tensors of a response. Raises WrongAnswer where it contradicts itself."""
    outputs = answer.get_response().outputs
    if len({output.name for output in outputs}) < len(outputs):
        raise WrongAnswer("two tensors have the same name")
    try:
        return {output.name: answer.as_numpy(output.name) for output in outputs}
    except Exception as error:  # tritonclient believes what it is sent
        raise WrongAnswer(f"a tensor cannot be read: {' '.join(str(error).split())[:150]}") from None


class BrokenServer(Exception):
    """Triton itself answered with an error: the model is not loaded, or its process died."""
