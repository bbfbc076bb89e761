"""Logs that are not read or cannot be written, and into which clients write strange characters."""

import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from server.telemetry import logs
from server.telemetry.metrics import Metrics
from tests.support.data import ROOT
from tests.support.servers import until


@pytest.fixture
def start(demo_dir):
    """Starts a server with a stdout of the test's choice; gives the process and its address."""
    started = []

    def run(stdout, shell=""):
        command = [sys.executable, "-m", "server.main", "--port", "0", "--row-budget", "32", "--grace", "5"]
        if shell:
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE)
        started.append(process)
        while line := process.stderr.readline().decode():
            if found := re.search(r"running on http://(\S+):(\d+)", line):
                return process, found[1], int(found[2])
        raise AssertionError("the server did not start")

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def send_requests(host, port, count):
    connection = http.client.HTTPConnection(host, port, timeout=30)
    for _ in range(count):
        connection.request("GET", "/health/live")
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()
    connection.close()


def test_an_unread_stdout_blocks_neither_requests_nor_the_end(start):
    process, host, port = start(subprocess.PIPE)
    send_requests(host, port, 2000)  # 300 KB of lines; a pipe holds 64
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert time.monotonic() - began < 10
    written = process.stdout.read().decode()
    process.stdout.close()
    assert 100 < written.count("path=/health/live status=200") < 2000
    assert "Traceback" not in process.stderr.read().decode()


@pytest.mark.parametrize("shell", ["> /dev/full", ">&-", "<&- >&-"])
def test_a_stdout_that_cannot_be_written_is_harmless(start, shell):
    process, host, port = start(None, shell)
    send_requests(host, port, 50)
    dropped = re.search(r"^dsd_log_lines_dropped_total (\S+)", httpx.get(f"http://{host}:{port}/metrics").text, re.M)
    assert (float(dropped[1]) > 0) == ("full" in shell)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read().decode()


class Plain(logging.Formatter):
    def format(self, record):
        return record.getMessage()


@pytest.fixture
def pipe():
    """A handler that writes to a pipe, the logger above it, and the pipe's other end."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as writer:
        handler = logs.StreamHandler(writer, Plain())
        logs.streams.append(handler)
        logger = logging.Logger("a", logging.INFO)
        logger.addHandler(handler)
        yield handler, logger, reader
        logs.streams.remove(handler)


def test_lines_that_do_not_fit_are_dropped_and_counted_and_the_rest_keeps_its_order(pipe, monkeypatch):
    handler, logger, reader = pipe
    monkeypatch.setattr(logs, "MAX_WAITING", 200_000)
    count = 5000
    for number in range(count):
        logger.info("%06d %s", number, "x" * 92)  # 100 bytes with the line's end
    dropped = handler.dropped
    assert count - 200_000 / 100 - 65536 / 100 - 100 <= dropped < count
    assert logs.lines_dropped() == dropped
    metrics = Metrics()
    metrics.refresh()
    assert f"dsd_log_lines_dropped_total {float(dropped)}".encode() in generate_latest(metrics.registry)
    began = time.monotonic()
    handler.flush()
    assert 0.9 < time.monotonic() - began < 5  # unread: it gives up
    lines = [reader.readline().decode() for _ in range(count - dropped)]
    kept = [int(line[:6]) for line in lines]  # the first ones, and some for which there was room again
    assert lines == [f"{number:06d} {'x' * 92}\n" for number in sorted(set(kept))]
    assert (
        reader.readline().decode() == f"{dropped} lines of this log were dropped, because they could not be written\n"
    )
    logger.info("after")
    assert reader.readline() == b"after\n"
    until(lambda: not handler.waiting)
    assert handler.reported == handler.dropped == dropped


def test_a_line_longer_than_the_room_and_one_that_cannot_be_formatted(pipe):
    handler, logger, reader = pipe
    logger.info("x" * (logs.MAX_WAITING + 1))
    logger.info("%d", "no number")
    assert b"a line of a cannot be formatted: TypeError" in reader.readline()
    assert b"1 lines of this log were dropped" in reader.readline()
    assert handler.dropped == 1


def test_a_stream_that_another_program_made_non_blocking_loses_nothing(pipe):
    handler, logger, reader = pipe
    os.set_blocking(handler.descriptor, False)
    for number in range(3000):
        logger.info("%06d %s", number, "x" * 92)
    lines = [reader.readline() for _ in range(3000)]
    assert [int(line[:6]) for line in lines] == list(range(3000))
    assert handler.dropped == 0


def test_threads_write_whole_lines(pipe):
    _, logger, reader = pipe

    def write(name):
        for number in range(200):
            logger.info("%s %d %s", name, number, name * 3000)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    lines = [reader.readline().decode().split() for _ in range(600)]
    for thread in threads:
        thread.join()
    assert all(text == name * 3000 for name, _, text in lines)
    for name in "abc":
        assert [int(number) for who, number, _ in lines if who == name] == list(range(200))


# Characters.

ODD = [
    *"\0\a\b\t\n\v\f\r\x1b\x7f\x80\x85\x9b\u00ad\u034f\u061c\u115f\u180e\u2028\u2029\u2060\u2800\u3164\ufeff\uffa0",
    *(
        chr(code)
        for first, last in ((0x200B, 0x200F), (0x202A, 0x202E), (0x2066, 0x2069))
        for code in range(first, last + 1)
    ),
    *"\ufe0f\ufff9\ufffb\U0001d173\U000e0001\U000e0041\U000e0100\U000f0000\ud800\udfff\ue000",
]
anything = st.text(st.characters(exclude_categories=()) | st.sampled_from(ODD), max_size=40)


def record_of(message, path, error=""):
    fields = {"path": path, "seconds": float("nan"), "count": 3, "missing": None}
    record = logging.makeLogRecord({"name": "a", "msg": message, "levelname": "INFO", "levelno": 20, "fields": fields})
    if error:
        try:
            raise ValueError(error)
        except ValueError:
            record.exc_info = sys.exc_info()
    return record


@given(anything, anything)
def test_a_pretty_line_is_printable_and_one_line(message, path):
    line = logs.PrettyFormatter().format(record_of(message, path))
    assert line.isprintable() and len(line.splitlines()) == 1
    assert not [one for one in ODD if one in line]
    line.encode()
    first, *more = logs.PrettyFormatter().format(record_of(message, path, "e" + message)).split("\n")
    assert first == line or first.isprintable()
    assert all(part.startswith("    ") and part.isprintable() for part in more)


@given(anything, anything)
def test_a_json_line_is_one_line_of_json_without_halves_of_characters(message, path):
    line = logs.JsonFormatter().format(record_of(message, path, "e" + message))
    assert line.isascii() and line.isprintable()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    json.dumps(read, ensure_ascii=False).encode()  # fails for a surrogate alone
    assert read["seconds"] == "nan" and read["count"] == 3 and read["missing"] is None
    if not re.search("[\ud800-\udfff]", message):
        assert read["message"] == message


def test_letters_of_all_languages_stay_as_they_are():
    for text in ("größe", "金毛犬", "собака", "کلب", "कुत्ता", "🐕", "a b"):
        assert logs.escaped(text) == text
    assert logs.escaped("a\u202eb\n\x1b\U000e0041") == r"a\u202eb\n\x1b\U000e0041"
