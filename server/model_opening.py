"""Opening the models of a server: the places that its settings name, and what runs a model."""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsd_serve.backends import Backend, ModelInfo, Observer
from dsd_serve.backends.triton.addresses import parse_addresses
from dsd_serve.backends.triton.remote import TritonBackend
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.engines import Engine
from dsd_serve.errors import ConfigError
from dsd_serve.files import demo_model
from dsd_serve.hub import model_dir
from dsd_serve.loading import load
from server.model_slot import Served, Unloaded
from server.settings import MODEL_NAME, Settings
from server.telemetry.model_metrics import ModelMetrics

if TYPE_CHECKING:
    from dsd_serve.backends.process.process_backend import ProcessBackend

log = logging.getLogger(__name__)

MAX_MODELS = 32
NAMED = re.compile(f"({MODEL_NAME})=(.+)", re.DOTALL)


def sources(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, place) of each --model; the name is empty where it is the model's own. Raises ConfigError."""
    found = [(match[1], match[2]) if (match := NAMED.fullmatch(text)) else ("", text) for text in texts]
    if len(found) > MAX_MODELS:
        raise ConfigError(f"a server has at most {MAX_MODELS} models, got {len(found)}")
    if len(found) > 1 and not all(name for name, _ in found):
        raise ConfigError("several models need a name each, as --model a=DIR --model b=DIR")
    names = [name for name, _ in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the names of models must differ, and {twice[0]} is given twice")
    return found or [("", str(demo_model()))]


class Opener:
    """Loads models as the settings say: in this process, or each in an engine process of its own.

    engine: replaces the one from the settings, in this process. live: models may be replaced while the server runs,
    which needs engine processes. Raises ConfigError when the settings forbid these.
    """

    def __init__(self, settings: Settings, metrics: ModelMetrics, engine: Engine | None, live: bool) -> None:
        self.settings, self.metrics, self.engine = settings, metrics, engine
        live = live or settings.live
        if live and settings.engine_process == "off":
            raise ConfigError(
                "engine_process must be auto or on if models are replaced or unloaded, because each then has a "
                "process of its own"
            )
        if live and settings.triton:
            raise ConfigError(
                "triton cannot be combined with admin_key, watch, lazy, rest_after and several models: its own model "
                "repository replaces models"
            )
        self.apart = (live or settings.engine_apart) and engine is None

    def look(self, name: str, place: str) -> Unloaded:
        """The name, configuration and age of the model directory of a place. Raises CheckpointError."""
        directory = read_model_dir(model_dir(place))
        created = int((directory.path / "config.json").stat().st_mtime)
        return Unloaded(name or directory.name, directory.config, created)

    def open(self, name: str, place: str) -> Served:
        """Load the model of a place and test it. name: under which it is served, by default its own.

        Raises CheckpointError and EngineUnavailableError as `loading.load` does.
        """
        if self.apart:
            observer = self.metrics.observer(name or self.look(name, place).name)
            try:
                apart = open_apart(self.settings, place, observer)
            except BaseException:
                observer.close()
                raise
            observer.pid = lambda: apart.pid
            served = self.described(apart.info, apart, name, place)
            served.at_end.append(observer.close)
            return served
        observer = self.metrics.observer(name)
        settings = engine_settings(self.settings) | ({} if self.engine is None else {"engine": self.engine})
        opened = load(place, **settings, **queue_limits(self.settings), observer=observer)
        observer.model = name or opened.info.name
        return self.described(opened.info, opened.backend, name, place)

    def described(self, info: ModelInfo, backend: Backend, name: str = "", place: str = "") -> Served:
        """The served model; logs its engine, row budget and self-test."""
        info = replace(info, name=name) if name and name != info.name else info
        announce(info)
        return Served(info, backend, place)

    def remote(self) -> TritonBackend:
        return TritonBackend(
            parse_addresses(self.settings.triton),
            max_waiting=self.settings.max_waiting,
            observer=self.metrics.observer(""),
        )


def announce(info: ModelInfo) -> None:
    """Log the engine, row budget, self-test and class names of a model."""
    info.table.prepare()
    if info.table.warning:
        log.warning("%s", info.table.warning)
    (log.info if info.invariance.holds else log.warning)("self-test: %s", info.invariance)
    log.info("%s on %s, %d rows a tick", info.name, info.described, info.budget)


def engine_settings(settings: Settings) -> dict[str, Any]:
    """The engine that the settings name, as `loading.load` and EngineSettings take it."""
    return {name: getattr(settings, name) for name in ("engine", "device", "precision", "threads", "row_budget")}


def queue_limits(settings: Settings) -> dict[str, Any]:
    """The limits of a model's queue, as `loading.load` and `ProcessBackend` take them."""
    return {"max_waiting": settings.max_waiting, "max_seconds": settings.max_wait}


def open_apart(settings: Settings, place: str, observer: Observer) -> "ProcessBackend":
    from dsd_serve.backends.process.engine_messages import EngineSettings  # here: most servers need no ZeroMQ
    from dsd_serve.backends.process.process_backend import ProcessBackend

    engine = EngineSettings(model=place, **engine_settings(settings))
    return ProcessBackend(engine, **queue_limits(settings), observer=observer)
