"""Processes of contestants: start, freeze while others are measured, stop; and calls of the load generator."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.serving.load import Summary
from benchmarks.serving.servers import HOST
from benchmarks.serving.workload import request

START_SECONDS = 90.0


class BenchError(Exception):
    """A contestant cannot be measured; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """A server to measure. module: in benchmarks.serving.servers. clients: the number that saturates it."""

    label: str
    module: str
    clients: int
    arguments: tuple[str, ...] = ()


class Running:
    """The processes of a contestant, in their own process group, frozen by SIGSTOP except during a measurement."""

    def __init__(self, contestant: Contestant, model: Path, simulated: bool, classes: tuple[int, ...]) -> None:
        self.contestant, self.model, self.simulated, self.classes = contestant, model, simulated, classes
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  the processes write to it
        self.process = self.start()

    def start(self) -> "subprocess.Popen[str]":
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        command = [sys.executable, "-m", f"benchmarks.serving.servers.{self.contestant.module}"]
        command += ["--port", str(port), "--model", str(self.model), *self.contestant.arguments]
        command += ["--simulated"] if self.simulated else []
        process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, start_new_session=True, text=True
        )
        try:
            self.wait_ready(process)
        except BaseException:
            kill_group(process)
            raise
        os.killpg(process.pid, signal.SIGSTOP)
        return process

    def wait_ready(self, process: "subprocess.Popen[str]") -> None:
        """Wait for the first image."""
        body = json.dumps(request(self.classes[0], 0, 1, 1.0)).encode()
        first_request = urllib.request.Request(self.url + "/generate", body, {"content-type": "application/json"})
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(first_request, timeout=10) as answer:
                    answer.read()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.log.seek(0)
        raise BenchError(f"{self.contestant.label} did not start: {self.log.read()[-2000:].strip()}")

    def measure(self, kind: str, seconds: float, warmup: float, **more: Any) -> dict[str, Any]:
        """Resume the server, run the load generator against it, freeze it again; returns the generator's JSON."""
        order = {"url": self.url, "kind": kind, "classes": self.classes, "seconds": seconds, "warmup": warmup, **more}
        os.killpg(self.process.pid, signal.SIGCONT)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.load", json.dumps(order)], capture_output=True, text=True
        )
        if done.returncode:
            raise BenchError(
                f"the load generator failed against {self.contestant.label}: {done.stderr[-2000:].strip()}"
            )
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(done.stdout)

    def poisson(self, rate: float, seconds: float, warmup: float) -> Summary:
        """An open-loop run. A server that still has unanswered requests afterwards is restarted."""
        answer = self.measure("poisson", seconds, warmup, rate=rate)
        summary = Summary(**{**answer, "thirds": tuple(answer["thirds"])})
        if summary.lost:
            self.stop()
            self.process = self.start()
        return summary

    def row_budget(self) -> int:
        """Rows per tick, as measured by our server at startup."""
        os.killpg(self.process.pid, signal.SIGCONT)
        with urllib.request.urlopen(self.url + "/model", timeout=30) as answer:
            budget = json.load(answer)["row_budget"]
        os.killpg(self.process.pid, signal.SIGSTOP)
        return budget

    def stop(self) -> None:
        kill_group(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def kill_group(process: "subprocess.Popen[str]") -> None:
    """SIGTERM, then SIGKILL for the whole process group, because some servers leave child processes behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
