"""OpenTelemetry traces over OTLP/HTTP: a span per request (FastAPI's own), below it queue and network time per image.

On when OTEL_EXPORTER_OTLP_ENDPOINT is set or --otel is given. The SDK's own OTEL_* variables choose the rest: sampler,
headers, service name.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, Tracer, TracerProvider

from dsd_serve import __version__
from dsd_serve.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
NOT_TRACED = ("/health/", "/metrics")


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
    """Where spans go; nowhere without a provider."""

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


def load_traces(asked: bool) -> Traces:
    """Traces as the settings and the environment ask for them. Raises ConfigError where they cannot be had."""
    reason = "--otel" if asked else next((name for name in ENDPOINTS if os.environ.get(name)), None)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if asked and disabled:
        raise ConfigError("--otel asks for traces and OTEL_SDK_DISABLED=true forbids them; take one of them back")
    if reason is None or disabled:
        return Traces()
    for name in PROTOCOLS:
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigError(f"{name} must be http/protobuf, got {os.environ[name]!r}; the port is 4318 as a rule")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider as Provider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{reason} asks for traces, and OpenTelemetry cannot be imported ({error}): pip install 'dsd-serve[otel]'"
        ) from None
    attributes: dict[str, Any] = {
        "service.name": os.environ.get("OTEL_SERVICE_NAME", "dsd-serve"),
        "service.version": __version__,
    }
    provider = Provider(resource=Resource.create(attributes))  # it sends what is left at the process's exit
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)
