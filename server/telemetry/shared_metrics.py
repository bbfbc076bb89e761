"""Metrics of the main process and its HTTP workers: values in files of one folder, which the /metrics of any adds up.

This is the multiprocess mode of prometheus_client. A worker that is started again goes on with the files of the one
before, so that counters never go back and their number is bounded.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, ProcessCollector, values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client looks for the folder


def share(folder: str, name: str) -> None:
    """Keep the values of all metrics that this process makes from now on in files. name: of the process, without _."""
    os.environ[VARIABLE] = folder
    values.ValueClass = values.MultiProcessValue(lambda: name)


def forget_gauges(folder: str, name: str) -> None:
    """Remove the gauges of a process that has ended, whose connections and memory are gone."""
    mark_process_dead(name, folder)


class WorkerProcesses(Collector):
    """Memory, processor time and descriptors of each HTTP worker, as ProcessCollector has them of one process.

    pids: of the workers in their order; 0 for one that does not run.
    """

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        self.pids = pids

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for number, pid in enumerate(self.pids(), 1):
            if not pid:
                continue
            for family in ProcessCollector("dsd_http_worker", partial(int, pid), registry=None).collect():
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "worker": str(number)}, sample.value)
        return families.values()


def show_all(
    registry: CollectorRegistry,
    folder: str,
    main: int,
    workers: Callable[[], Sequence[int]],
    engine: Callable[[], int | None],
) -> None:
    """Let a worker's registry show the sums of all files, and the main process, the workers and the engine."""
    MultiProcessCollector(registry, folder)
    ProcessCollector(pid=lambda: main, registry=registry)
    ProcessCollector("dsd_engine", lambda: engine() or 0, registry=registry)
    registry.register(WorkerProcesses(workers))
