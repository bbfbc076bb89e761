"""Logs: pretty or JSON, one line each, with the id of the request. Never headers, keys or bodies.

Access lines go to stdout, everything else to stderr.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from opentelemetry import trace

from server.errors import request_id
from server.watch import Exchange

access = logging.getLogger("server.access")

MAX_PATH = 200
FROM_ANSWER = {"class": "X-DSD-Class", "seed": "X-DSD-Seed", "steps": "X-DSD-Steps"}  # where the answer tells them

# Control characters, and what some viewers take for line ends: a client must not be able to write a line of its own.
ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n",
    0x0D: "\\r",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def context_fields(record: logging.LogRecord) -> dict[str, Any]:
    """The ids of request and trace where there are any, and what the caller gave as extra={"fields": ...}."""
    fields: dict[str, Any] = {}
    if number := request_id.get():
        fields["request_id"] = number
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        fields["trace_id"] = trace.format_trace_id(span.trace_id)
    return fields | getattr(record, "fields", {})


class PrettyFormatter(logging.Formatter):
    """`12:00:00.123 INFO    server.access: GET /generate 200 request_id=...`; tracebacks follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={quoted(value)}" for name, value in context_fields(record).items())
        when = f"{datetime.fromtimestamp(record.created):%H:%M:%S}.{int(record.msecs):03d}"
        line = f"{when} {record.levelname:7} {record.name}: {record.getMessage()}{fields}".translate(ESCAPES)
        if record.exc_info:
            trouble = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *(f"    {part.translate(ESCAPES)}" for part in trouble)])
        return line


def quoted(value: Any) -> str:
    """Text that holds what separates fields is put in quotes, so that a path cannot pretend to be other fields."""
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ' "=') else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, request_id, trace_id, exception and fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **context_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure(level: str, style: str) -> None:
    """Set up logging for the whole process. style: pretty or json."""
    formatter = JsonFormatter() if style == "json" else PrettyFormatter()
    for logger, stream in ((logging.getLogger(), sys.stderr), (access, sys.stdout)):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.handlers = [handler]
    access.propagate = False
    logging.getLogger().setLevel(level.upper())
    logging.captureWarnings(True)


def access_line(exchange: Exchange) -> None:
    """The line of a request. Of the query only what the answer's headers repeat: its other values may be secret."""
    scope = exchange.scope
    path = scope["path"] if len(scope["path"]) <= MAX_PATH else scope["path"][:MAX_PATH] + "..."
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": path,
        "status": exchange.status,
        "duration_ms": round(1000 * exchange.seconds, 1),
        "client": (scope.get("client") or ("unknown",))[0],
    }
    fields |= {name: exchange.headers[header] for name, header in FROM_ANSWER.items() if header in exchange.headers}
    access.info("request", extra={"fields": fields})
