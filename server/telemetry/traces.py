"""OpenTelemetry traces over OTLP/HTTP: a span per request (FastAPI's own), below it queue and network time per image.

On when OTEL_EXPORTER_OTLP_ENDPOINT is set or --otel is given, and neither OTEL_TRACES_EXPORTER=none nor
OTEL_SDK_DISABLED=true forbids it. The SDK's own OTEL_* variables choose the rest: sampler, headers, service name.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol
from urllib.parse import urlsplit

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, Tracer, TracerProvider

from dsd_serve import __version__
from dsd_serve.errors import ConfigError, shown
from server.site import HEALTH

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OFF = {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none"}
ALLOWED = {"OTEL_SDK_DISABLED": ("true", "false"), "OTEL_TRACES_EXPORTER": ("otlp", "none")}
EXIT_SECONDS = 1.5  # for the last spans; a collector that does not answer must not keep the process
NOT_TRACED = (HEALTH, "/metrics")


class Timed(Protocol):
    """The part of a job that spans are made of; see `batcher.Job`."""

    @property
    def future(self) -> "Future[Any]": ...
    @property
    def submitted(self) -> float: ...
    @property
    def started(self) -> float: ...
    @property
    def ended(self) -> float: ...


class Traces:
    """Sends spans to a provider; without one, does nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self.provider = provider
        self.tracer: Tracer | None = provider.get_tracer("dsd", __version__) if provider else None

    def config(self) -> TelemetryConfig:
        """The argument `telemetry` of FastAPI: spans of requests to our provider, and nothing else."""
        return TelemetryConfig(
            tracer_provider=self.provider,
            tracing=self.provider is not None,
            metrics=False,
            logs=False,
            operation_spans=False,
            auto_configure=False,
            exclude=lambda scope: scope["path"].startswith(NOT_TRACED),
        )

    def follow(self, jobs: Sequence[Timed]) -> None:
        """Make two spans of each job at its end: its wait, and its time in the network. Call it in the request."""
        if self.tracer is None:
            return
        parent = context.get_current()
        for job in jobs:
            job.future.add_done_callback(spans_of(self.tracer, parent, job))


def spans_of(tracer: Tracer, parent: Context, job: Timed) -> Callable[["Future[Any]"], None]:
    def end(future: "Future[Any]") -> None:
        if not job.started:
            return  # it ended in the queue
        apart = time.time_ns() - time.monotonic_ns()
        submitted, started, ended = (apart + int(1e9 * t) for t in (job.submitted, job.started, job.ended))
        tracer.start_span("queue", parent, start_time=submitted).end(started)
        span = tracer.start_span("network", parent, start_time=started)
        if not future.cancelled() and (error := future.exception()) is not None:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended)

    return end


def load_traces(enabled: bool) -> Traces:
    """Traces as the settings and the environment request them. Raises ConfigError if they cannot be sent."""
    reason = "--otel" if enabled else next((name for name in ENDPOINTS if variable(name)), None)
    if reason is None:
        return Traces()
    for name, off in OFF.items():
        if variable(name) and variable(name).lower() not in ALLOWED[name]:
            raise ConfigError(f"{name} must be {' or '.join(ALLOWED[name])}, got {shown(variable(name))}")
        if variable(name).lower() == off:
            if enabled:
                raise ConfigError(f"--otel turns traces on and {name}={off} turns them off; remove one of them")
            log.info("%s=%s: no traces are sent", name, off)
            return Traces()
    for name in PROTOCOLS:
        if variable(name) not in ("", "http/protobuf"):
            raise ConfigError(
                f"{name} must be http/protobuf, got {shown(variable(name))}; its usual port is 4318. "
                "OTEL_TRACES_EXPORTER=none sends no traces"
            )
    for name in ENDPOINTS:
        if variable(name) and not is_address(variable(name)):
            raise ConfigError(f"{name} must be an address like http://localhost:4318, got {shown(variable(name))}")
    try:
        return Traces(open_provider())
    except ImportError as error:
        raise ConfigError(
            f"{reason} asks for traces, and OpenTelemetry cannot be imported ({error}): pip install '.[otel]'"
        ) from None
    except Exception as error:  # for a variable that the SDK cannot read; it does not say which
        raise ConfigError(
            f"OpenTelemetry does not take one of the variables OTEL_*: {' '.join(str(error).split())[:200]}"
        ) from None


def variable(name: str) -> str:
    """The value of a variable; an empty one counts as unset."""
    return os.environ.get(name, "").strip()


def is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def open_provider() -> TracerProvider:
    """The SDK's provider, which sends spans in a thread, and what is left at the process's exit."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as Provider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes: dict[str, Any] = {
        "service.name": variable("OTEL_SERVICE_NAME") or "dsd-serve",
        "service.version": __version__,
    }
    provider = Provider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    def shut_down() -> None:  # the SDK's own would wait for as long as the exporter does
        ending = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(EXIT_SECONDS)

    atexit.register(shut_down)
    return provider
