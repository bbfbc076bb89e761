"""OpenTelemetry traces over OTLP/HTTP: a span per request (FastAPI's own), below it queue and network time per image.

On when OTEL_EXPORTER_OTLP_ENDPOINT is set or --otel is given. The SDK's own OTEL_* variables choose the rest: sampler,
headers, service name.
"""

import os
import time
from typing import Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import context
from opentelemetry.trace import Status, StatusCode, Tracer, TracerProvider

from dsd_serve import __version__
from dsd_serve.errors import ConfigError
from dsd_serve.programs import Program

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
NOT_TRACED = ("/health/", "/metrics")


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

    def traced(self, program: Program) -> Program:
        """The same program, with a span for its wait and one from its first tick to its end. Call it in the request."""
        return program if self.tracer is None else with_spans(self.tracer, program)


def with_spans(tracer: Tracer, program: Program) -> Program:
    parent, queued = context.get_current(), time.time_ns()

    def spans() -> Program:
        # It runs in the batcher's thread: the parent is handed over, nothing is made current there.
        tracer.start_span("queue", parent, start_time=queued).end()
        span = tracer.start_span("network", parent)
        try:
            return (yield from program)
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR))
            raise
        finally:
            span.end()

    return spans()


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
