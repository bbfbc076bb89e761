"""Logs: pretty or JSON, one line each, with the id of the request. Never headers, keys or bodies.

Access lines go to stdout, everything else to stderr. Each stream has a thread that writes it, so that an unread pipe
or a full disk does not block requests: lines that do not fit are dropped and counted.
"""

import json
import logging
import math
import os
import re
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any, TextIO

from opentelemetry import trace

from server.error_responses import request_id
from server.middleware.request_id import RequestRecord

access = logging.getLogger("server.access")

MAX_PATH = 200
FROM_ANSWER = {
    "class": "X-DSD-Class",
    "seed": "X-DSD-Seed",
    "steps": "X-DSD-Steps",
}  # copied from headers of the answer

MAX_WAITING = 4_000_000  # characters of lines that wait for their stream; above, lines are dropped
FLUSH_SECONDS = 1.0  # at the process's end, for each stream

# Invisible characters that str.isprintable accepts as letters and marks.
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff"
PLAIN = re.compile(f"[^{INVISIBLE}]*")


def escaped(text: str) -> str:
    """Text without control characters, line ends, and what is invisible or turns the direction of writing.

    A client must be able neither to write a line of its own nor to make one look like another.
    """
    if text.isprintable() and PLAIN.fullmatch(text):
        return text
    return "".join(one if one.isprintable() and PLAIN.fullmatch(one) else escape(one) for one in text)


def escape(one: str) -> str:
    if one in "\n\r":
        return repr(one)[1:-1]
    code = ord(one)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def context_fields(record: logging.LogRecord) -> dict[str, Any]:
    """The HTTP worker, the ids of request and trace where there are any, and what the caller gave as
    extra={"fields": ...}."""
    fields: dict[str, Any] = dict(of_process)
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
        line = f"{when} {record.levelname:7} {record.name}: {record.getMessage()}{fields}"
        line = escaped(line)
        if trouble := traceback_of(record):
            line = "\n".join([line, *(f"    {escaped(part)}" for part in trouble.splitlines())])
        return line


def traceback_of(record: logging.LogRecord) -> str:
    """The traceback of a record; one from the engine process has its text only."""
    if record.exc_info:
        return logging.Formatter().formatException(record.exc_info)
    return record.exc_text or ""


def quoted(value: Any) -> str:
    """Text with separators of fields is put in quotes, so that a path cannot imitate other fields."""
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
        if trouble := traceback_of(record):
            entry["exception"] = trouble
        return json.dumps({name: jsonable(value) for name, value in entry.items()})


def jsonable(value: Any) -> Any:
    """A value that every JSON parser accepts: lone surrogates, NaN and infinity are written out as text."""
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()


class StreamHandler(logging.Handler):
    """Writes lines to a stream from a thread of its own, in their order. `emit` never waits."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.descriptor = stream.fileno()
        self.lines: deque[str] = deque()
        self.changed = threading.Condition()
        self.waiting = 0  # characters of the lines, and of the one that is written now
        self.dropped = 0  # lines that could not be written, since the start
        self.reported = 0  # of them, those that a line reports
        threading.Thread(target=self.loop, name=f"log-{self.descriptor}", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception as error:  # a bug of the caller; handleError would block on stderr
            line = self.own_line(f"a line of {record.name} cannot be formatted: {error!r}")
        with self.changed:
            if self.waiting + len(line) > MAX_WAITING:
                self.dropped += 1
                return
            self.lines.append(line)
            self.waiting += len(line)
            self.changed.notify_all()

    def own_line(self, sentence: str) -> str:
        return self.format(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": sentence})) + "\n"

    def flush(self) -> None:
        """Wait until all lines are written, but not longer than FLUSH_SECONDS."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting, FLUSH_SECONDS)

    def loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines)
                line = self.lines.popleft()
            written = self.write(line)
            if written and self.reported < self.dropped and not self.lines:
                dropped = self.dropped
                sentence = (
                    f"{dropped - self.reported} lines of this log were dropped, because they could not be written"
                )
                if self.write(self.own_line(sentence)):
                    self.reported = dropped
            with self.changed:
                self.waiting -= len(line)
                self.dropped += not written
                self.changed.notify_all()

    def write(self, line: str) -> bool:
        """Write a line, however long it takes; False when it cannot be written."""
        data = line.encode("utf-8", "backslashreplace")
        while data:
            try:
                # Not through sys.stdout: its lock, held by a thread that waits, would abort the interpreter at its end.
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # the stream is another program's too, which made it non-blocking
                select.select([], [self.descriptor], [])
            except OSError:
                return False
        return True


streams: list[StreamHandler] = []  # of this process
of_process: dict[str, int] = {}  # fields of all its lines


def configure(level: str, style: str, worker: int = 0) -> None:
    """Set up logging for the whole process. style: pretty or json. worker: the number of an HTTP worker."""
    if worker:
        of_process["worker"] = worker
    formatter = JsonFormatter() if style == "json" else PrettyFormatter()
    for logger, stream in ((logging.getLogger(), sys.stderr), (access, sys.stdout)):
        logger.handlers = [logging.NullHandler()]
        if stream is not None:  # it is None if the process was started with it closed
            streams.append(StreamHandler(stream, formatter))
            logger.handlers = [streams[-1]]
    access.propagate = False
    logging.getLogger().setLevel(level.upper())
    logging.captureWarnings(True)


def lines_dropped() -> int:
    """Lines that were dropped, because their stream was not read or failed."""
    return sum(stream.dropped for stream in streams)


def access_line(record: RequestRecord) -> None:
    """The line of a request. Of the query only what the answer's headers repeat: its other values may be secret."""
    scope = record.scope
    path = scope["path"] if len(scope["path"]) <= MAX_PATH else scope["path"][:MAX_PATH] + "..."
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": path,
        "status": record.status,
        "duration_ms": round(1000 * record.seconds, 1),
        "client": (scope.get("client") or ("unknown",))[0],
    }
    fields |= {name: record.headers[header] for name, header in FROM_ANSWER.items() if header in record.headers}
    access.info("request", extra={"fields": fields})
