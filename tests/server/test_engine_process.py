"""A server whose engine has a process of its own: what its clients see, and what happens when that process ends."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dsd_serve.errors import ConfigError
from server import settings
from server.settings import Settings, parse_settings
from tests.support.answers import events_of, problem
from tests.support.data import ROOT
from tests.support.servers import QUICK, Server, running_server, until

SEEDED = {"class": 207, "seed": 7, "steps": 8, "guidance": 2}
SLOW = {"class": 207, "steps": 250, "sampler": "heun"}


@pytest.fixture(scope="module")
def apart(tiny_dir):
    flags = ("--model", str(tiny_dir), "--engine-process", "on", "--threads", "1", "--log-format", "json")
    with running_server(*flags) as server:
        yield server


@pytest.fixture
def http(apart):
    with httpx.Client(base_url=apart.url, timeout=60) as client:
        until(lambda: client.get("/health/ready").status_code == 200)
        yield client


def engine_pid(http):
    return http.get("/debug/batcher").json()["process"]["pid"]


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_when_the_engine_has_a_process():
    assert not Settings().engine_apart
    assert Settings(device="cuda:1").engine_apart
    assert Settings(engine_process="on").engine_apart
    assert not Settings(engine_process="off", device="cuda").engine_apart
    assert parse_settings(["--engine-process", "on"]).engine_process == "on"


def test_without_the_system_calls_that_it_needs(monkeypatch):
    monkeypatch.setattr(settings, "POSIX", False)
    assert not Settings(device="cuda").engine_apart
    with pytest.raises(ConfigError, match="engine_process must be auto or off on this system"):
        parse_settings(["--engine-process", "on"])


def test_the_bytes_of_a_seed_are_those_of_a_server_without_it(http, server_url):
    for query in (SEEDED, {**SEEDED, "n": 3, "size": 64, "format": "webp"}, {**QUICK, "seed": 2**63 - 1}):
        here = httpx.get(server_url + "/generate", params=query, timeout=60)
        there = http.get("/generate", params=query)
        assert there.status_code == here.status_code == 200
        assert there.content == here.content
        assert there.headers["etag"] == here.headers["etag"]
    image = there.content
    for path, query in (("/edit", {**SEEDED, "strength": 0.5}), ("/reconstruct", {})):
        here = httpx.post(server_url + path, params=query, files={"image": image}, timeout=60)
        assert http.post(path, params=query, files={"image": image}).content == here.content
    assert http.post("/encode", content=image).content == httpx.post(server_url + "/encode", content=image).content


def test_previews_arrive_before_the_image(http):
    answer = http.get("/generate", params={**SEEDED, "format": "events", "preview_every": 2})
    events = events_of(answer)
    assert [name for name, _ in events] == ["preview"] * 3 + ["image", "done"]
    assert [value["step"] for name, value in events if name == "preview"] == [2, 4, 6]


def test_times_and_metrics(apart, http):
    before = apart.metrics()
    answer = http.get("/generate", params={**SEEDED, "sampler": "heun", "n": 2})
    queue, network = (float(part.partition("dur=")[2]) for part in answer.headers["server-timing"].split(", "))
    assert queue >= 0 and network > 0
    after = apart.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[("dsd_images_total",)] == grown[("dsd_queue_duration_seconds_count",)] == 2
    assert grown[("dsd_network_rows_total", "denoise")] == 2 * 2 * 15
    assert grown[("dsd_network_rows_total", "decode")] == 2
    assert grown[("dsd_ticks_total",)] == grown[("dsd_tick_rows_count",)] >= 16
    assert grown[("dsd_tick_rows_sum",)] == 62
    assert after[("dsd_engine_process", "ready")] == 1
    assert after[("dsd_engine_process_resident_memory_bytes",)] > 1e7


def test_a_client_that_goes_away_frees_the_engine(http):
    with pytest.raises(httpx.ReadTimeout):
        http.get("/generate", params={**SLOW, "n": 16}, timeout=0.1)
    until(lambda: (shown := http.get("/debug/batcher").json())["running"] == shown["waiting"] == [])


def test_a_killed_engine_under_load(apart, http):
    """Every request ends with an image or a sentence, and the server serves again soon."""
    expected = http.get("/generate", params=SEEDED).content
    restarts = apart.metrics()[("dsd_engine_restarts_total",)]
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(httpx.get, apart.url + "/generate", params=SLOW, timeout=60) for _ in range(20)]
        until(lambda: len(http.get("/debug/batcher").json()["running"]) > 2)
        killed = engine_pid(http)
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        until(lambda: http.get("/health/ready").status_code == 503)
        assert "the engine process" in problem(http.get("/health/ready"), 503)
        assert problem(http.get("/health"), 503) == problem(http.get("/health/ready"), 503)
        assert http.get("/health/live").status_code == 200
        answers = [answer.result() for answer in answers]
        until(lambda: http.get("/generate", params=QUICK).status_code == 200)
        print(f"served again after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 5
    assert {answer.status_code for answer in answers} <= {200, 503}
    failed = [answer for answer in answers if answer.status_code == 503]
    assert failed
    for answer in failed:
        assert "the engine process" in problem(answer, 503)
        assert answer.headers["retry-after"]
    assert http.get("/generate", params=SEEDED).content == expected
    assert apart.metrics()[("dsd_engine_restarts_total",)] == restarts + 1
    assert "the engine process was ended by SIGKILL" in apart.log


def test_an_engine_that_dies_during_a_stream_ends_it_with_an_error(http):
    with http.stream("GET", "/generate", params={**SLOW, "format": "events", "preview_every": 1}) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line == "event: preview")
        os.kill(engine_pid(httpx.Client(base_url=http.base_url)), signal.SIGKILL)
        rest = list(lines)
    assert "event: error" in rest
    assert any("the engine process was ended" in line for line in rest)


def test_ctrl_c_in_a_terminal_lets_requests_finish(tiny_dir, tmp_path):
    """The signal reaches the whole group, and the server drains as without the engine process."""
    running = Server("--model", str(tiny_dir), "--engine-process", "on", "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        pid = engine_pid(client)
        answer = pool.submit(httpx.get, running.url + "/generate", params={**SLOW, "n": 8}, timeout=60)
        until(lambda: client.get("/debug/batcher").json()["running"])
        for each in (pid, running.process.pid):
            os.kill(each, signal.SIGINT)
        assert answer.result().status_code == 200
    assert running.process.wait(20) == 0
    assert not alive(pid)
    assert "Traceback" not in running.log


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "server.main", "--port", "0", "--model", str(tmp_path), "--engine-process", "on"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"dsd-serve: {tmp_path}") and done.stderr.count("\n") == 1


@pytest.mark.thorough
def test_a_hanging_engine_is_not_ready_and_comes_back(apart, http):
    pid = engine_pid(http)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: http.get("/health/ready").status_code == 503)
    print(f"not ready after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 15
    assert "has not answered for" in problem(http.get("/generate", params=QUICK), 503)
    assert http.get("/health/live").status_code == 200
    assert apart.metrics()[("dsd_engine_process", "hanging")] == 1
    os.kill(pid, signal.SIGCONT)
    until(lambda: http.get("/health/ready").status_code == 200, 5)
    assert http.get("/generate", params=QUICK).status_code == 200
    assert engine_pid(http) == pid


@pytest.mark.thorough
def test_an_engine_that_cannot_be_started_again_fails_liveness(tiny_dir, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(tiny_dir)
    running = Server("--model", str(folder), "--engine-process", "on", "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        folder.unlink()
        os.kill(engine_pid(client), signal.SIGKILL)
        until(lambda: client.get("/health/live").status_code == 503, 60)
        detail = problem(client.get("/health/live"), 503)
        assert "the engine process ended 5 times without an image in between; the last time it cannot serve" in detail
        assert "this server should be restarted" in detail
        folder.symlink_to(tiny_dir)
        until(lambda: client.get("/health/ready").status_code == 200, 60)
        assert client.get("/generate", params=QUICK).status_code == 200
        assert client.get("/health/live").status_code == 200
    assert running.stop() == 0
