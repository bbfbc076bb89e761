"""The server's settings: flags, environment variables DSD_*, safe defaults."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from dsd_serve.checkpoint import PRECISIONS
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
    precision: str = "fp32"
    threads: int = 0
    row_budget: int = 0
    max_waiting: int = 256
    max_wait: float = 60.0
    max_seconds: float = 300.0
    max_images: int = 16
    max_steps: int = 250
    max_size: int = 1024
    max_body_mb: float = 20.0
    max_uploads_mb: float = 200.0
    max_decode_mb: float = 400.0
    max_encode_mb: float = 800.0
    body_timeout: float = 60.0
    max_megapixels: float = 40.0
    grace: float = 30.0
    api_keys: str = ""
    cors_origins: str = ""
    log_level: str = "info"
    log_format: str = "pretty"
    otel: bool = False
    ui: bool = False
    triton: str = ""


HELP = {
    "model": "model directory, as dsd-export writes it (default: the demo model of the package)",
    "host": "address to listen on; 0.0.0.0 for all interfaces",
    "port": "TCP port",
    "engine": f"what runs the network: {' or '.join(ENGINE_NAMES)}",
    "device": "cpu, cuda or cuda:N; never replaced by another one",
    "precision": f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, of those that the model was exported in",
    "threads": "CPU threads of the engine, 0 for all cores",
    "row_budget": "rows per tick of the batcher, 0 to measure the best at start",
    "max_waiting": "images that may wait; more are answered with 429",
    "max_wait": "seconds of estimated work that may be ahead of a request; more is answered with 429",
    "max_seconds": "seconds that a request may take; one that would take longer is refused with 504",
    "max_images": "largest n of one request",
    "max_steps": "largest number of sampler steps",
    "max_size": "largest side of an answer's pictures, in pixels",
    "max_body_mb": "largest request body, in megabytes",
    "max_uploads_mb": "memory for the bodies of all requests, twice their size; more is answered with 429",
    "max_decode_mb": "memory for decoding uploaded pictures; those that would need more wait for others",
    "max_encode_mb": "memory for encoding answers, and for those that wait to be sent; what would need more waits, and "
    "what could never be encoded is refused with 422",
    "body_timeout": "seconds in which the body of a request must come",
    "max_megapixels": "largest uploaded picture, in millions of pixels",
    "grace": "seconds to finish running requests after SIGTERM; a second signal ends the server at once",
    "api_keys": "file of API keys, one name:key[:requests_per_minute[:images_at_once]] a line; with keys every request "
    "but those to /health needs one, as Authorization: Bearer KEY or X-API-Key: KEY. Keys may also stand in the "
    "environment variable DSD_API_KEYS, comma separated (default: none, everybody may send requests)",
    "cors_origins": "web pages whose scripts may use the server, as https://a.example,https://b.example, or * for all "
    "(default: none)",
    "log_level": "debug, info, warning or error; access lines are info",
    "log_format": "pretty or json. Access lines go to stdout, the rest to stderr",
    "otel": "send traces by OTLP/HTTP, by default to localhost:4318; also on when OTEL_EXPORTER_OTLP_ENDPOINT is set, "
    "and the other OTEL_* variables hold. Needs the extra otel (default: off)",
    "triton": "HOST:PORT[,HOST:PORT] of Triton servers (gRPC, 8001) that do the work, with the model that dsd-export "
    "--triton wrote; the settings of the model and --max-wait then have no effect, config.pbtxt has them. Needs the "
    "extra triton (default: the work is done here)",
    "ui": "a page in the browser at /, as a client of this server. Needs the extra ui (default: off)",
}

GROUPS = {
    "model": ("model", "engine", "device", "precision", "threads", "row_budget", "triton"),
    "network": ("host", "port", "grace", "ui"),
    "limits": (*(name for name in HELP if name.startswith("max_")), "body_timeout"),
    "security": ("api_keys", "cors_origins"),
    "logging and traces": ("log_level", "log_format", "otel"),
}
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("pretty", "json")
METAVARS = {"api_keys": "FILE", "triton": "HOST:PORT"}
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; dsd-serve --help lists the flags")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags, else from the environment, else the defaults. Raises ConfigError for a wrong variable."""
    defaults = Settings()
    parser = Parser(
        prog="dsd-serve",
        description="Serve a DSD model over HTTP. Try: curl 'localhost:8000/generate?class=207' -o dog.png",
        epilog="Each flag can also be given as the environment variable named beside it; flags win.",
    )
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, name, getattr(defaults, name))
    settings = Settings(**vars(parser.parse_args(arguments)))
    check(settings)
    return settings


def add_flag(group: Any, name: str, default: Any) -> None:
    kind = type(default)
    shown = "" if "(default: " in HELP[name] else f" (default {default})"
    options: dict[str, Any] = {"help": f"{HELP[name]}{shown} [{variable(name)}]"}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options |= {
            "type": Path if isinstance(default, Path) else kind,
            "metavar": METAVARS.get(name, name.rpartition("_")[2].upper()),
        }
    group.add_argument("--" + name.replace("_", "-"), default=from_environment(name, default), **options)


def variable(name: str) -> str:
    """The environment variable of a setting. DSD_API_KEYS holds keys themselves, so the file has another name."""
    return "DSD_API_KEYS_FILE" if name == "api_keys" else f"DSD_{name.upper()}"


def from_environment(name: str, default: Any) -> Any:
    text = os.environ.get(variable(name))
    if text is None:
        return default
    if isinstance(default, Path):
        return Path(text)
    if isinstance(default, bool):
        if text.lower() not in BOOLEANS:
            raise ConfigError(f"{variable(name)} must be true or false, got {text!r}")
        return BOOLEANS[text.lower()]
    kind = type(default)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{variable(name)} must be a {kind.__name__}, got {text!r}") from None


def check(settings: Settings) -> None:
    for name in ("body_timeout", *(name for name in vars(settings) if name.startswith("max_"))):
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
    for name, allowed in (("log_level", LOG_LEVELS), ("log_format", LOG_FORMATS)):
        if getattr(settings, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}")
