"""Prometheus metrics, GET /metrics: the batcher's work, and requests."""

import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from dsd_serve import __version__
from dsd_serve.backends import Observer
from dsd_serve.errors import CancelledError
from dsd_serve.rows import RowCounts
from server.connections import CUTS, ConnectionLimiter
from server.middleware.drain import Drain
from server.middleware.request_id import RequestRecord
from server.models import Models
from server.router import Router
from server.telemetry.logs import lines_dropped

REJECTIONS = ("queue_full", "deadline", "draining", "dead", "too_large", "unauthorized", "rate_limit", "host", "origin")
CANCELLATIONS = ("disconnect", "deadline", "shutdown")

TICK_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WAIT_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics(Observer):
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        into: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**into)
        GCCollector(**into)
        self.registry.register(Dropped())
        Info("dsd_build", "What was built.", **into).info({"version": __version__, "python": platform.python_version()})

        self.requests = Counter("dsd_requests_total", "Requests answered, by route.", ["route", "code"], **into)
        self.rejections = Counter("dsd_requests_rejected_total", "Requests refused.", ["reason"], **into)
        self.cancellations = Counter("dsd_requests_cancelled_total", "Requests given up.", ["reason"], **into)
        self.cuts = Counter(
            "dsd_connections_cut_total",
            "Connections that the server closed.",
            ["reason"],
            **into,
        )
        self.key_requests = Counter("dsd_key_requests_total", "Requests with an API key, by its name.", ["key"], **into)
        self.request_seconds = Histogram(
            "dsd_request_duration_seconds",
            "From the request's first line to its answer's last byte.",
            ["route"],
            buckets=WAIT_SECONDS,
            **into,
        )

        self.restarts = Counter(
            "dsd_engine_restarts_total", "Starts of the engine process after one that ended.", **into
        )

        self.images = Counter("dsd_images_total", "Images finished: drawn, encoded, decoded.", **into)
        self.images_failed = Counter("dsd_images_failed_total", "Images whose program or engine failed.", **into)
        self.rows = Counter("dsd_network_rows_total", "Rows that went through the network.", ["kind"], **into)
        self.ticks = Counter("dsd_ticks_total", "Calls of the network, each with the rows of many requests.", **into)
        self.queue_seconds = Histogram(
            "dsd_queue_duration_seconds", "Time that an image waited for its first tick.", buckets=WAIT_SECONDS, **into
        )
        self.tick_seconds = Histogram(
            "dsd_tick_duration_seconds", "Time of one call of the network.", buckets=TICK_SECONDS, **into
        )
        self.tick_rows = Histogram("dsd_tick_rows", "Rows of one call of the network.", buckets=ROWS, **into)
        self.rows_of = [self.rows.labels(kind) for kind in RowCounts._fields]  # a tick has no time to look up
        # Every series exists from the start, so that a rate over it is 0 and not missing.
        for counter, values in (
            (self.rejections, REJECTIONS),
            (self.cancellations, CANCELLATIONS),
            (self.cuts, CUTS),
            (self.rows, RowCounts._fields),
        ):
            for value in values:
                counter.labels(value)

    # Called by the batcher.

    def tick(self, rows: RowCounts, seconds: float) -> None:
        self.ticks.inc()
        self.tick_seconds.observe(seconds)
        self.tick_rows.observe(sum(rows))
        for counter, count in zip(self.rows_of, rows, strict=True):
            counter.inc(count)

    def started(self, waited: float) -> None:
        self.queue_seconds.observe(waited)

    def finished(self, outcome: str) -> None:
        if outcome == "done":
            self.images.inc()
        elif outcome == "failed":
            self.images_failed.inc()
        elif outcome == "late":
            self.cancellations.labels("deadline").inc()

    def rejected(self, reason: str) -> None:
        self.rejections.labels(reason).inc()

    def engine_restarted(self) -> None:
        self.restarts.inc()

    # Called at the end of requests.

    def answered(self, record: RequestRecord) -> None:
        self.requests.labels(record.route, str(record.status)).inc()
        self.request_seconds.labels(record.route).observe(record.seconds)
        if record.disconnected:
            self.cancellations.labels("disconnect").inc()
        elif isinstance(record.error, CancelledError):
            self.cancellations.labels("shutdown").inc()
        if record.status == 413:
            self.rejected("too_large")

    def connection_cut(self, reason: str) -> None:
        self.cuts.labels(reason).inc()

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def watch_connections(self, limiter: ConnectionLimiter) -> None:
        self.gauge("dsd_connections", "Open connections.", lambda: len(limiter.open))
        self.gauge(
            "dsd_unsent_bytes", "Bytes of answers that their clients have not taken yet.", lambda: limiter.unsent
        )

    def watch(
        self,
        models: Models,
        drain: Drain,
        memory: Mapping[str, Callable[[], float]] = {},  # never changed
    ) -> None:
        """Add the gauges of these. memory: bytes of each budget."""
        used = Gauge("dsd_memory_bytes", "Bytes taken of a budget of memory.", ["budget"], registry=self.registry)
        for name, value in memory.items():
            used.labels(name).set_function(value)
        self.gauge("dsd_images_running", "Images whose program has begun.", lambda: models.num_running)
        self.gauge("dsd_images_waiting", "Images in the queue.", lambda: models.num_waiting)
        self.gauge("dsd_seconds_ahead", "Estimated seconds until all of them are done.", models.seconds_ahead)
        self.gauge("dsd_row_budget", "Rows that a tick may take.", lambda: models.budget)
        self.gauge(
            "dsd_ready", "1 when requests are served, as /health/ready.", lambda: models.ready and not drain.draining
        )


class Dropped(Collector):
    """The number of dropped log lines, which the log handlers count."""

    def collect(self) -> Iterable[Metric]:
        text = "Lines of the log that were dropped, because nobody read it or it could not be written."
        yield CounterMetricFamily("dsd_log_lines_dropped", text, value=lines_dropped())


def install(app: FastAPI, metrics: Metrics) -> None:
    router = Router()

    @router.get("/metrics", include_in_schema=False)
    async def metrics_get(request: Request) -> Response:
        """The metrics, as Prometheus reads them."""
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"Content-Type": media_type})

    app.include_router(router)
