"""The server's settings: flags, environment variables DSD_*, safe defaults."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dsd_serve import __version__
from dsd_serve.engines import ENGINE_NAMES
from dsd_serve.errors import ConfigError, shown
from dsd_serve.params import MAX_STEPS
from dsd_serve.precision import AUTO, PRECISIONS, listed

MODEL_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
POSIX = os.name == "posix"
SPARE_DESCRIPTORS = 64  # for files, and for connections that are refused
MOST_CONNECTIONS = 1024  # by default; a head in each of them takes 64 KiB


def descriptors() -> int:
    """File descriptors that this process may have."""
    try:
        import resource
    except ImportError:  # Windows, where sockets are not among them
        return 1_000_000
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1_000_000 if soft == resource.RLIM_INFINITY else soft


@dataclass(frozen=True)
class Settings:
    """The settings, with defaults; HELP describes them."""

    model: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "onnx"
    device: str = "cpu"
    precision: str = AUTO
    threads: int = 0
    row_budget: int = 0
    engine_process: str = "auto"
    http_workers: int = 1
    lazy: bool = False
    rest_after: float = 0.0
    watch: str = ""
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
    head_timeout: float = 10.0
    write_timeout: float = 60.0
    keep_alive: float = 75.0
    max_connections: int = field(default_factory=lambda: min(MOST_CONNECTIONS, descriptors() // 2))
    max_connections_per_address: int = 0
    max_megapixels: float = 40.0
    grace: float = 30.0
    api_keys: str = ""
    admin_key: str = ""
    cors_origins: str = ""
    allowed_hosts: str = ""
    root_path: str = ""
    log_level: str = "info"
    log_format: str = "pretty"
    otel: bool = False
    ui: bool = False
    triton: str = ""

    @property
    def live(self) -> bool:
        """Whether models are loaded, replaced or unloaded while the server runs."""
        return bool(self.watch or self.lazy or self.rest_after or len(self.model) > 1)

    @property
    def engine_apart(self) -> bool:
        """Whether the engine has a process of its own."""
        return self.engine_process == "on" or (self.engine_process == "auto" and self.device != "cpu" and POSIX)


HELP = {
    "model": "model directory of dsd-export, or hf:org/name[@revision]. NAME=DIR gives it a name; repeat the flag to "
    "serve several models, each with an engine process (default: the demo model)",
    "host": "address to listen on; 0.0.0.0 for all interfaces, :: for all of IPv4 and IPv6",
    "port": "TCP port",
    "engine": f"engine that runs the network: {listed(ENGINE_NAMES)}",
    "device": "cpu, cuda or cuda:N; there is no fallback",
    "precision": f"{listed(PRECISIONS)}, if the model was exported in it; auto: fp16 on a GPU if the model has it, "
    "else fp32",
    "threads": "CPU threads of the engine, 0 for all cores",
    "row_budget": "maximum number of rows in one call of the engine; 0 measures the best number",
    "engine_process": "on: the engine runs in a separate process, which is restarted when it fails; off: it runs in "
    "the server's process; auto: on unless the device is cpu",
    "http_workers": "processes that answer HTTP on one port and share one queue. Limits hold for all together; each "
    "has an equal share of --max-connections and of the memory for requests",
    "lazy": "load each model when a request first needs it; that request waits (default: load all at the start)",
    "rest_after": "seconds without a request after which a model is unloaded until the next one; 0: never",
    "watch": "without a value: replace a model when its directory changes. With the run folder of dsd-train: serve "
    "each new checkpoint, and show the same seeds over the checkpoints (default: off)",
    "max_waiting": "maximum length of the queue, in images; beyond it requests are rejected with 429",
    "max_wait": "maximum estimated wait, in seconds; beyond it requests are rejected with 429",
    "max_seconds": "time limit of a request, in seconds; one that would take longer is rejected with 504",
    "max_images": "largest n of one request",
    "max_steps": "largest number of sampler steps",
    "max_size": "largest side of an answer's images, in pixels",
    "max_body_mb": "largest request body, in megabytes",
    "max_uploads_mb": "memory for the bodies of all requests, each counted twice; beyond it the answer is 429",
    "max_decode_mb": "memory for decoding uploads; images that would exceed it wait",
    "max_encode_mb": "memory for answers, from encoding until they are sent; answers that would exceed it wait, and "
    "one that could never fit is rejected with 422",
    "body_timeout": "time limit for the body of a request, in seconds",
    "head_timeout": "time limit for the request line and headers, in seconds",
    "write_timeout": "seconds in which a client must read 64 KiB of its answer, or the rest of it; otherwise the "
    "connection is closed and the request cancelled",
    "keep_alive": "seconds for which an idle connection is kept; longer than in a proxy in front (nginx and load "
    "balancers: 60), because a request that arrives while the server closes the connection is lost",
    "max_connections": "maximum number of connections. At the limit the one that has been idle longest is closed; if "
    "all are busy, new ones get 503, except for /health. At most 64 less than ulimit -n (default: half of it, up to "
    "1024)",
    "max_connections_per_address": "the same for one address, or one /64 of IPv6, with 429; only if clients connect "
    "directly, because all connections through a proxy have the proxy's address (default: 0, no limit)",
    "max_megapixels": "largest uploaded image, in millions of pixels",
    "grace": "seconds to finish running requests after SIGTERM; a second signal ends the server at once",
    "api_keys": "file of API keys with lines name:key[:requests_per_minute[:images_at_once]]; # begins a comment. If "
    "there are keys, every request needs one, except those to /health and /docs, as Authorization: Bearer KEY or "
    "X-API-Key: KEY. DSD_API_KEYS may hold the keys instead, comma separated (default: none, anyone may send requests)",
    "admin_key": "file with a key of at least 16 characters, which enables POST /admin/model to replace a model while "
    "the server runs; DSD_ADMIN_KEY may hold the key instead (default: none)",
    "cors_origins": "web pages whose scripts may use the server, such as https://a.example,https://b.example, or * "
    "for all (default: none)",
    "allowed_hosts": "host names of the server, such as images.example.com,*.example.org, or * for any; others are "
    "rejected, because a web page could point its own name at the server. IP addresses, localhost, names without a "
    "dot, *.svc and *.internal are always accepted (default: only those)",
    "root_path": "path under which a reverse proxy shows the server, such as /dsd, for correct links (default: from "
    "the header X-Forwarded-Prefix, else none)",
    "log_level": "debug, info, warning or error; access lines are info",
    "log_format": "pretty or json. Access lines go to stdout, the rest to stderr",
    "otel": "send traces over OTLP/HTTP, by default to localhost:4318; other OTEL_* variables apply, and setting "
    "OTEL_EXPORTER_OTLP_ENDPOINT also turns traces on. Needs the extra otel (default: off)",
    "triton": "HOST:PORT[,HOST:PORT] of Triton servers (gRPC port, 8001) that do the work, with the model repository "
    "of dsd-export --triton; config.pbtxt then has the settings of the model and --max-wait. Needs the extra triton "
    "(default: none)",
    "ui": "web page at /, a client of this server. Needs the extra ui (default: off)",
}

CONNECTIONS = ("head_timeout", "write_timeout", "keep_alive", "max_connections", "max_connections_per_address")
LIVE = ("watch", "lazy", "rest_after")
GROUPS = {
    "model": ("model", "engine", "device", "precision", "threads", "row_budget", "engine_process", "triton", *LIVE),
    "network": ("host", "port", "http_workers", "root_path", "grace", "ui"),
    "limits": (*(name for name in HELP if name.startswith("max_") and name not in CONNECTIONS), "body_timeout"),
    "connections": CONNECTIONS,
    "security": ("api_keys", "admin_key", "allowed_hosts", "cors_origins"),
    "logging and traces": ("log_level", "log_format", "otel"),
}
MIN_SIZE = 8  # pixels a side of the images of an answer
# Bounds of every number. They are finite, because a setting without a limit is not safe.
RANGES: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "threads": (0, max(64, os.cpu_count() or 1)),
    "row_budget": (0, 1024),
    "http_workers": (1, 64),
    "rest_after": (0, 1_000_000),
    "max_waiting": (1, 100_000),
    "max_wait": (0.001, 1_000_000),
    "max_seconds": (0.001, 1_000_000),
    "max_images": (1, 1000),
    "max_steps": (1, MAX_STEPS),
    "max_size": (MIN_SIZE, 100_000),
    "max_body_mb": (0.001, 10_000),
    "max_uploads_mb": (0.001, 1_000_000),
    "max_decode_mb": (0.001, 1_000_000),
    "max_encode_mb": (0.001, 1_000_000),
    "body_timeout": (0.001, 86400),
    "head_timeout": (0.001, 86400),
    "write_timeout": (0.001, 86400),
    "keep_alive": (0.001, 86400),
    "max_connections": (1, max(descriptors() - SPARE_DESCRIPTORS, SPARE_DESCRIPTORS)),
    "max_connections_per_address": (0, 1_000_000),
    "max_megapixels": (0.001, 10_000),
    "grace": (0, 86400),
}
CHOICES = {
    "engine": ENGINE_NAMES,
    "engine_process": ("auto", "on", "off"),
    "precision": (AUTO, *PRECISIONS),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("pretty", "json"),
}
HOLD_SECRETS = ("api_keys", "admin_key")
WATCH_MODELS = "on"  # the value of watch for the directories of the models
DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
FIRST_NAME, NEXT_NAME = re.compile(f"{MODEL_NAME}="), re.compile(f",(?={MODEL_NAME}=)")
METAVARS = {
    **{"model": "DIR", "watch": "RUN", "triton": "HOST:PORT"},
    **{"api_keys": "FILE", "admin_key": "FILE", "allowed_hosts": "NAMES"},
}
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; dsd-serve --help lists the flags")


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from flags, else from the environment, else the defaults. Raises ConfigError for a wrong value."""
    defaults = vars(Settings())
    parser = Parser(
        prog="dsd-serve",
        description="Serve a DSD model over HTTP. Try: curl 'localhost:8000/generate?class=207' -o dog.png",
        epilog="Each flag can also be given as the environment variable in brackets; flags win, and an empty "
        "variable counts as unset.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, name, defaults[name])
    flags = vars(parser.parse_args(arguments))
    settings = Settings(**{name: choose(name, flags[name], default) for name, default in defaults.items()})
    check(settings)
    return settings


def add_flag(group: Any, name: str, default: Any) -> None:
    shown_default = "" if "(default: " in HELP[name] else f" (default {default})"
    options: dict[str, Any] = {"help": f"{HELP[name]}{shown_default} [{variable(name)}]"}
    if isinstance(default, bool):
        options |= {"action": "store_const", "const": "true"}
    elif name == "watch":
        options |= {"nargs": "?", "const": WATCH_MODELS, "metavar": METAVARS[name]}
    elif isinstance(default, tuple):
        options |= {"action": "append", "metavar": METAVARS[name]}
    else:
        number = isinstance(default, int | float)
        options["metavar"] = METAVARS.get(name, "N" if number else name.rpartition("_")[2].upper())
    group.add_argument("--" + name.replace("_", "-"), **options)


def variable(name: str) -> str:
    """The environment variable of a setting. DSD_API_KEYS and DSD_ADMIN_KEY hold keys; their files have other names."""
    return f"DSD_{name.upper()}_FILE" if name in HOLD_SECRETS else f"DSD_{name.upper()}"


def choose(name: str, flag: str | list[Any] | None, default: Any) -> Any:
    """The value of a setting: its flag, else its variable where that is not empty, else the default."""
    if isinstance(default, tuple) and flag is not None:
        return tuple(text if isinstance(text, str) else "--" for text in flag)
    if flag is not None:
        return convert(name, name, flag if isinstance(flag, str) else "--", default)  # argparse makes [] of --port=--
    text = os.environ.get(variable(name), "").strip()
    if not text:  # as docker compose and Helm set a variable without a value
        return default
    try:
        return convert(name, variable(name), text, default)
    except ConfigError as error:
        if "://" not in text or not isinstance(default, int):
            raise
        raise ConfigError(
            f"{error}; Kubernetes sets this variable in the pods of a namespace with a service of that name: write "
            "enableServiceLinks: false into the pod's spec, or rename the service"
        ) from None


def convert(name: str, source: str, text: str, default: Any) -> Any:
    """The value that a text stands for. source: what the sentence of a ConfigError calls the setting."""
    if isinstance(default, bool):
        if text.lower() not in BOOLEANS:
            raise ConfigError(f"{source} must be true or false, got {shown(text)}")
        return BOOLEANS[text.lower()]
    if isinstance(default, (int, float)):
        return number(source, text, type(default), *RANGES[name])
    if name in CHOICES and text not in CHOICES[name]:
        raise ConfigError(f"{source} must be one of {', '.join(CHOICES[name])}, got {shown(text)}")
    if name == "watch" and text.lower() in BOOLEANS:
        return WATCH_MODELS if BOOLEANS[text.lower()] else ""
    if isinstance(default, tuple):  # a=DIR,b=DIR; a comma belongs to a path unless a name follows
        return tuple(NEXT_NAME.split(text)) if FIRST_NAME.match(text) else (text,)
    if name == "device" and not DEVICE.fullmatch(text):
        raise ConfigError(f"{source} must be cpu, cuda or cuda:N, got {shown(text)}")
    return Path(text) if isinstance(default, Path) else text


def number(source: str, text: str, kind: type[int] | type[float], least: float, most: float) -> int | float:
    """A number from `least` to `most`, in ASCII digits. Raises ConfigError."""
    try:
        if not text.isascii() or "_" in text:  # Python would take ８ and 1_000
            raise ValueError
        value = kind(text)
        if not least <= value <= most:  # also refuses NaN
            raise ValueError
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"{source} must be {what} from {least} to {most}, got {shown(text)}") from None
    return value


def check(settings: Settings) -> None:
    """Raises ConfigError for settings that cannot be combined."""
    if settings.max_uploads_mb < 2 * settings.max_body_mb:
        raise ConfigError(
            f"max_uploads_mb must be at least twice max_body_mb, got {settings.max_uploads_mb:g} "
            f"and {settings.max_body_mb:g}"
        )
    workers = settings.http_workers
    if settings.max_uploads_mb < 2 * settings.max_body_mb * workers:
        raise ConfigError(
            f"max_uploads_mb must be at least twice max_body_mb for each of {workers} HTTP workers, which share it: "
            f"{2 * settings.max_body_mb * workers:g}, got {settings.max_uploads_mb:g}"
        )
    if settings.max_connections < workers:
        raise ConfigError(
            f"max_connections must be at least http_workers, got {settings.max_connections} and {workers}"
        )
    if workers > 1 and not POSIX:
        raise ConfigError("http_workers must be 1 on this system: more need Linux or macOS")
    if workers > 1 and settings.ui:
        raise ConfigError(
            f"ui needs http_workers 1, got {workers}: each page belongs to one process; serve the page with dsd-ui"
        )
    if workers > 1 and (settings.live or settings.admin_key or os.environ.get("DSD_ADMIN_KEY", "").strip()):
        raise ConfigError(
            f"http_workers must be 1 with several models, watch, lazy, rest_after or admin_key, got {workers}: HTTP "
            "workers serve a single model that does not change"
        )
    if settings.engine_process == "on" and not POSIX:
        raise ConfigError("engine_process must be auto or off on this system: on needs Linux or macOS")
    if settings.live and not POSIX:
        raise ConfigError("several models, watch, lazy and rest_after need Linux or macOS")
    if "" in settings.model:
        raise ConfigError("model must name a model directory or hf:org/name, got ''")
    from server.site import parse_hosts, parse_prefix

    parse_hosts(settings.allowed_hosts)
    parse_prefix(settings.root_path)
