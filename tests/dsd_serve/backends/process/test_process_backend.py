"""The engine process when things go wrong: it ends, hangs, fails or says what makes no sense, or its server ends."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from dsd_serve.backends import Observer
from dsd_serve.backends.process import process_backend, supervisor
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_backend import ProcessBackend
from dsd_serve.errors import (
    CancelledError,
    CheckpointError,
    ClosedError,
    DeadlineError,
    EngineError,
    EngineUnavailableError,
)
from dsd_serve.loading import load
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate
from tests.support.broken_engine_process import FAULT
from tests.support.data import ROOT
from tests.support.servers import until

QUICK = Generate(207, SamplingParams(num_steps=2))
LONG = Generate(207, SamplingParams(seed=1, num_steps=1000))


class Seen(Observer):
    def __init__(self):
        self.states, self.restarts, self.outcomes = [], 0, []

    def engine_process(self, state):
        self.states.append(state)

    def engine_restarted(self):
        self.restarts += 1

    def finished(self, outcome):
        self.outcomes.append(outcome)


@pytest.fixture
def start(tiny_dir, monkeypatch):
    """Starts a backend: start(**settings of the engine)."""
    opened = []
    folder = tempfile.TemporaryDirectory(prefix="dsd-")  # of a short name, as sockets need it
    monkeypatch.setattr(tempfile, "tempdir", folder.name)

    def start_(**changes):
        settings = {"model": str(tiny_dir), "threads": 1, "row_budget": 4, **changes}
        opened.append(ProcessBackend(EngineSettings(**settings), observer=Seen()))
        return opened[-1]

    yield start_
    for backend in opened:
        backend.close(0)
        assert backend.pid is None
    assert not os.listdir(folder.name)
    folder.cleanup()


@pytest.fixture
def faulty(start, monkeypatch, tmp_path):
    """Starts a backend whose process has a fault once the file in `.trigger` exists: faulty("garbage", **settings)."""

    def start_(fault, **changes):
        monkeypatch.setattr(process_backend, "MODULE", "tests.support.broken_engine_process")
        monkeypatch.syspath_prepend(str(ROOT))
        trigger = tmp_path / "trigger"
        monkeypatch.setenv(FAULT, f"{fault}:{trigger}")
        backend = start(**changes)
        backend.trigger = trigger
        return backend

    return start_


def draw(backend, task=QUICK, **more):
    return backend.submit_tasks([task], **more)[0].future.result(30)


def is_running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_row_budget_recovers_from_a_busy_start(faulty, tmp_path):
    (tmp_path / "trigger").touch()
    backend = faulty("busy start", row_budget=0)
    assert backend.budget == backend.info.budget == 1
    jobs = backend.submit_tasks([LONG] * 70)
    until(lambda: backend.budget >= 4, 30)
    assert backend.snapshot()["budget"] >= 4
    for job in jobs:
        job.cancel()


def test_a_killed_process_fails_its_tasks_and_is_started_again(start, caplog):
    backend = start()
    expected = draw(backend)
    jobs = backend.submit_tasks([LONG] * 20)
    until(lambda: backend.num_running)
    killed = backend.pid
    os.kill(killed, signal.SIGKILL)
    for job in jobs:
        with pytest.raises(ClosedError, match=r"the engine process was ended by SIGKILL, .* send the request again"):
            job.future.result(5)
    with pytest.raises(ClosedError, match="the engine process"):
        backend.submit_tasks([QUICK])
    until(lambda: backend.ready, 5)
    assert draw(backend).tobytes() == expected.tobytes()
    assert backend.pid != killed
    assert backend.snapshot()["process"] == {"pid": backend.pid, "restarts": 1}
    assert backend.observer.states == ["starting", "ready", "down", "starting", "ready"]
    assert backend.observer.restarts == 1
    assert backend.observer.outcomes == ["done", *["failed"] * 20, "done"]
    assert backend.seconds_ahead() == 0
    assert "the engine process was ended by SIGKILL" in caplog.text


def test_a_process_that_hangs_is_not_ready_and_may_come_back(start, monkeypatch):
    monkeypatch.setattr(supervisor, "SILENT_AFTER", 1.2)
    backend = start()
    late = backend.submit_tasks([LONG], timeout=2.0)[0]
    cancelled, patient = backend.submit_tasks([LONG, LONG])
    until(lambda: backend.num_running == 3)
    os.kill(backend.pid, signal.SIGSTOP)
    cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.future.result(10)
    until(lambda: not backend.ready, 5)
    assert "the engine process has not answered for" in backend.not_ready
    with pytest.raises(ClosedError, match="has not answered"):
        backend.submit_tasks([QUICK])
    with pytest.raises(DeadlineError, match="not ready in time"):
        late.future.result(4)  # at its deadline, without the margin of a process that answers
    assert backend.given_up is None
    os.kill(backend.pid, signal.SIGCONT)
    until(lambda: backend.ready, 5)
    assert patient.future.result(60) is not None
    assert draw(backend) is not None
    assert backend.observer.states == ["starting", "ready", "hanging", "ready"]
    assert backend.observer.outcomes == ["cancelled", "late", "done", "done"]


def test_a_process_that_hangs_for_too_long_is_killed(start, monkeypatch):
    monkeypatch.setattr(supervisor, "SILENT_AFTER", 1.2)
    monkeypatch.setattr(supervisor, "HANGS_FOR", 1.0)
    backend = start()
    (job,) = backend.submit_tasks([LONG])
    stopped = backend.pid
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(ClosedError, match="the engine process hung for more than 1 s, and was killed; send"):
        job.future.result(10)
    until(lambda: backend.ready, 5)
    assert not is_running(stopped)
    assert draw(backend) is not None


def test_closing_while_it_hangs(start, monkeypatch):
    monkeypatch.setattr(process_backend, "STOP_WITHIN", 0.3)
    monkeypatch.setattr(supervisor, "STOP_WITHIN", 0.3)
    backend = start()
    (job,) = backend.submit_tasks([LONG])
    pid = backend.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert not backend.close(0.1)
    assert time.monotonic() - began < 3
    with pytest.raises(ClosedError, match="did not end in time, and was killed"):
        job.future.result(0)
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("garbage", "sent an invalid message"),
        ("wrong type", "sent an invalid message"),
        ("wrong shape", r"sent an invalid message \(image is uint8 \[1, 2\]\)"),
        ("exit", "ended with exit status 7"),
        ("segfault", "was ended by SIGSEGV"),
    ],
)
def test_faults_end_the_process_and_heal(faulty, fault, words):
    backend = faulty(fault)
    expected = draw(backend).tobytes()
    backend.trigger.touch()
    with pytest.raises(ClosedError, match=f"the engine process {words}.*; send the request again"):
        draw(backend)
    backend.trigger.unlink()
    until(lambda: backend.ready, 5)
    assert draw(backend).tobytes() == expected
    assert backend.restarts == 1


def test_messages_about_unknown_tasks_are_ignored(faulty):
    backend = faulty("unknown tasks")
    backend.trigger.touch()
    assert draw(backend) is not None
    assert backend.restarts == 0


def test_a_process_that_processes_no_message_hangs(faulty, monkeypatch):
    monkeypatch.setattr(supervisor, "SILENT_AFTER", 1.2)
    monkeypatch.setattr(supervisor, "HANGS_FOR", 0.6)
    backend = faulty("stuck")
    backend.trigger.touch()
    with pytest.raises(ClosedError, match="hung for more than"):
        draw(backend)


def test_an_engine_that_fails_for_good_is_started_again(faulty, caplog):
    """As after an error of CUDA, which its process never gets rid of."""
    backend = faulty("engine fails")
    backend.trigger.touch()
    failures = []
    with pytest.raises(ClosedError):
        while True:
            try:
                draw(backend)
            except ClosedError:
                raise
            except Exception as error:
                failures.append(str(error))
    assert failures and all("the engine failed: the device fell off the bus" in failure for failure in failures)
    until(lambda: backend.restarts)
    assert "ended because the engine failed 3 times in a row; the last time: the device fell off the bus" in (
        backend.last_end
    )
    until(lambda: any("RuntimeError: the device fell off the bus" in (one.exc_text or "") for one in caplog.records))
    backend.trigger.unlink()
    until(lambda: backend.ready)
    assert draw(backend) is not None


def test_a_process_whose_gpu_is_lost_ends_at_its_first_failed_tick(faulty):
    backend = faulty("engine dies")
    backend.trigger.touch()
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        draw(backend)
    until(lambda: backend.restarts)
    assert "only a new process can use the GPU" in backend.last_end
    backend.trigger.unlink()
    until(lambda: backend.ready)
    assert draw(backend) is not None


def test_a_process_that_keeps_ending_is_given_up(start, monkeypatch):
    monkeypatch.setattr(process_backend, "GIVE_UP_AFTER", 2)
    backend = start()
    for number in range(2):
        assert backend.given_up is None
        until(lambda: backend.ready)
        os.kill(backend.pid, signal.SIGKILL)
        until(lambda number=number: backend.ends == number + 1)
    assert backend.given_up.startswith(
        "the engine process ended 2 times without an image in between; the last time it was"
    )
    until(lambda: backend.ready)
    draw(backend)
    assert backend.given_up is None, "it serves after all"


def test_another_model_is_not_served(start, tiny_dir, demo_dir, tmp_path, monkeypatch):
    """A model directory that was replaced while the server runs: answers would be labelled with the wrong model."""
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.3)
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    backend = start(model=str(folder))
    expected = draw(backend).tobytes()
    folder.rename(tmp_path / "first")
    os.kill(backend.pid, signal.SIGKILL)
    until(lambda: "cannot serve" in (backend.not_ready or ""))
    assert f"the engine process cannot serve: {folder}" in backend.not_ready
    shutil.copytree(demo_dir, folder)
    until(lambda: "another model" in (backend.not_ready or ""))
    fingerprint = backend.info.fingerprint[:12]
    assert f"not {fingerprint}), because its directory has changed since the server was started" in backend.not_ready
    shutil.rmtree(folder)
    (tmp_path / "first").rename(folder)
    until(lambda: backend.ready)
    assert draw(backend).tobytes() == expected


def test_what_cannot_be_loaded_is_the_same_error_as_without_a_process(start, tiny_dir, tmp_path):
    for settings, kind in (
        ({"model": str(tmp_path)}, CheckpointError),
        ({"precision": "fp16"}, CheckpointError),
        ({"device": "cuda"}, EngineUnavailableError),
    ):
        with pytest.raises(kind) as apart:
            start(**settings)
        with pytest.raises(kind) as here:
            load(**{"model": str(tiny_dir), **settings})
        assert str(apart.value) == str(here.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "engine-process"]


def test_a_process_that_cannot_be_started(start, monkeypatch, tmp_path):
    monkeypatch.setattr(process_backend, "MODULE", "dsd_serve.no_such_module")
    with pytest.raises(
        EngineUnavailableError, match="the engine process ended with exit status 1 while it was starting"
    ):
        start()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(EngineUnavailableError, match=r"cannot be started .* TMPDIR"):
        start()


PARENT = """
import sys, time
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_backend import ProcessBackend
backend = ProcessBackend(EngineSettings(sys.argv[1], threads=1, row_budget=4))
print(backend.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_survives_a_killed_server(tiny_dir, stopped):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    until(lambda: not is_running(pid), 3)
    parent.stdout.close()


def test_signals_for_the_group_leave_it_to_the_server(start):
    """As Ctrl-C in a terminal sends them."""
    backend = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(backend.pid, number)
    time.sleep(0.2)
    assert draw(backend) is not None
    assert backend.restarts == 0


def footprint():
    gc.collect()
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return threading.active_count(), len(os.listdir("/proc/self/fd")), int(resident.split()[1]) / 1024


@pytest.mark.thorough
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="descriptors are counted on Linux only")
def test_nothing_leaks_over_fifty_kills(start, monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    backend = start()

    def kill():
        jobs = backend.submit_tasks([LONG] * 20, on_preview=lambda *_: None)
        os.kill(backend.pid, signal.SIGKILL)
        for job in jobs:
            with pytest.raises(ClosedError):
                job.future.result(10)
        del jobs, job
        until(lambda: backend.ready, 30)
        draw(backend)

    for _ in range(5):
        kill()
    threads, descriptors, memory = footprint()
    for _ in range(50):
        kill()
    after = footprint()
    print("threads, descriptors, MB:", (threads, descriptors, memory), after)
    assert after[:2] == (threads, descriptors)
    assert after[2] - memory < 5
    assert backend.restarts == 55
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert not children.exists() or len(children.read_text().split()) <= 1
