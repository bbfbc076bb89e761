"""Two ticks at a time on a device: results, order, cancelling, failures, and when halves pay."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.row_budget import RowBudget
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.backends.ticks import Ticks
from dsd_serve.engines import load_engine
from dsd_serve.errors import CancelledError, DeadlineError, EngineError
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import Generate, Reconstruct, run
from dsd_serve.rows import DeviceEngine, count_rows


class Device:
    """An engine on a thread of its own, which records ticks, checks the order, and can be made to wait or to fail."""

    def __init__(self, engine):
        self.engine, self.config = engine, engine.config
        self.thread = ThreadPoolExecutor(1)
        self.begun, self.ended, self.most, self.ticks = 0, 0, 0, []
        self.fail = self.fail_to_start = 0
        self.go = threading.Event()
        self.go.set()

    def start(self, rows):
        if self.fail_to_start:
            self.fail_to_start -= 1
            raise RuntimeError("the device takes nothing")
        number = self.begun
        self.begun += 1
        self.most = max(self.most, self.begun - self.ended)
        future = self.thread.submit(self.work, rows)

        def wait():
            assert self.ended == number, "waited for in order, once"
            self.ended += 1
            return future.result()

        return wait

    def work(self, rows):
        self.go.wait(30)
        self.ticks.append(list(rows))
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the device fell off the bus")
        return self.engine.run(rows)

    def run(self, rows):
        return self.start(rows)()

    def describe(self):
        return {}


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir, num_threads=1)


@pytest.fixture
def device(engine):
    return Device(engine)


@pytest.fixture
def batcher(device):
    batcher = Batcher(device, budget=4)
    device.most, device.ticks = 0, []
    yield batcher
    device.go.set()
    batcher.close(10)


def wait_until(holds):
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert holds()


def images(count, steps=6):
    return [
        Generate(
            207, SamplingParams(seed=i, num_steps=steps - i % 3, sampler=SAMPLER_NAMES[i % 3], guidance_scale=1 + i % 2)
        )
        for i in range(count)
    ]


def test_results_are_those_of_each_program_alone(engine, device, batcher):
    tasks = [*images(14), Reconstruct(np.full(engine.config.pixel_shape, 99, np.uint8))]
    jobs = batcher.submit_tasks(tasks)
    for job, task in zip(jobs, tasks, strict=True):
        assert job.future.result(30).tobytes() == run(engine, task.program(engine.config)).tobytes()
    assert device.most == 2, "two ticks were under way"
    assert sum(map(len, device.ticks)) == sum(task.cost.rows for task in tasks), "no row runs twice"


def test_one_program_alone(engine, device, batcher):
    (task,) = images(1)
    (job,) = batcher.submit_tasks([task])
    assert job.future.result(30).tobytes() == run(engine, task.program(engine.config)).tobytes()
    assert device.most == 1


def test_a_program_that_is_cancelled_while_the_device_has_its_rows(device, batcher):
    device.go.clear()
    jobs = batcher.submit_tasks(images(6))
    wait_until(lambda: device.most == 2)
    for job in jobs[:3]:
        job.cancel()
    device.go.set()
    for job in jobs[:3]:
        with pytest.raises(CancelledError):
            job.future.result(30)
    assert all(job.future.result(30) is not None for job in jobs[3:])
    assert batcher.num_running == 0


def test_a_program_that_is_late_while_the_device_has_its_rows(device, batcher):
    device.go.clear()
    (job,) = batcher.submit_tasks(images(1), timeout=0.05)
    others = batcher.submit_tasks(images(5))
    wait_until(lambda: device.most == 2)
    time.sleep(0.06)
    device.go.set()
    with pytest.raises(DeadlineError):
        job.future.result(30)
    assert all(other.future.result(30) is not None for other in others)


@pytest.mark.parametrize("where", ["fail", "fail_to_start"])
def test_a_failed_tick_fails_only_its_programs(device, batcher, where):
    device.go.clear()
    jobs = batcher.submit_tasks(images(2))
    wait_until(lambda: device.most)
    setattr(device, where, 1)
    jobs += batcher.submit_tasks(images(4))
    device.go.set()
    errors = [job.future.exception(30) for job in jobs]
    assert 0 < sum(error is not None for error in errors) < 6
    assert all(isinstance(error, EngineError) for error in errors if error is not None)
    assert batcher.ready and batcher.submit_tasks(images(1))[0].future.result(30) is not None


def test_a_dead_device_fails_everything(device, batcher):
    device.fail = 100
    jobs = batcher.submit_tasks(images(12))
    assert all(job.future.exception(30) is not None for job in jobs)
    wait_until(lambda: not batcher.ready)
    assert "failed 3 times in a row" in batcher.not_ready


def test_a_device_that_hangs_is_not_ready(device, batcher, monkeypatch):
    monkeypatch.setattr("dsd_serve.backends.batcher.STALLED_AFTER", 0.05)
    device.go.clear()
    jobs = batcher.submit_tasks(images(6))
    wait_until(lambda: batcher.not_ready is not None)
    assert "has not answered" in batcher.not_ready
    device.go.set()
    assert all(job.future.result(30) is not None for job in jobs)
    assert batcher.ready


def test_close_waits_for_what_the_device_has(device, batcher):
    jobs = batcher.submit_tasks(images(8))
    assert batcher.close(30)
    assert all(job.future.done() for job in jobs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=12))
def test_any_mixture_ends_and_no_row_runs_twice(engine, mixture):
    device = Device(engine)
    batcher = Batcher(device, budget=3)
    device.ticks = []
    tasks = [Generate(1, SamplingParams(seed=seed, num_steps=steps)) for seed, steps in mixture]
    try:
        for job in batcher.submit_tasks(tasks):
            assert job.future.result(30) is not None
    finally:
        batcher.close(10)
    assert sum(sum(count_rows(rows)) for rows in device.ticks) == sum(task.cost.rows for task in tasks)


GAINS = {1: 2.0, 2: 1.9, 4: 1.8, 8: 1.25, 16: 1.1, 32: 1.05}


@pytest.mark.parametrize(
    ("rows", "python_us", "limit"),
    [
        (128, 20, 64),  # enough for two full ticks
        (100, 20, 50),
        (40, 20, 20),
        (8, 20, 64),  # two ticks of 4 rows take nearly twice as long as one of 8
        (40, 1, 64),  # Python takes less than the second tick costs
    ],
)
def test_ticks_are_halved_where_that_pays(device, rows, python_us, limit):
    ticks = Ticks(device)
    assert isinstance(device, DeviceEngine)
    ticks.python_row = python_us * 1e-6
    assert ticks.share_of(rows, 64, RowBudget(64, GAINS), TickTimes(tick=1e-3, row=80e-6)) == limit


def test_an_engine_without_start_runs_one_tick_at_a_time(engine):
    ticks = Ticks(engine)
    assert (ticks.depth, ticks.share_of(40, 64, RowBudget(64, GAINS), TickTimes(row=80e-6))) == (1, 64)


def test_the_row_budget_is_tried_on_ticks_that_run_alone(device):
    """A budget that was measured too small is raised, with two ticks under way the rest of the time."""
    batcher = Batcher(device)
    batcher.row_budget = RowBudget(1, {1: 1.0, 2: 1.0})
    try:
        for job in batcher.submit_tasks(images(60, steps=12)):
            job.future.result(60)
    finally:
        batcher.close(10)
    assert sum(map(len, batcher.row_budget.samples.values())) > 3, "trials were made"
    assert device.most == 2
