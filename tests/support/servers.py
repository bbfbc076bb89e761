"""Real dsd-serve processes for tests, and waiting for their effects."""

import atexit
import contextlib
import functools
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.data import ROOT

T = TypeVar("T")

QUICK = {"class": 207, "steps": 1, "sampler": "euler", "guidance": 1}  # the cheapest image


class Server:
    """A dsd-serve process, or dsd-ui by its `module`. Its output goes to files, so it never blocks on a reader.

    arguments: flags, which may replace the default of a free port. folder: of the output files, by default a temporary
    one. url: its address.
    """

    def __init__(
        self,
        *arguments: str,
        module: str = "server.main",
        folder: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        if folder is None:
            self.temporary = tempfile.TemporaryDirectory(prefix="dsd-test-")  # deleted with this object
            folder = Path(self.temporary.name)
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", module, "--port", "0", *arguments]
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=err, env={**os.environ, **(env or {})}
            )
        atexit.register(self.process.kill)  # a test that fails does not stop it
        try:
            self.url = until(self.started, 60)
        except BaseException:
            self.process.kill()
            raise

    def started(self) -> str | None:
        found = re.search(r"running on (http://\S+)", self.log)
        assert found or self.process.poll() is None, f"the server did not start:\n{self.log}"
        return found and found[1]

    @property
    def log(self) -> str:
        """Its stderr so far."""
        return self.stderr.read_text()

    def metrics(self, **headers: str) -> dict[tuple[str, ...], float]:
        """(name, label values in the order of their names) -> value."""
        text = httpx.get(self.url + "/metrics", headers=headers).raise_for_status().text
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextlib.contextmanager
def running_server(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server, which must stop cleanly and without a traceback in its log."""
    server = Server(*arguments, env=env)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0
    assert "Traceback" not in server.log


@contextlib.contextmanager
def serving(*arguments: str, **env: str) -> Iterator[str]:
    """The URL of a `running_server`."""
    with running_server(*arguments, env=env) as server:
        yield server.url


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def serving_folder(folder: Path) -> Iterator[str]:
    """The URL of a static web server of a folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def kept_busy(url: str, n: int = 8) -> Iterator[subprocess.Popen[bytes]]:
    """The server draws n images for another client, for as long as that takes or the context is open."""
    query = f"class=1&n={n}&steps=250&guidance=3&format=json"
    client = subprocess.Popen(["curl", "-s", f"{url}/generate?{query}", "-o", os.devnull])
    try:
        until(lambda: httpx.get(f"{url}/debug/batcher").json()["running"])
        yield client
    finally:
        client.terminate()
        client.wait()


def until(condition: Callable[[], T | None], seconds: float = 20.0) -> T:
    """Wait until a condition holds in another process or thread; returns its first true value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def find_free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
