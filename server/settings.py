"""The server's settings: flags, environment variables DSD_*, safe defaults."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from dsd_serve.engines import ENGINE_NAMES
from dsd_serve.errors import ConfigError


def demo_model() -> Path:
    """The model directory that comes with the package."""
    return Path(str(resources.files("dsd_serve").joinpath("demo")))


@dataclass(frozen=True)
class Settings:
    """One field per setting; HELP below says what each is for."""

    model: Path = field(default_factory=demo_model)
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "onnx"
    device: str = "cpu"
    threads: int = 0
    row_budget: int = 0
    max_waiting: int = 256
    max_images: int = 16
    max_steps: int = 250
    max_size: int = 1024
    max_body_mb: float = 20.0
    max_uploads_mb: float = 200.0
    max_decode_mb: float = 400.0
    body_timeout: float = 60.0
    max_megapixels: float = 40.0
    grace: float = 30.0
    log_level: str = "info"


HELP = {
    "model": "model directory, as dsd-export writes it (default: the demo model of the package)",
    "host": "address to listen on; 0.0.0.0 for all interfaces",
    "port": "TCP port",
    "engine": f"what runs the network: {' or '.join(ENGINE_NAMES)}",
    "device": "cpu, cuda or cuda:N; never replaced by another one",
    "threads": "CPU threads of the engine, 0 for all cores",
    "row_budget": "rows per tick of the batcher, 0 to measure the best at start",
    "max_waiting": "images that may wait; more are answered with 429",
    "max_images": "largest n of one request",
    "max_steps": "largest number of sampler steps",
    "max_size": "largest side of an answer's pictures, in pixels",
    "max_body_mb": "largest request body, in megabytes",
    "max_uploads_mb": "memory for the bodies of all requests, twice their size; more is answered with 429",
    "max_decode_mb": "memory for decoding uploaded pictures; those that would need more wait for others",
    "body_timeout": "seconds in which the body of a request must come",
    "max_megapixels": "largest uploaded picture, in millions of pixels",
    "grace": "seconds to finish running requests after SIGTERM",
    "log_level": "debug, info, warning or error",
}


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags, else from the environment, else the defaults. Raises ConfigError for a wrong variable."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="dsd-serve",
        description="Serve a DSD model over HTTP. Try: curl 'localhost:8000/generate?class=207' -o dog.png",
        epilog="Each flag can also be given as an environment variable: --max-body-mb 5 is DSD_MAX_BODY_MB=5.",
    )
    for item in fields(Settings):
        kind = type(getattr(defaults, item.name))
        variable = f"DSD_{item.name.upper()}"
        value: Any = getattr(defaults, item.name)
        if variable in os.environ:
            try:
                value = Path(os.environ[variable]) if isinstance(value, Path) else kind(os.environ[variable])
            except ValueError:
                raise ConfigError(f"{variable} must be a {kind.__name__}, got {os.environ[variable]!r}") from None
        shown = "" if item.name == "model" else f" (default {getattr(defaults, item.name)})"
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            type=Path if isinstance(value, Path) else kind,
            default=value,
            help=HELP[item.name] + shown,
            metavar=item.name.rpartition("_")[2].upper(),
        )
    settings = Settings(**vars(parser.parse_args(arguments)))
    check(settings)
    return settings


def check(settings: Settings) -> None:
    above_zero = (
        *("max_waiting", "max_images", "max_steps", "max_size", "max_megapixels"),
        *("max_body_mb", "max_uploads_mb", "max_decode_mb", "body_timeout"),
    )
    for name in above_zero:
        if not getattr(settings, name) > 0:  # also refuses NaN
            raise ConfigError(f"{name} must be above 0, got {getattr(settings, name)}")
    for name in ("threads", "row_budget", "grace"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name} must be 0 or more, got {getattr(settings, name)}")
    if settings.max_uploads_mb < 2 * settings.max_body_mb:
        raise ConfigError(
            f"max_uploads_mb must be at least twice max_body_mb, got {settings.max_uploads_mb:g} "
            f"and {settings.max_body_mb:g}"
        )
    if not 0 <= settings.port <= 65535:
        raise ConfigError(f"port must be from 0 to 65535, got {settings.port}")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"log_level must be debug, info, warning or error, got {settings.log_level!r}")
