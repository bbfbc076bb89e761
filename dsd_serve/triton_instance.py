"""The code that runs inside Triton: one instance of the model `dsd`, with an engine process of its own.

The model repository that `dsd-export --triton` writes names this class; Triton's Python backend loads it. The model is
decoupled: `execute` only puts tasks in the queue, and one thread sends the responses, so that steps of all requests
share batches. backends/task_messages.py describes requests and responses.

Triton never starts the process of an instance again, but goes on giving it its share of the requests, each of which
then fails after a second. So the engine has a process of its own, which is started again when it ends, and meanwhile
this one refuses requests at once, which the front then sends to another instance.
"""

import ctypes
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from dsd_serve.backends import Job, task_messages
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_backend import ProcessBackend
from dsd_serve.errors import (
    CancelledError,
    ClosedError,
    DSDError,
    EngineError,
    InputError,
    NotReadyError,
    QueueFullError,
)
from dsd_serve.rows import Array

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # disconnect poll interval
PARENT_SECONDS = 1.0  # interval of the check that Triton is alive

CODES = {  # names, because pb_utils gets these attributes only after this file is loaded
    InputError: "INVALID_ARG",
    QueueFullError: "UNAVAILABLE",
    ClosedError: "UNAVAILABLE",
    CancelledError: "CANCELLED",
    EngineError: "INTERNAL",
}


class TritonPythonModel:
    """The class and the three methods that Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model, test the engine and warm it up; Triton calls the instance ready when this returns."""
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        threading.Thread(target=end_with, args=(os.getppid(),), name="parent", daemon=True).start()
        given = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        self.name = args["model_instance_name"]
        self.max_seconds = float(given["max_seconds"])
        self.backend = open_backend(Path(args["model_repository"]), given, args)
        self.responses = ResponseSender()
        info = self.backend.info
        log.info("%s: %s on %s, %d rows a tick", self.name, info.name, info.described, info.budget)

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.take(request, sender)
            except Exception as error:
                if not isinstance(error, DSDError):
                    log.exception("a request failed")
                self.responses.put(partial(send, sender, error=error))

    def take(self, request: Any, sender: Any) -> None:
        # Copied, because Triton reuses the memory of the tensors once the request ends. By DLPack, because `as_numpy`
        # of a backend that was built for numpy 1 gives wrong values under numpy 2.
        inputs = {tensor.name(): np.from_dlpack(tensor).copy() for tensor in request.inputs()}
        parameters = json.loads(request.parameters() or "{}")
        if parameters.get("operation") == "describe":
            text = np.frombuffer(json.dumps(self.describe()).encode(), np.uint8)
            self.responses.put(lambda: send(sender, {"text": text}))
            return
        if (reason := self.backend.not_ready) is not None:
            raise NotReadyError(reason)
        info = self.backend.info
        tasks, seconds = task_messages.from_wire(inputs, parameters, info.config, info.defaults)
        timeout = self.max_seconds if seconds is None else min(seconds, self.max_seconds)

        def on_preview(_: int, step: int, pixels: Array) -> None:
            self.responses.put(lambda: request_.preview(step, pixels))

        request_ = TritonRequest(sender, len(tasks), self.responses)
        request_.begin(self.backend.submit_tasks(tasks, timeout=timeout, on_preview=on_preview))

    def describe(self) -> dict[str, Any]:
        backend = self.backend
        return {
            "instance": self.name,
            "about": backend.info.to_dict(),
            "budget": backend.budget,
            "not_ready": backend.not_ready,
            "running": backend.num_running,
            "waiting": backend.num_waiting,
            "seconds_ahead": backend.seconds_ahead(),
        }

    def finalize(self) -> None:
        self.backend.close(5)
        self.responses.close()


def open_backend(repository: Path, given: Mapping[str, str], args: Mapping[str, str]) -> ProcessBackend:
    """The model with the parameters of config.pbtxt, on the device that Triton gives this instance."""
    device = given["device"]
    if device == "cuda" and args["model_instance_kind"] == "GPU":
        device = f"cuda:{args['model_instance_device_id']}"
    return ProcessBackend(
        EngineSettings(
            model=str(repository / given["model"]),
            engine=given["engine"],
            device=device,
            precision=given["precision"],
            threads=int(given["threads"]),
            row_budget=int(given["row_budget"]),
        ),
        max_waiting=int(given["max_waiting"]),
        max_seconds=float(given["max_wait"]),
    )


def end_with(parent: int) -> None:
    """End this process once its parent, Triton, has ended; the system then ends the engine process with it.

    If Triton is killed with a request in flight, the process of its backend would otherwise wait for ever. A signal at
    the parent's death would not do: it comes when the thread that started this process ends, which Triton may let do
    so at any time.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)  # there is nothing to report to


class TritonRequest:
    """One request, until its last response. Only the thread of `responses` uses the sender."""

    def __init__(self, sender: Any, count: int, responses: "ResponseSender") -> None:
        self.sender, self.remaining, self.responses = sender, count, responses
        self.jobs: Sequence[Job] = ()

    def begin(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.responses.put(lambda: self.responses.watched.add(self))
        for job in jobs:
            job.future.add_done_callback(lambda _: self.responses.put(self.one_ended))

    def preview(self, step: int, pixels: Array) -> None:
        send(self.sender, {"preview": pixels, "step": np.array([step], np.int64)}, final=False)

    def one_ended(self) -> None:
        self.remaining -= 1
        if self.remaining:
            return
        # Before the last response: Triton 24.10 crashes if a request is polled for cancellation after it.
        self.responses.watched.discard(self)
        errors = [error for job in self.jobs if (error := job.future.exception()) is not None]
        if errors:
            send(self.sender, error=errors[0])
            return
        first, ended = min(job.submitted for job in self.jobs), max(job.ended for job in self.jobs)
        started = min(job.started for job in self.jobs)
        outputs = task_messages.results_to_wire([job.future.result() for job in self.jobs])
        send(self.sender, {**outputs, "seconds": np.array([started - first, ended - started])})

    def cancel_if_asked(self) -> None:
        if self.sender.is_cancelled():
            for job in self.jobs:
                job.cancel()


class ResponseSender:
    """The thread that sends responses and polls for cancelled requests, so that neither delays a tick."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.watched: set[TritonRequest] = set()
        self.thread = threading.Thread(target=self.loop, name="responses", daemon=True)
        self.thread.start()

    def put(self, call: Callable[[], None]) -> None:
        self.calls.put(call)

    def close(self) -> None:
        self.calls.put(None)
        self.thread.join()

    def loop(self) -> None:
        due = time.monotonic()
        while True:
            try:
                wait = max(0.0, due - time.monotonic()) if self.watched else None
                call = self.calls.get(timeout=wait)
                if call is None:
                    return
                call()
            except queue.Empty:
                pass
            except Exception:  # of one response; the others must still be sent
                log.exception("a response could not be sent")
            if time.monotonic() >= due:
                for request_ in list(self.watched):
                    request_.cancel_if_asked()
                due = time.monotonic() + POLL_SECONDS


def capsule(array: Array) -> Any:
    """A writable copy of an array for the backend, which frees it with the tensor.

    The backend renames capsules in a way that numpy's destructor does not expect: it would print an error for each.
    """
    made = array.copy(order="C").__dlpack__()
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(made), None)
    return made


def send(
    sender: Any, outputs: Mapping[str, Array] | None = None, *, error: BaseException | None = None, final: bool = True
) -> None:
    """Send one response: tensors, or an error."""
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
    if error is not None:
        code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), "UNKNOWN")
        failed = pb_utils.TritonError(task_messages.error_to_text(error), getattr(pb_utils.TritonError, code))
        sender.send(pb_utils.InferenceResponse([], error=failed), flags=flags)
        return
    tensors = [pb_utils.Tensor.from_dlpack(name, capsule(array)) for name, array in (outputs or {}).items()]
    sender.send(pb_utils.InferenceResponse(tensors), flags=flags)
