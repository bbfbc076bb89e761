import threading
import time

import numpy as np
import pytest

from dsd_serve.backends import Observer
from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.row_budget import measure_budget
from dsd_serve.backends.tick_times import TickTimes
from dsd_serve.engines import load_engine
from dsd_serve.errors import CancelledError, ClosedError, DeadlineError, EngineError, QueueFullError
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import Cost, generate, reconstruct, run
from dsd_serve.rows import Denoise, Encode


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir)


class Watched:
    """An engine that records the rows of each tick, and can be made to wait or to fail."""

    def __init__(self, engine):
        self.engine, self.config = engine, engine.config
        self.ticks, self.fail = [], 0
        self.go = threading.Event()
        self.go.set()

    def run(self, rows):
        self.go.wait(30)
        self.ticks.append([type(row).__name__ for row in rows])
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the device fell off the bus")
        return self.engine.run(rows)

    def describe(self):
        return {}


@pytest.fixture
def watched(engine):
    return Watched(engine)


@pytest.fixture
def batcher(watched):
    batcher = Batcher(watched, budget=8, max_waiting=32)
    yield batcher
    watched.go.set()
    batcher.close(10)


def settings_of(number):
    rng = np.random.default_rng(number)
    return SamplingParams(
        seed=number,
        num_steps=int(rng.integers(1, 12)),
        sampler=SAMPLER_NAMES[number % 3],
        guidance_scale=(1.0, 2.0)[number % 2],
    )


def test_a_seed_gives_the_same_bytes_alone_and_among_others(engine, watched, batcher):
    mine = SamplingParams(seed=77, num_steps=9, sampler="heun", guidance_scale=1.5)
    alone = run(engine, generate(engine.config, 207, mine))
    pixels = np.full(engine.config.pixel_shape, 99, np.uint8)
    watched.go.clear()  # so that all are there before the first tick
    others = [batcher.submit(generate(engine.config, 1, settings_of(i))) for i in range(14)]
    job = batcher.submit(generate(engine.config, 207, mine))
    others += [batcher.submit(reconstruct(pixels)) for _ in range(2)]
    watched.go.set()
    assert job.future.result(30).tobytes() == alone.tobytes()
    for number, other in enumerate(others[:14]):
        expected = run(engine, generate(engine.config, 1, settings_of(number)))
        assert other.future.result(30).tobytes() == expected.tobytes()
    assert np.array_equal(others[-1].future.result(30), run(engine, reconstruct(pixels)))
    assert max(map(len, watched.ticks)) == 8
    assert any(len(set(tick)) > 1 for tick in watched.ticks), "kinds of rows share ticks"


def test_the_budget_holds_and_both_rows_of_a_guided_step_share_a_tick(watched):
    batcher = Batcher(watched, budget=3)
    guided = SamplingParams(num_steps=4, sampler="euler", guidance_scale=2.0)
    jobs = [batcher.submit(generate(watched.config, 1, guided)) for _ in range(3)]
    for job in jobs:
        job.future.result(30)
    denoise = [tick.count("Denoise") for tick in watched.ticks]
    assert max(map(len, watched.ticks)) <= 3
    assert all(count % 2 == 0 for count in denoise)
    batcher.close()


def test_a_budget_of_one_still_runs_guided_steps(watched):
    batcher = Batcher(watched, budget=1)
    params = SamplingParams(num_steps=2, guidance_scale=3.0)
    assert batcher.submit(generate(watched.config, 1, params)).future.result(30) is not None
    batcher.close()


def test_first_come_first_served(watched):
    """With a budget of one row, programs end in the order of their arrival."""
    batcher = Batcher(watched, budget=1)
    watched.go.clear()
    ended = []
    for number in range(5):
        job = batcher.submit(generate(watched.config, 1, SamplingParams(seed=number, num_steps=2)))
        job.future.add_done_callback(lambda _, number=number: ended.append(number))
    watched.go.set()
    batcher.close(30)
    assert ended == [0, 1, 2, 3, 4]


def test_encode_and_decode_rows_of_running_programs_go_first(watched):
    def sampling():
        for _ in range(6):
            yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]

    def encoding():
        yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]
        yield [Encode(np.zeros(watched.config.pixel_shape, np.uint8))]

    batcher = Batcher(watched, budget=2)
    watched.go.clear()
    jobs = [batcher.submit(p) for p in (sampling(), encoding(), sampling())]
    watched.go.set()
    for job in jobs:
        job.future.result(30)
    kinds = [tick for tick in watched.ticks if "Encode" in tick]
    assert kinds == [["Encode", "Denoise"]]
    batcher.close()


def test_a_full_queue_is_an_error_with_an_estimate(watched):
    batcher = Batcher(watched, budget=1, max_waiting=3)
    batcher.submit(reconstruct(np.zeros(watched.config.pixel_shape, np.uint8))).future.result(30)
    watched.go.clear()
    slow = generate(watched.config, 1, SamplingParams(num_steps=3))
    running = batcher.submit(slow, Cost(6, 6))
    while not batcher.running:
        time.sleep(0.01)
    waiting = [batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=1)), Cost(2, 2)) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 images are waiting, about") as error:
        batcher.submit(generate(watched.config, 1, SamplingParams()))
    assert error.value.retry_after > 0
    with pytest.raises(QueueFullError):
        batcher.submit_all([(generate(watched.config, 1, SamplingParams()), Cost(1, 1))] * 2)
    watched.go.set()
    for job in (running, *waiting):
        job.future.result(30)
    batcher.close()


def test_queued_work_is_limited_by_its_cost(watched):
    """One expensive program can fill the queue where many cheap ones do not."""
    batcher = Batcher(watched, budget=2, max_seconds=1.0)
    batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=2, sampler="euler"))).future.result(30)
    batcher.times.row = 0.01
    watched.go.clear()
    cheap = [batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=1)), Cost(2, 2)) for _ in range(20)]
    dear = batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=1)), Cost(300, 150))
    with pytest.raises(QueueFullError, match="work is ahead") as error:
        batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=1)), Cost(2, 2))
    assert 2 < error.value.retry_after < 3, "until a second of work is left of 3.4"
    watched.go.set()
    for job in (*cheap, dear):
        job.future.result(30)
    batcher.close()


def test_a_deadline_that_cannot_be_met_is_rejected_at_once(watched):
    batcher = Batcher(watched, budget=2)
    batcher.times = TickTimes(tick=0.02, row=0.01)
    program = generate(watched.config, 1, SamplingParams(num_steps=100, sampler="euler"))
    with pytest.raises(DeadlineError, match=r"about 2\.02 s, more than the timeout of 0\.5 s"):
        batcher.submit(program, Cost(101, 101), timeout=0.5)
    with pytest.raises(StopIteration):
        next(program)  # it was closed
    assert batcher.submit(reconstruct(np.zeros(watched.config.pixel_shape, np.uint8)), Cost(2, 2), timeout=0.5)
    batcher.close()


def test_a_late_program_ends_at_the_next_tick(watched):
    def endless():
        while True:
            yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]

    batcher = Batcher(watched, budget=2)
    job = batcher.submit(endless(), timeout=0.2)
    with pytest.raises(DeadlineError, match="not ready in time"):
        job.future.result(10)
    assert job.deadline <= job.ended < job.deadline + 0.8
    assert not batcher.running
    batcher.close()


def test_non_finite_values_fail_one_image_only(watched, batcher):
    """The poisoned program shares its ticks with a healthy one."""
    poison = np.full(watched.config.latent_shape, np.nan, np.float32)

    def poisoned():
        for _ in range(3):
            yield [Denoise(poison, 0.5, 1)]

    watched.go.clear()
    params = SamplingParams(seed=3, num_steps=5)
    bad, good = batcher.submit(poisoned()), batcher.submit(generate(watched.config, 1, params))
    watched.go.set()
    with pytest.raises(EngineError, match="not finite"):
        bad.future.result(30)
    assert np.array_equal(good.future.result(30), run(watched.engine, generate(watched.config, 1, params)))
    assert batcher.ready


def test_an_engine_that_hangs_is_not_ready(watched, batcher, monkeypatch):
    monkeypatch.setattr("dsd_serve.backends.batcher.STALLED_AFTER", 0.1)
    watched.go.clear()
    job = batcher.submit(reconstruct(np.zeros(watched.config.pixel_shape, np.uint8)))
    deadline = time.monotonic() + 10
    while batcher.ready and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "has not answered" in batcher.not_ready
    watched.go.set()
    job.future.result(10)
    assert batcher.ready


def test_snapshot_and_observer(watched):
    seen = []

    class Noting(Observer):
        def tick(self, rows, seconds):
            seen.append(("tick", sum(rows)))

        def started(self, waited):
            seen.append(("started", waited >= 0))

        def finished(self, outcome):
            seen.append(("finished", outcome))

        def rejected(self, reason):
            seen.append(("rejected", reason))

    batcher = Batcher(watched, budget=2, max_waiting=1, observer=Noting())
    watched.go.clear()
    pixels = np.zeros(watched.config.pixel_shape, np.uint8)
    first = batcher.submit(reconstruct(pixels), Cost(2, 2))
    while not batcher.snapshot()["running"]:
        time.sleep(0.01)
    second = batcher.submit(reconstruct(pixels), Cost(2, 2))
    with pytest.raises(QueueFullError):
        batcher.submit(reconstruct(pixels))
    shown = batcher.snapshot()
    assert (shown["running"][0]["waits_for"], shown["running"][0]["rows_left"]) == (["encode"], 2)
    assert (len(shown["waiting"]), shown["budget"], shown["not_ready"]) == (1, 2, None)
    second.cancel()
    watched.go.set()
    first.future.result(10)
    with pytest.raises(CancelledError):
        second.future.result(10)
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.submit(reconstruct(pixels))
    assert seen.count(("tick", 1)) == 2
    assert {("started", True), ("finished", "done"), ("finished", "cancelled")} < set(seen)
    assert [reason for kind, reason in seen if kind == "rejected"] == ["queue_full", "draining"]


def test_cancelling_frees_the_place_at_the_next_tick(watched, batcher):
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]
        finally:
            closed.set()

    job = batcher.submit(endless())
    while len(watched.ticks) < 3:
        time.sleep(0.01)
    job.cancel()
    with pytest.raises(CancelledError):
        job.future.result(10)
    assert closed.is_set()
    assert not batcher.running
    count = len(watched.ticks)
    time.sleep(0.1)
    assert len(watched.ticks) == count


def test_a_failing_program_does_not_affect_others(watched, batcher):
    def broken():
        yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]
        raise ZeroDivisionError("a bug")

    def empty():
        yield []

    good = batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=5)))
    with pytest.raises(ZeroDivisionError):
        batcher.submit(broken()).future.result(30)
    with pytest.raises(EngineError, match="no rows"):
        batcher.submit(empty()).future.result(30)
    assert good.future.result(30) is not None
    assert batcher.ready


def test_a_failed_tick_fails_only_its_programs(watched, batcher):
    watched.fail = 1
    with pytest.raises(EngineError, match="fell off the bus"):
        batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=2))).future.result(30)
    assert batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=2))).future.result(30) is not None
    assert batcher.ready


def test_a_dead_engine_fails_everything_and_is_not_ready(watched, batcher):
    watched.fail = 100
    jobs = [batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=2))) for _ in range(20)]
    for job in jobs:
        with pytest.raises((EngineError, ClosedError)):
            job.future.result(30)
    assert not batcher.ready
    with pytest.raises(ClosedError, match="fell off the bus"):
        batcher.submit(generate(watched.config, 1, SamplingParams()))


def test_close_finishes_pending_programs(watched):
    batcher = Batcher(watched, budget=4)
    jobs = [batcher.submit(generate(watched.config, 1, SamplingParams(num_steps=3))) for _ in range(10)]
    assert batcher.close(30)
    assert all(job.future.done() for job in jobs)
    with pytest.raises(ClosedError, match="shutting down"):
        batcher.submit(generate(watched.config, 1, SamplingParams()))


def test_close_cancels_unfinished_programs_after_its_timeout(watched):
    def endless():
        while True:
            yield [Denoise(np.zeros(watched.config.latent_shape, np.float32), 0.5, 1)]

    batcher = Batcher(watched, budget=4)
    job = batcher.submit(endless())
    assert not batcher.close(0.2)
    with pytest.raises(CancelledError):
        job.future.result(1)


class Accelerator:
    """An engine whose tick takes as long for 1 row as for 16, like a GPU's."""

    def __init__(self, config):
        self.config = config

    def run(self, rows):
        time.sleep(0.004 * -(-len(rows) // 16))
        return [row.z_t for row in rows]


def test_the_measured_budget_is_where_more_rows_stop_paying_off(engine):
    assert measure_budget(Accelerator(engine.config))[0].size == 16
    assert 1 <= measure_budget(engine)[0].size <= 64
