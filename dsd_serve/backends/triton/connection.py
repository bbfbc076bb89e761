"""A connection to one Triton server, and the jobs that it carries out."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsd_serve.backends import Job, task_messages
from dsd_serve.backends.triton import results
from dsd_serve.backends.triton.addresses import proxy_of
from dsd_serve.backends.triton.results import WrongAnswer
from dsd_serve.programs import OnPreviews, Task
from dsd_serve.rows import Array

log = logging.getLogger(__name__)


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
    """A connection to one Triton server; used in the thread of the backend only."""

    def __init__(self, address: str, client: Any) -> None:
        self.address, self.client = address, client
        self.not_ready: str | None = "has not answered yet"
        self.description: dict[str, Any] = {}  # the last answer to `describe`
        self.jobs: set[TritonJob] = set()
        self.check_now = asyncio.Event()

    def lost(self, reason: str) -> None:
        """Leave it out until a health check succeeds, and stop its jobs."""
        if reason != self.not_ready:
            log.warning("Triton at %s %s; it is left out until it is back", self.address, reason)
        self.not_ready = reason
        for job in list(self.jobs):
            job.stop()

    def doubt(self, reason: str) -> None:
        """Leave it out after a broken stream; a health check follows at once."""
        if self.not_ready is None:
            log.warning("Triton at %s %s; checking its health", self.address, reason)
            self.not_ready = reason
        self.check_now.set()

    def reason_of(self, error: BaseException) -> str:
        """The reason of a failure, to follow the server's address in a sentence."""
        if isinstance(error, BrokenServer):
            return f"answers: {' '.join(str(error).split())[:200]}"
        if isinstance(error, WrongAnswer):
            return f"gives a wrong answer: {error}"
        details = getattr(error, "details", None)
        text = " ".join(str(details() if callable(details) else error).split())[:200] or type(error).__name__
        name = proxy_of(self.address)
        through = f"; it is reached through the proxy of {name}; exceptions belong in no_proxy" if name else ""
        return f"does not answer ({text}{through})"

    async def describe(self) -> dict[str, Any]:
        self.check_now.clear()
        found: dict[str, Any] | None = None
        async for outputs in self.stream({}, task_messages.DESCRIBE):
            if found is not None:
                raise WrongAnswer("a second description follows the first")
            found = results.read_description(outputs)
        if found is None:
            raise WrongAnswer("it ends before the description")
        return found

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
