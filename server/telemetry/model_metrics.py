"""Prometheus metrics of the models: which are served, their work, their replacements, and their engine processes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Counter as CounterMetric
from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from dsd_serve.backends import ENGINE_PROCESS_STATES, Observer
from dsd_serve.rows import RowCounts
from server.models import Models
from server.telemetry.metrics import Metrics

PROCESS_STATES = "Engine processes in each state, if there are any."
DESCRIBED = ("engine", "device", "provider", "precision")


class ModelMetrics(Collector):
    """Collects what is true of the models at each scrape, and counts the work of each."""

    def __init__(self, metrics: Metrics, models: Models) -> None:
        self.metrics, self.models = metrics, models
        self.observers: list[BackendObserver] = []
        self.images = CounterMetric(
            "dsd_model_images_total", "Images finished, by model.", ["model"], registry=metrics.values
        )
        metrics.registry.register(self)

    def observer(self, model: str) -> "BackendObserver":
        """For one backend of a model, until it is closed."""
        observer = BackendObserver(self, model)
        self.observers.append(observer)
        return observer

    def describe(self) -> Iterable[Metric]:
        return []  # so that nothing is collected before there are models

    def collect(self) -> Iterator[Metric]:
        info = InfoMetricFamily("dsd_model", "The models that are loaded, and what runs them.")
        ready = GaugeMetricFamily("dsd_model_ready", "1 when the model is loaded and works.", labels=["model"])
        running = GaugeMetricFamily("dsd_model_images_running", "Images whose program has begun.", labels=["model"])
        waiting = GaugeMetricFamily("dsd_model_images_waiting", "Images in the queue.", labels=["model"])
        draining = GaugeMetricFamily(
            "dsd_model_draining", "Replaced models that finish their last requests.", labels=["model"]
        )
        loads = CounterMetricFamily(
            "dsd_model_loads", "Loads of models while the server runs.", labels=["model", "outcome"]
        )
        for name, slot in self.models.slots.items():
            served = slot.served
            if served is not None:
                described = {key: served.info.described.get(key, "") for key in DESCRIBED}
                info.add_metric([], {"model": name, **described, "fingerprint": served.info.fingerprint})
            ready.add_metric([name], float(served is not None and served.backend.not_ready is None))
            running.add_metric([name], served.backend.num_running if served else 0)
            waiting.add_metric([name], served.backend.num_waiting if served else 0)
            draining.add_metric([name], len(slot.draining))
            for outcome, count in slot.loads.items():
                loads.add_metric([name, outcome], count)
        yield from (info, ready, running, waiting, draining, loads)
        yield from self.of_processes()

    def num_in(self, state: str) -> int:
        """Engine processes in a state."""
        return sum(observer.state == state for observer in list(self.observers))

    def of_processes(self) -> Iterator[Metric]:
        """The states of the engine processes, and sums of their memory, time and descriptors."""
        observers = list(self.observers)
        states = Counter(observer.state for observer in observers if observer.state)
        if states:
            family = GaugeMetricFamily("dsd_engine_process", PROCESS_STATES, labels=["state"])
            for state in ENGINE_PROCESS_STATES:
                family.add_metric([state], states[state])
            yield family
        sums: dict[str, Metric] = {}
        for pid in [pid for observer in observers if (pid := observer.pid())]:
            for metric in ProcessCollector(namespace="dsd_engine", pid=lambda pid=pid: pid, registry=None).collect():  # type: ignore[misc]
                if metric.name not in sums:
                    sums[metric.name] = metric
                    continue
                for ours, theirs in zip(sums[metric.name].samples, metric.samples, strict=True):
                    sums[metric.name].samples.remove(ours)
                    sums[metric.name].add_sample(ours.name, ours.labels, ours.value + theirs.value)
        yield from sums.values()


class BackendObserver(Observer):
    """Passes the work of one backend on to the metrics of the server, and knows the state of its engine process.

    pid: of that process, None without one.
    """

    def __init__(self, metrics: ModelMetrics, model: str) -> None:
        self.of, self.model = metrics, model
        self.state = ""
        self.pid: Callable[[], int | None] = lambda: None

    def tick(self, rows: RowCounts, seconds: float) -> None:
        self.of.metrics.tick(rows, seconds)

    def started(self, waited: float) -> None:
        self.of.metrics.started(waited)

    def rejected(self, reason: str) -> None:
        self.of.metrics.rejected(reason)

    def finished(self, outcome: str) -> None:
        self.of.metrics.finished(outcome)
        if outcome == "done":
            self.of.images.labels(self.model).inc()

    def engine_process(self, state: str) -> None:
        self.state = state

    def engine_restarted(self) -> None:
        self.of.metrics.engine_restarted()

    def close(self) -> None:
        if self in self.of.observers:
            self.of.observers.remove(self)
