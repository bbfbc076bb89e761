"""A connection to one Triton server, and the jobs that it carries out."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsd_serve.backends import Job, ModelInfo, task_messages
from dsd_serve.backends.triton import results
from dsd_serve.backends.triton.addresses import proxy_of
from dsd_serve.backends.triton.results import Description, WrongAnswer
from dsd_serve.errors import NotReadyError
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array

log = logging.getLogger(__name__)

CHECK_EVERY = 1.0  # health-check interval, in seconds
CHECK_AGAIN = 0.25  # the interval while a server is not ready
ANSWER_WITHIN = 5.0  # seconds; a machine under full load is slow, not dead
FORGET_AFTER = 60.0  # seconds without a word of an instance, after which it no longer exists


@dataclass(eq=False)
class TritonJob(Job):
    """A task at a Triton server. started is estimated from the times in the last response.

    wake: calls a function in the thread of the backend.
    """

    task: Task
    on_preview: OnPreviews | None
    wake: Callable[[Callable[[], object]], bool]
    running: "asyncio.Task[None] | None" = None

    def cancel(self) -> None:
        self.cancelled = True
        if not self.future.done():
            self.wake(self.stop)

    def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()


class BrokenServer(Exception):
    """An error of Triton itself: the model is not loaded, or its process died."""


class RemoteServer:
    """A connection to one Triton server; used in the thread of the backend only.

    accepts: the reason why a model is not the one that is served, or None. on_ready: called whenever it becomes ready.
    A server is ready while one of its instances is. Each health check is answered by one of them, in turn.
    """

    def __init__(
        self,
        address: str,
        client: Any,
        accepts: Callable[[ModelInfo], str | None],
        on_ready: Callable[[], None],
    ) -> None:
        self.address, self.client, self.accepts, self.on_ready = address, client, accepts, on_ready
        self.not_ready: str | None = "has not answered yet"
        self.instances: dict[str, Description] = {}  # the last of each
        self.heard: dict[str, float] = {}  # when it came
        self.jobs: set[TritonJob] = set()
        self.check_now = asyncio.Event()

    @property
    def ready_instances(self) -> list[Description]:
        return [one for one in self.instances.values() if one.not_ready is None] if self.not_ready is None else []

    @property
    def dead_instances(self) -> set[str]:
        return {name for name, one in self.instances.items() if one.not_ready is not None}

    # Health checks.

    async def watch(self) -> None:
        """Check its health repeatedly; never raises."""
        # Without asyncio.wait_for, which before Python 3.12 loses a cancellation that meets the answer.
        while True:
            try:
                async with asyncio.timeout(ANSWER_WITHIN):
                    self.update(await self.describe())
            except TimeoutError:
                self.lost(f"has not answered for {ANSWER_WITHIN:g} s")
            except Exception as error:  # grpc and tritonclient raise many kinds; each means that it is not ready
                self.failed(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_AGAIN if self.not_ready else CHECK_EVERY):
                    await self.check_now.wait()

    async def describe(self) -> Description:
        self.check_now.clear()
        found: Description | None = None
        async for outputs in self.stream({}, task_messages.DESCRIBE):
            if found is not None:
                raise WrongAnswer("a second description follows the first")
            found = results.read_description(outputs)
        if found is None:
            raise WrongAnswer("it ends before the description")
        return found

    def update(self, description: Description) -> None:
        """Take the server in or leave it out, by what one instance says of itself."""
        if (reason := self.accepts(description.info)) is not None:
            self.lost(reason)
            return
        now = time.monotonic()
        self.note(description)
        self.heard[description.instance] = now
        for name in [name for name, at in self.heard.items() if now > at + FORGET_AFTER]:
            del self.heard[name], self.instances[name]

    def note(self, description: Description) -> None:
        """The state of an instance: the server is lost only when all instances are."""
        before = self.instances.get(description.instance)
        self.instances[description.instance] = description
        reason = description.not_ready
        if all(one.not_ready is not None for one in self.instances.values()):
            self.leave_out(reason or "is not ready")
            return
        if self.not_ready is not None:
            log.info("Triton at %s is ready: %s", self.address, description.info.described)
            self.not_ready = None
            self.on_ready()
        if reason != (before and before.not_ready):
            state = "is ready" if reason is None else f"does no work ({reason})"
            log.log(
                logging.INFO if reason is None else logging.WARNING,
                "Triton at %s: its instance %s %s",
                *(self.address, description.instance, state),
            )

    def lost(self, reason: str) -> None:
        """Leave it out until a health check succeeds, forget its instances, and stop its jobs."""
        self.instances, self.heard = {}, {}
        self.leave_out(reason)

    def leave_out(self, reason: str) -> None:
        if reason != self.not_ready:
            log.warning("Triton at %s %s; it is left out until it is back", self.address, reason)
        self.not_ready = reason
        for job in list(self.jobs):
            job.stop()

    def failed(self, error: Exception) -> None:
        """A health check failed, because of one instance or of the whole server."""
        if (one := self.instance_of(error)) is None:
            self.lost(self.reason_of(error))
        else:
            self.heard[one.instance] = time.monotonic()
            self.note(replace(one, not_ready=self.reason_of(error)))

    def doubt(self, error: Exception) -> None:
        """Leave it out, or one instance of it, after a broken stream; a health check follows at once."""
        reason = self.reason_of(error)
        if (one := self.instance_of(error)) is not None:
            self.note(replace(one, not_ready=reason))
        elif self.not_ready is None:
            log.warning("Triton at %s %s; checking its health", self.address, reason)
            self.not_ready = reason
        self.check_now.set()

    def refused(self, error: Exception, dead: Container[str]) -> bool:
        """Whether an instance has not begun a task because it cannot, while another one can.

        dead: of the instances when it got the task. One that died later may have died of the task.
        """
        one = self.instance_of(error)
        refused = isinstance(error, NotReadyError) or (one is not None and one.instance in dead)
        return refused and bool(self.ready_instances)

    def instance_of(self, error: Exception) -> Description | None:
        """The instance whose process has died, if Triton says so: it names the instance, and gives no code."""
        if not isinstance(error, BrokenServer):
            return None
        words = re.findall(r"[\w.-]+", str(error))
        return next((one for name, one in self.instances.items() if name in words), None)

    def reason_of(self, error: BaseException) -> str:
        """The reason of a failure, to follow the server's address in a sentence."""
        if isinstance(error, BrokenServer):
            return f"answers: {' '.join(str(error).split())[:200]}"
        if isinstance(error, WrongAnswer):
            return f"sent an invalid answer: {error}"
        details = getattr(error, "details", None)
        text = " ".join(str(details() if callable(details) else error).split())[:200] or type(error).__name__
        name = proxy_of(self.address)
        through = f"; it is reached through the proxy of {name}; exceptions belong in no_proxy" if name else ""
        return f"does not answer ({text}{through})"

    # Requests.

    async def stream(
        self, inputs: Mapping[str, Array], parameters: task_messages.Parameters
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
            yield {"model_name": task_messages.MODEL, "inputs": tensors, "parameters": dict(parameters)}

        call = self.client.stream_infer(one())
        try:
            async for answer, failed in call:
                if failed is not None:
                    text = str(failed.message())
                    raise task_messages.error_from_text(text) or BrokenServer(text)
                yield tensors_of(answer)
        except BaseException:
            call.cancel()
            raise


def tensors_of(answer: Any) -> dict[str, Array]:
    """The output tensors of a response. Raises WrongAnswer if it contradicts itself."""
    outputs = answer.get_response().outputs
    if len({output.name for output in outputs}) < len(outputs):
        raise WrongAnswer("two tensors have the same name")
    try:
        return {output.name: answer.as_numpy(output.name) for output in outputs}
    except Exception as error:  # tritonclient does not validate
        raise WrongAnswer(f"a tensor cannot be read: {' '.join(str(error).split())[:150]}") from None
