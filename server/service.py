"""The server: its models, and the limits and counters that all its requests share."""

import logging
import os
from collections import Counter
from typing import Protocol

from dsd_serve.backends import Backend, ModelInfo
from dsd_serve.engines import Engine
from dsd_serve.errors import ConfigError
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.memory import Memory
from server.keys import load_admin_key, load_keys, renew
from server.middleware.drain import Drain
from server.model_opening import Opener, sources
from server.model_slot import Served, Slot
from server.models import Models
from server.responses import Encoder
from server.settings import WATCH_MODELS, Settings
from server.site import parse_origins
from server.stream_events import PreviewMemory
from server.telemetry.metrics import Metrics
from server.telemetry.model_metrics import ModelMetrics
from server.telemetry.traces import load_traces
from server.watched_directories import WatchedDirectories
from server.watched_run import WatchedRun

log = logging.getLogger(__name__)


ALL = "all"  # among the counts of clients, which begin with "the"


class Remote(Backend, Protocol):
    """A backend whose model is known later."""

    def wait(self) -> ModelInfo:
        """The model, as soon as it is known. Raises ClosedError if this is closed before."""
        ...


class Service:
    """The models of a server, with its limits and counters.

    engine: replaces the one from the settings, in this process. worker: the backend and the metrics of an HTTP
    worker, whose main process has the model. Raises DSDError when it cannot serve.
    """

    def __init__(
        self, settings: Settings, engine: Engine | None = None, *, worker: tuple[Remote, Metrics] | None = None
    ) -> None:
        self.settings = settings
        self.keys = load_keys(settings.api_keys, os.environ)
        self.admin_key = load_admin_key(settings.admin_key, os.environ)
        self.origins = parse_origins(settings.cors_origins)
        self.traces = load_traces(settings.otel)
        self.is_worker = worker is not None
        self.drain, self.metrics = Drain(), worker[1] if worker else Metrics()
        self.decoder = Decoder(int(settings.max_megapixels * 1e6), int(settings.max_decode_mb * 1e6))
        self.uploads = Memory(int(settings.max_uploads_mb * 1e6))
        self.encoder = Encoder(settings)
        self.unanswered = 0  # images of requests whose answer has not been sent
        self.shares: Counter[str] = Counter()  # the same, of each client
        self.others: dict[str, int] = {}  # the same of the other HTTP workers: of each client, and of ALL
        self.previews = PreviewMemory()
        self.models = Models(settings.max_waiting, settings.rest_after)
        self.model_metrics = ModelMetrics(self.metrics, self.models)
        self.opener = Opener(settings, self.model_metrics, engine, self.admin_key is not None)
        self.remote: Remote | None = worker[0] if worker else self.opener.remote() if settings.triton else None
        self.run: WatchedRun | None = None
        self.directories: WatchedDirectories | None = None
        if settings.watch not in ("", WATCH_MODELS):
            self.run = WatchedRun(settings, self.opener.open, self.drain_seconds)
        elif self.remote is None:
            for name, place in sources(settings.model):
                self.add(name, place)
            if settings.watch:
                self.directories = WatchedDirectories(self.models.slots)

    def add(self, name: str, place: str) -> None:
        """Serve the model of a place under a name, by default its own; with --lazy it is loaded later."""
        about = (self.opener.look if self.settings.lazy else self.opener.open)(name, place)
        self.models.add(Slot(about, place, self.opener.open, self.drain_seconds))

    @property
    def drain_seconds(self) -> float:
        """The longest time for which a request may need the model with which it began: its body, and two runs."""
        return self.settings.body_timeout + 2 * self.settings.max_seconds

    def reload_keys(self) -> None:
        """Reload the API keys. The old ones stay if that fails, or if the server was started without keys."""
        if not self.keys:
            log.info("there are no API keys to reload, so SIGHUP has no effect")
            return
        file = self.settings.api_keys
        try:
            if file and not os.path.isfile(file):  # opening a pipe would wait for its writer, with the whole server
                raise ConfigError(f"the API keys in {file} can be read again from a regular file only")
            renew(self.keys, load_keys(file, os.environ))
        except ConfigError as error:
            log.error("the API keys are unchanged: %s", error)
        else:
            log.info("%d API keys were reloaded", len(self.keys))

    @property
    def waits(self) -> bool:
        """Whether the server listens before a model is known; `wait` then waits for it."""
        return self.remote is not None or self.run is not None

    @property
    def not_ready(self) -> str | None:
        """The reason why nothing is served now, or None."""
        if self.models.slots:
            return self.models.not_ready
        return self.remote.not_ready if self.remote else self.run.reason if self.run else "no model is loaded yet"

    def wait(self) -> None:
        """Wait until the first model is there, however long it takes. Raises ClosedError if closed meanwhile."""
        if self.remote is not None:
            if self.is_worker:
                info = self.remote.wait()
                info.table.prepare()
                served = Served(info, self.remote)
            else:
                log.info("waiting for Triton at %s", self.settings.triton)
                served = self.opener.described(self.remote.wait(), self.remote)
            self.models.add(Slot(served, "", self.opener.open, self.drain_seconds))
        elif self.run is not None:
            self.models.add(self.run.wait())

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was accepted, and after `timeout` seconds cancel the rest. True if all tasks finished."""
        for watching in (self.run, self.directories):
            if watching is not None:
                watching.close()
        if self.remote is not None and not self.models.slots:
            return self.remote.close(timeout)
        finished = self.models.close(timeout)
        if self.run is not None:
            self.run.clear()
        return finished

    def add_images(self, who: str | None, count: int) -> None:
        self.unanswered += count
        if who is not None:
            self.shares[who] += count
            if not self.shares[who]:
                del self.shares[who]
