"""What every backend with an engine of its own does: the batcher here, and the one in an engine process."""

import math
import threading
import time

import numpy as np
import pytest

from dsd_serve.backends import Observer
from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.process.engine_messages import EngineSettings
from dsd_serve.backends.process.process_backend import ProcessBackend
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.engines import load_engine
from dsd_serve.errors import CancelledError, ClosedError, DeadlineError, QueueFullError
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Edit, Generate, Interpolate, Reconstruct, WalkEnd, run
from dsd_serve.rows import Decode, Denoise, Encode
from tests.support.servers import until

# 2000 ticks, one after another, which take 0.3 s and more
LONG = Generate(207, SamplingParams(seed=1, num_steps=1000, sampler="heun", guidance_scale=2.0))


QUICK = Generate(207, SamplingParams(num_steps=2))


class Seen(Observer):
    def __init__(self):
        self.rows, self.waits, self.outcomes, self.reasons = [], [], [], []

    def tick(self, rows, seconds):
        assert 0 < seconds < 60
        self.rows.append(rows)

    def started(self, waited):
        self.waits.append(waited)

    def finished(self, outcome):
        self.outcomes.append(outcome)

    def rejected(self, reason):
        self.reasons.append(reason)


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir, num_threads=1)


@pytest.fixture(scope="module")
def open_backend(engine, tiny_dir):
    """Opens a backend of a kind: open_backend(kind, budget, max_waiting, max_seconds); all are closed in the end."""
    opened = []

    def open_(kind, budget=8, max_waiting=1000, max_seconds=math.inf):
        limits = {"max_waiting": max_waiting, "max_seconds": max_seconds, "observer": Seen()}
        if kind == "batcher":
            opened.append(Batcher(engine, budget=budget, **limits))
        else:
            settings = EngineSettings(str(tiny_dir), threads=1, row_budget=budget)
            opened.append(ProcessBackend(settings, **limits))
        backend = opened[-1]
        backend.submit_tasks([QUICK])[0].future.result(30)
        until(lambda: backend.times.row)  # the times of its ticks are known
        backend.observer.__init__()
        return backend

    yield open_
    for backend in opened:
        backend.close(10)


@pytest.fixture(scope="module", params=["batcher", "process"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def backend(open_backend, kind):
    """One for all tests that leave it as it was."""
    return open_backend(kind)


@pytest.fixture
def observer(backend):
    backend.observer.__init__()
    return backend.observer


def tasks_of_all_kinds(config):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, config.pixel_shape, dtype=np.uint8)
    z = rng.standard_normal(config.latent_shape, dtype=np.float32)
    mask = np.zeros(config.pixel_shape[1:], bool)
    mask[:5] = True
    guided = SamplingParams(seed=2**63 - 1, num_steps=5, sampler="dpmpp_2m", guidance_scale=2.5, guidance_stop=0.7)
    return [
        Generate(207, guided),
        Generate(1, SamplingParams(seed=5, index=3, num_steps=3)),
        Edit(pixels, 950, guided, 0.65),
        Edit(pixels, config.null_label, SamplingParams(seed=1, num_steps=4), 1.0, mask),
        Reconstruct(pixels),
        Interpolate(WalkEnd(1, 4), WalkEnd(207, 5, 2), 1 / 3, guided),
        Encode(pixels),
        Denoise(z, 0.1 + 0.2, config.null_label),
        Decode(z),
    ]


def test_results_are_those_of_the_engine_to_the_bit(engine, backend):
    tasks = tasks_of_all_kinds(engine.config)
    expected = [run(engine, task.program(engine.config)) for task in tasks]
    for job, result in zip(backend.submit_tasks(tasks), expected, strict=True):
        found = job.future.result(30)
        assert (found.dtype, found.shape, found.tobytes()) == (result.dtype, result.shape, result.tobytes())
        assert found.flags.writeable
        assert 0 < job.submitted <= job.started <= job.ended


def test_previews_come_in_order_before_the_result(engine, backend):
    tasks = [
        Generate(207, SamplingParams(seed=1, num_steps=6, sampler="euler", preview_every=2)),
        Generate(1, SamplingParams(seed=2, num_steps=4, sampler="euler", preview_every=1)),
    ]
    expected, seen = [], []
    for number, task in enumerate(tasks):

        def note(step, pixels, number=number):
            expected.append((number, step, pixels.tobytes()))

        run(engine, task.program(engine.config, note))
    jobs = backend.submit_tasks(tasks, on_preview=lambda *preview: seen.append((*preview[:2], preview[2].tobytes())))
    for job in jobs:
        job.future.add_done_callback(lambda _: seen.append("done"))
        job.future.result(30)
    until(lambda: seen.count("done") == 2)
    assert sorted(one for one in seen if one != "done") == sorted(expected)
    assert [one[1] for one in seen if one[0] == 1] == [1, 2, 3]
    assert seen[-1] == "done"


def test_a_preview_that_fails_fails_its_task_only(backend):
    def broken(*_):
        raise ZeroDivisionError("the caller's own")

    (job,) = backend.submit_tasks([Generate(1, SamplingParams(num_steps=5, preview_every=1))], on_preview=broken)
    with pytest.raises(ZeroDivisionError):
        job.future.result(30)
    assert backend.submit_tasks([QUICK])[0].future.result(30) is not None
    assert backend.ready


def test_cancelling_midway(backend, observer):
    jobs = backend.submit_tasks([LONG, LONG])
    until(lambda: backend.num_running == 2)
    jobs[0].cancel()
    jobs[0].cancel()  # a second time changes nothing
    began = time.monotonic()
    with pytest.raises(CancelledError):
        jobs[0].future.result(10)
    assert time.monotonic() - began < 0.6
    assert not jobs[1].future.done()
    jobs[1].cancel()
    until(lambda: backend.num_running == backend.num_waiting == 0)
    assert observer.outcomes == ["cancelled"] * 2
    jobs[1].cancel()  # one that has ended


def test_a_deadline_that_cannot_be_met(backend, observer):
    with pytest.raises(DeadlineError, match=r"this would take about .* s, more than the timeout of 0\.001 s"):
        backend.submit_tasks([LONG], timeout=0.001)
    assert observer.reasons == ["deadline"]


def test_a_deadline_that_is_missed(backend, observer):
    backend.times = TickTimes(1e-9, 1e-9)  # a wrong estimate
    (job,) = backend.submit_tasks([LONG], timeout=0.05)
    with pytest.raises(DeadlineError, match="was not ready in time and was dropped"):
        job.future.result(60)
    assert job.deadline <= job.ended < job.deadline + 1
    assert observer.outcomes == ["late"]
    assert backend.num_running == 0


def test_a_full_queue(open_backend, kind):
    backend = open_backend(kind, budget=1, max_waiting=3)
    assert backend.queue_full(3) is None
    jobs = list(backend.submit_tasks([LONG]))
    until(lambda: backend.num_running == 1)
    jobs += backend.submit_tasks([LONG] * 3)
    with pytest.raises(QueueFullError, match=r"3 images are waiting, about .* at most 3 images") as error:
        backend.submit_tasks([LONG])
    assert error.value.retry_after > 0
    assert backend.queue_full() is not None
    assert backend.observer.reasons == ["queue_full"] * 2
    jobs[-1].cancel()
    until(lambda: backend.num_waiting == 2)
    jobs += backend.submit_tasks([LONG])
    assert (backend.num_running, backend.num_waiting) == (1, 3)
    rows = LONG.cost.rows
    until(lambda: 3 * rows < backend.seconds_ahead() / backend.times.row <= 4 * rows)  # the time of a row changes
    for job in jobs:
        job.cancel()
    until(lambda: backend.num_running == backend.num_waiting == 0)


def test_queued_work_is_limited_by_its_cost(open_backend, kind):
    backend = open_backend(kind, budget=1, max_seconds=0.05)
    jobs = backend.submit_tasks([LONG])
    with pytest.raises(QueueFullError, match=r"about .* s of work is ahead; .* and 0 s"):
        backend.submit_tasks([QUICK])
    jobs[0].cancel()


def test_the_observer_hears_of_all(engine, backend, observer):
    tasks = tasks_of_all_kinds(engine.config)
    for job in backend.submit_tasks(tasks):
        job.future.result(30)
    until(lambda: len(observer.outcomes) == len(tasks))
    assert sum(map(sum, observer.rows)) == sum(task.cost.rows for task in tasks)
    assert sum(rows.encode for rows in observer.rows) == 4
    assert sum(rows.decode for rows in observer.rows) == 7
    assert all(sum(rows) <= 8 for rows in observer.rows)
    assert len(observer.waits) == len(tasks)
    assert all(0 <= wait < 30 for wait in observer.waits)
    assert observer.outcomes == ["done"] * len(tasks)


def test_the_snapshot(backend):
    jobs = backend.submit_tasks([LONG] * 12)
    shown = until(
        lambda: found if (found := backend.snapshot())["running"] and found["running"][0]["waits_for"] else None
    )
    assert {"budget": 8, "not_ready": None}.items() <= shown.items()
    assert {row for one in shown["running"] for row in one["waits_for"]} == {"denoise"}
    assert all(
        0 < one["rows_left"] <= LONG.cost.rows and one["seconds"] >= 0 for one in (*shown["running"], *shown["waiting"])
    )
    assert len({one["number"] for one in (*shown["running"], *shown["waiting"])}) == 12
    assert shown["seconds_ahead"] > 0
    for job in jobs:
        job.cancel()
    until(lambda: not backend.snapshot()["running"])
    shown = backend.snapshot()
    assert shown["rows"] >= shown["ticks"] > 0
    assert shown["row_ms"] > 0 and shown["tick_ms"] > 0
    assert shown["seconds_ahead"] == 0


def test_many_threads(engine, backend):
    """Each gets its own results."""
    failures = []

    def work(seed):
        for index in range(5):
            task = Generate(1, SamplingParams(seed=seed, index=index, num_steps=1 + (seed + index) % 4))
            (job,) = backend.submit_tasks([task])
            if job.future.result(60).tobytes() != run_alone(task):
                failures.append((seed, index))

    lock = threading.Lock()

    def run_alone(task):
        with lock:
            return run(engine, task.program(engine.config)).tobytes()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_drained_backend_finishes_what_it_has(open_backend, kind):
    backend = open_backend(kind)
    jobs = backend.submit_tasks([Generate(1, SamplingParams(seed=seed, num_steps=50)) for seed in range(10)])
    backend.drain()
    with pytest.raises(ClosedError, match="shutting down"):
        backend.submit_tasks([LONG])
    assert backend.not_ready == "the server is shutting down"
    assert backend.observer.reasons == ["draining"]
    assert backend.close(30)
    assert all(job.future.result(0) is not None for job in jobs)
    assert not backend.thread.is_alive()
    assert backend.close(1), "closing twice changes nothing"


def test_close_cancels_what_takes_too_long(open_backend, kind):
    backend = open_backend(kind)
    jobs = backend.submit_tasks([LONG] * 20)
    assert not backend.close(0.1)
    for job in jobs:
        with pytest.raises(CancelledError):
            job.future.result(0)
    assert backend.num_running == backend.num_waiting == 0
