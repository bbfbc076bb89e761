"""Prometheus metrics, GET /metrics: the batcher's work, and requests."""

import platform
from collections.abc import Callable, Mapping
from typing import Any, Final

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

from dsd_serve import __version__
from dsd_serve.backends import Backend, Observer
from dsd_serve.errors import CancelledError
from dsd_serve.rows import RowCounts
from server.connections import CUTS, ConnectionLimiter
from server.middleware.request_id import RequestRecord
from server.models import Models
from server.router import Router
from server.telemetry.logs import lines_dropped

REJECTIONS = ("queue_full", "deadline", "draining", "dead", "too_large", "unauthorized", "rate_limit", "host", "origin")
ADDED_UP: Final = "livesum"  # how the gauges of several processes become one; see `shared_metrics`
CANCELLATIONS = ("disconnect", "deadline", "shutdown")

TICK_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WAIT_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_ACCEPT = 2000  # characters of a header, of which more are not read


class Metrics(Observer):
    """The metrics of one app.

    shown: the registry that /metrics shows, if the values of this process lie in files that it reads; see
    `shared_metrics`. Without it they have a registry of their own.
    """

    def __init__(self, shown: CollectorRegistry | None = None) -> None:
        self.values = CollectorRegistry()
        self.registry = self.values if shown is None else shown
        self.named: dict[str, Gauge] = {}
        self.gauges: list[tuple[Gauge, Callable[[], float]]] = []  # and what they show
        self.lines_dropped = 0
        into: dict[str, Any] = {"registry": self.values}
        if shown is None:
            ProcessCollector(**into)
            GCCollector(**into)
        build = Info("dsd_build", "What was built.", registry=self.registry)
        build.info({"version": __version__, "python": platform.python_version()})

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
        self.worker_restarts = Counter(
            "dsd_http_worker_restarts_total", "Starts of an HTTP worker after one that ended.", **into
        )
        self.dropped = Counter(
            "dsd_log_lines_dropped_total",
            "Lines of the log that were dropped, because stdout or stderr was not read or failed.",
            **into,
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

    def gauge(self, name: str, text: str, value: Callable[[], float], **labels: str) -> None:
        """Add a gauge that `refresh` sets to the value."""
        made = self.named.get(name)
        if made is None:
            made = Gauge(name, text, list(labels), multiprocess_mode=ADDED_UP, registry=self.values)
            self.named[name] = made
        self.gauges.append((made.labels(**labels) if labels else made, value))

    def refresh(self) -> None:
        """Update the gauges that are computed at each scrape, and the count of dropped log lines."""
        for gauge, value in self.gauges:
            gauge.set(value())
        dropped = lines_dropped()
        self.dropped.inc(dropped - self.lines_dropped)
        self.lines_dropped = dropped

    def watch_connections(self, limiter: ConnectionLimiter) -> None:
        self.gauge("dsd_connections", "Open connections.", lambda: len(limiter.open))
        self.gauge(
            "dsd_unsent_bytes", "Bytes of answers that their clients have not taken yet.", lambda: limiter.unsent
        )

    def watch_workers(self, running: Callable[[], int]) -> None:
        """Add the number of HTTP workers that serve."""
        self.gauge("dsd_http_workers", "HTTP workers that serve.", running)

    def watch_memory(self, memory: Mapping[str, Callable[[], float]]) -> None:
        """Add gauges of budgets of memory, in bytes."""
        for name, value in memory.items():
            self.gauge("dsd_memory_bytes", "Bytes taken of a budget of memory.", value, budget=name)

    def watch_backend(self, backend: Backend | Models, draining: Callable[[], bool]) -> None:
        """Add the gauges of a backend."""
        self.gauge("dsd_images_running", "Images whose program has begun.", lambda: backend.num_running)
        self.gauge("dsd_images_waiting", "Images in the queue.", lambda: backend.num_waiting)
        self.gauge("dsd_seconds_ahead", "Estimated seconds until all of them are done.", backend.seconds_ahead)
        self.gauge("dsd_row_budget", "Rows that a tick may take.", lambda: backend.budget)
        self.gauge(
            "dsd_ready", "1 when requests are served, as /health/ready.", lambda: backend.ready and not draining()
        )


def install(app: FastAPI, metrics: Metrics) -> None:
    router = Router()

    @router.get("/metrics", include_in_schema=False)
    async def metrics_get(request: Request) -> Response:
        """The metrics, as Prometheus reads them."""
        metrics.refresh()
        try:
            encode, media_type = choose_encoder(request.headers.get("accept", "")[:MAX_ACCEPT])
        except (TypeError, ValueError):  # it compares the versions of formats without checking them
            encode, media_type = choose_encoder("")
        return Response(encode(metrics.registry), headers={"Content-Type": media_type})

    app.include_router(router)
