"""A server with HTTP workers: what its clients see, with and without the death of one of its processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from dsd_serve import locked_folders
from dsd_serve.errors import ConfigError
from server.settings import Settings, parse_settings
from server.workers.worker_settings import of_one_worker, settings_of, values_of
from tests.support.answers import events_of, problem
from tests.support.data import ROOT
from tests.support.servers import QUICK, Server, until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc")

SEEDED = {"class": 207, "seed": 7, "steps": 8, "guidance": 2}
SLOW = {"class": 207, "steps": 250, "sampler": "heun"}
NAMES = ("alice", "bob", "carol", "dave")
LIMITS = (":0:12", "", "", ":100")  # requests a minute and images at once
ALICE, BOB, CAROL, DAVE = ({"x-api-key": f"{name}-0123456789abcdef"} for name in NAMES)


def descendants(pid):
    """The numbers of all processes below this one; any thread may have started one."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (int(one) for one in (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def runs(pid, what=""):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return "\nState:\tZ" not in status and what in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


def workers_of(running):
    return [pid for pid in descendants(running.process.pid) if runs(pid, "worker_process")]


def engine_of(running):
    (pid,) = [pid for pid in descendants(running.process.pid) if runs(pid, "engine_process")]
    return pid


def get(running, path="/generate", **more):
    """A request on a connection of its own, which any worker may accept."""
    return httpx.get(running.url + path, timeout=60, **more)


@pytest.fixture(scope="module")
def three(tiny_dir, tmp_path_factory):
    """A server with three workers and an engine process."""
    running = Server(
        *("--model", str(tiny_dir), "--http-workers", "3", "--engine-process", "on", "--threads", "1"),
        folder=tmp_path_factory.mktemp("three"),
    )
    yield running
    below = descendants(running.process.pid)
    assert running.stop() == 0
    assert not [pid for pid in below if runs(pid)]
    assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def two(tiny_dir, tmp_path_factory):
    """A server with two workers, API keys and a short queue."""
    folder = tmp_path_factory.mktemp("two")
    lines = [f"{name}:{name}-0123456789abcdef{limit}" for name, limit in zip(NAMES, LIMITS, strict=True)]
    (folder / "keys").write_text("\n".join(lines))
    (folder / "keys").chmod(0o600)
    running = Server(
        *("--model", str(tiny_dir), "--http-workers", "2", "--engine-process", "on", "--threads", "1"),
        *("--max-waiting", "32"),
        *("--api-keys", str(folder / "keys"), "--log-format", "json"),
        folder=folder,
    )
    running.keys = folder / "keys"
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log


def test_settings():
    assert Settings().http_workers == 1
    assert parse_settings(["--http-workers", "3"]).http_workers == 3
    assert parse_settings(["--http-workers", "64", "--max-body-mb", "1"]).http_workers == 64
    for number in ("0", "65"):
        with pytest.raises(ConfigError, match=f"http_workers must be an integer from 1 to 64, got '{number}'"):
            parse_settings(["--http-workers", number])
    with pytest.raises(ConfigError, match="ui needs http_workers 1, got 2"):
        parse_settings(["--http-workers", "2", "--ui"])
    for arguments in (["--watch"], ["--model", "a=x", "--model", "b=y"], ["--lazy"], ["--admin-key", "file"]):
        with pytest.raises(ConfigError, match="http_workers must be 1 with several models, watch"):
            parse_settings(["--http-workers", "2", *arguments])
    with pytest.raises(ConfigError, match="for each of 6 HTTP workers, which share it: 240, got 200"):
        parse_settings(["--http-workers", "6"])
    settings = Settings(http_workers=4, max_connections=1000)
    share = of_one_worker(settings)
    assert (share.max_uploads_mb, share.max_decode_mb, share.max_encode_mb) == (50, 100, 200)
    assert share.max_connections == 250
    assert share.max_waiting == settings.max_waiting
    assert settings_of(values_of(share)) == share


def test_the_bytes_of_a_seed_are_those_of_a_server_with_one(three, server_url):
    for query in (SEEDED, {**SEEDED, "n": 3, "size": 64, "format": "webp"}, {**QUICK, "seed": 2**63 - 1}):
        expected = httpx.get(server_url + "/generate", params=query, timeout=60)
        answers = [get(three, params=query) for _ in range(4)]
        assert {answer.content for answer in answers} == {expected.content}
        assert {answer.headers["etag"] for answer in answers} == {expected.headers["etag"]}
    image = expected.content
    for path, query in (("/edit", {**SEEDED, "strength": 0.5}), ("/reconstruct", {}), ("/encode", {})):
        expected, answer = (
            httpx.post(url + path, params=query, files={"image": image}, timeout=60) for url in (server_url, three.url)
        )
        assert answer.status_code == 200 and answer.content == expected.content


def test_all_workers_answer_and_their_lines_name_them(three):
    def answered():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: get(three, "/health/live"), range(16)))
        return {f"worker={n}" for n in (1, 2, 3)} <= set(re.findall(r"worker=\d", three.stdout.read_text()))

    until(answered)
    assert "with 3 HTTP workers" in three.log


def test_previews_arrive_before_the_image(three):
    events = events_of(get(three, params={**SEEDED, "format": "events", "preview_every": 2}))
    assert [name for name, _ in events] == ["preview"] * 3 + ["image", "done"]


def test_a_client_that_goes_away_frees_the_engine(three):
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(three.url + "/generate", params={**SLOW, "n": 16}, timeout=httpx.Timeout(10, read=0.1))
    until(lambda: (shown := get(three, "/debug/batcher").json())["running"] == shown["waiting"] == [])


def test_a_deadline_that_cannot_be_met(three):
    get(three, params=QUICK)  # the times are known
    detail = problem(get(three, params={**SLOW, "n": 16, "timeout": 0.01}), 504)
    assert "more than the timeout of 0.01 s" in detail


def test_the_metrics_are_those_of_all(three):
    before = three.metrics()
    answers = [get(three, params={**SEEDED, "n": 2}) for _ in range(6)]
    queue, network = (float(part.partition("dur=")[2]) for part in answers[0].headers["server-timing"].split(", "))
    assert queue >= 0 and network > 0
    for _ in range(4):  # whichever worker answers
        after = three.metrics()
        grown = {name: after[name] - before.get(name, 0) for name in after}
        assert grown[("dsd_images_total",)] == grown[("dsd_queue_duration_seconds_count",)] == 12
        assert grown[("dsd_network_rows_total", "decode")] == 12
        assert grown[("dsd_requests_total", "200", "/generate")] == 6
        assert grown[("dsd_images_failed_total",)] == 0
    assert after[("dsd_http_workers",)] == 3
    assert after[("dsd_engine_process", "ready")] == after[("dsd_ready",)] == 1
    assert after[("dsd_row_budget",)] == get(three, "/debug/batcher").json()["budget"]
    assert after[("process_resident_memory_bytes",)] > 1e7
    for number in ("1", "2", "3"):
        assert after[("dsd_http_worker_process_resident_memory_bytes", number)] > 1e7
    assert after[("dsd_engine_process_resident_memory_bytes",)] > 1e7


def test_a_killed_worker_under_load(three):
    """The requests of the others end with an image, its own with a broken connection; it is started again."""
    before = three.metrics()
    expected = get(three, params=SEEDED).content
    killed = workers_of(three)[0]
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(get, three, params=SEEDED | {"steps": 100}) for _ in range(24)]
        until(lambda: get(three, "/debug/batcher").json()["running"])
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        slowest = 0.0
        while time.monotonic() < began + 2:
            at = time.monotonic()
            assert get(three, "/health/live").status_code == 200
            slowest = max(slowest, time.monotonic() - at)
        lost = [answer.exception() for answer in answers if answer.exception() is not None]
        done = [answer.result() for answer in answers if answer.exception() is None]
    print(f"{len(done)} images, {len(lost)} connections lost; the slowest /health/live took {slowest:.3f} s")
    assert {answer.status_code for answer in done} == {200}
    assert len({answer.content for answer in done}) == 1
    assert done and all(isinstance(error, httpx.TransportError) for error in lost)
    until(lambda: len(workers_of(three)) == 3 and three.metrics()[("dsd_http_workers",)] == 3)
    print(f"started again after {time.monotonic() - began:.1f} s")
    after = three.metrics()
    assert after[("dsd_http_worker_restarts_total",)] == before[("dsd_http_worker_restarts_total",)] + 1
    assert after[("dsd_requests_total", "200", "/generate")] >= before[("dsd_requests_total", "200", "/generate")]
    until(lambda: three.metrics()[("dsd_connections",)] == 1)  # those of the one that was killed are gone
    until(lambda: get(three, "/debug/batcher").json()["running"] == [])
    assert {get(three, params=SEEDED).content for _ in range(6)} == {expected}


def test_a_killed_engine_under_load(three):
    """Every request ends with an image or a sentence, and all workers serve again soon."""
    expected = get(three, params=SEEDED).content
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(get, three, params=SLOW) for _ in range(20)]
        until(lambda: len(get(three, "/debug/batcher").json()["running"]) > 2)
        os.kill(engine_of(three), signal.SIGKILL)
        began = time.monotonic()
        until(lambda: get(three, "/health/ready").status_code == 503)
        assert get(three, "/health/live").status_code == 200
        answers = [answer.result() for answer in answers]
        until(lambda: all(get(three, params=QUICK).status_code == 200 for _ in range(6)))
        print(f"served again after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 5
    failed = [answer for answer in answers if answer.status_code != 200]
    assert failed
    for answer in failed:
        assert "the engine process" in problem(answer, 503)
        assert answer.headers["retry-after"]
    assert {get(three, params=SEEDED).content for _ in range(4)} == {expected}


@pytest.mark.thorough
def test_a_worker_that_hangs_keeps_no_new_client_waiting(three):
    """Others take its connections over once it has been silent for a while."""
    (stopped, *_) = workers_of(three)
    os.kill(stopped, signal.SIGSTOP)
    try:
        until(lambda: answers_all(three), 30)
        assert all(answers_all(three) for _ in range(5))
    finally:
        os.kill(stopped, signal.SIGCONT)
    until(lambda: three.metrics()[("dsd_http_workers",)] == 3)
    assert stopped in workers_of(three)


def answers_all(running):
    """Whether twelve new connections are answered."""
    try:
        return all(httpx.get(running.url + "/health/ready", timeout=0.5).status_code in (200, 503) for _ in range(12))
    except httpx.TimeoutException:
        return False


def test_one_queue_for_all(two):
    """Its limits hold for the images of both workers together: half of it for one key, the whole for all."""
    with ThreadPoolExecutor(2) as pool, stopped_engine(two):
        held = []
        for holder, refused, words in (
            (BOB, BOB, "the key bob has 16 images under way, and half of the 32 that may wait is the most for one"),
            (CAROL, DAVE, "32 images are waiting, about .* at most 32 images"),
        ):
            held.append(hold(pool, two, holder, 16, before=16 * len(held)))
            for _ in range(3):
                answer = get(two, params=QUICK, headers=refused)
                assert re.search(words, problem(answer, 429))
                assert float(answer.headers["retry-after"]) > 0
    assert [answer.result().status_code for answer in held] == [200, 200]


def test_what_one_key_may_have_at_once_holds_over_both(two):
    """The key of alice may have twelve images at once, wherever her requests arrive."""
    with ThreadPoolExecutor(1) as pool, stopped_engine(two):
        held = hold(pool, two, ALICE, 12)
        for _ in range(4):
            answer = get(two, params=QUICK, headers=ALICE)
            assert "may have 12 images at once and 12 are under way" in problem(answer, 429)
            assert answer.headers["retry-after"]
    assert held.result().status_code == 200
    until(lambda: get(two, params=QUICK, headers=ALICE).status_code == 200)


@contextlib.contextmanager
def stopped_engine(running):
    """Nothing is drawn until the engine process is continued; it counts as hanging after 8 s."""
    pid = engine_of(running)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def hold(pool, running, headers, n, before=0):
    """The future answer to a request for n images beside others, which both workers know when this returns."""
    until(lambda: shown_tasks(running) == before)  # what is shown is a little old
    answer = pool.submit(get, running, params={**QUICK, "n": n}, headers=headers)

    def held():
        assert not answer.done(), answer.result().text
        return shown_tasks(running) == before + n

    until(held)
    time.sleep(0.7)
    return answer


def shown_tasks(running):
    shown = get(running, "/debug/batcher", headers=ALICE).json()
    return len(shown["running"]) + len(shown["waiting"])


def test_the_requests_of_a_minute_hold_over_both(two):
    statuses = []
    with httpx.Client(base_url=two.url, headers=DAVE) as one, httpx.Client(base_url=two.url, headers=DAVE) as other:
        began = time.monotonic()
        for _ in range(75):
            statuses += [
                client.get("/health/live").status_code and client.get("/model").status_code for client in (one, other)
            ]
            time.sleep(0.01)
        allowed = 100 * (1 + (time.monotonic() - began) / 60)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) <= allowed + 30  # what both take before they know of each other


def test_sighup_reloads_the_keys_in_all(two):
    two.keys.write_text(two.keys.read_text() + "\nerin:erin-0123456789abcdef\n")
    two.process.send_signal(signal.SIGHUP)
    headers = {"x-api-key": "erin-0123456789abcdef"}
    until(lambda: all(get(two, "/model", headers=headers).status_code == 200 for _ in range(8)))


def test_sigterm_lets_requests_finish(tiny_dir, tmp_path):
    """The group gets the signal, as by Ctrl-C; all workers drain, and everything ends."""
    running = Server("--model", str(tiny_dir), "--http-workers", "2", "--threads", "1", folder=tmp_path)
    below = descendants(running.process.pid)
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(get, running, params={**SLOW, "n": 2}) for _ in range(6)]
        until(lambda: get(running, "/debug/batcher").json()["running"])
        for pid in (*below, running.process.pid):
            os.kill(pid, signal.SIGINT)
        until(lambda: "shutting down" in running.log)
        assert {answer.result().status_code for answer in answers} <= {200, 503}
        assert 200 in {answer.result().status_code for answer in answers}
    assert running.process.wait(20) == 0
    assert not [pid for pid in below if runs(pid)]
    assert "Traceback" not in running.log


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_survives_a_killed_server(tiny_dir, tmp_path, stopped):
    running = Server(
        *("--model", str(tiny_dir), "--http-workers", "2", "--engine-process", "on", "--threads", "1"),
        folder=tmp_path,
        env={"TMPDIR": str(tmp_path)},
    )
    below = descendants(running.process.pid)
    assert len(below) == 3
    if stopped:
        for pid in below:
            os.kill(pid, signal.SIGSTOP)
    running.process.kill()
    running.process.wait()
    until(lambda: not [pid for pid in below if runs(pid)], 3)
    assert list(tmp_path.glob("dsd-metrics-*"))
    locked_folders.delete_abandoned("metrics", str(tmp_path))  # as the next server does
    assert not list(tmp_path.glob("dsd-*"))


def test_what_a_worker_cannot_do_is_the_sentence_of_the_server(tiny_dir, tmp_path):
    for arguments, words in (
        (["--model", str(tmp_path)], f"dsd-serve: {tmp_path}"),
        (["--model", str(tiny_dir), "--api-keys", str(tmp_path / "none")], "dsd-serve: the API keys in"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "server.main", "--port", "0", "--http-workers", "2", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(words)
        assert "Traceback" not in done.stderr
