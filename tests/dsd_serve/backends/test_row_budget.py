"""The row budget: simulated engines on simulated clocks, and a batcher on an engine whose start was disturbed."""

import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve.backends.batcher import Batcher
from dsd_serve.backends.row_budget import RowBudget, measure_budget
from dsd_serve.config import ModelConfig
from dsd_serve.rows import Denoise
from tests.support.servers import until

CONFIG = ModelConfig(image_size=16, patch_size=8, latent_dim=8, hidden_size=32, depth=2, num_heads=2)
SIZES = [1, 2, 4, 8, 16, 32, 64]
ENGINES = {  # seconds of a tick
    "a processor": lambda rows: 2 + rows,
    "one with a large overhead": lambda rows: 20 + rows,
    "a device that takes 16 rows at once": lambda rows: 4 * -(-rows // 16),
    "a device that is never full": lambda rows: 20,
    "a cache that overflows": lambda rows: 2 + rows * (1.3 if rows > 16 else 1),
    "one without any gain": lambda rows: rows,
}
PLENTY = 1000  # rows
engines = pytest.mark.parametrize("seconds_of", ENGINES.values(), ids=ENGINES)


def rate(seconds_of, size):
    return size / seconds_of(size)


def best_rate(seconds_of):
    return max(rate(seconds_of, size) for size in SIZES)


def right(seconds_of):
    return min(size for size in SIZES if rate(seconds_of, size) >= 0.95 * best_rate(seconds_of))


def gains_of(seconds_of):
    return {small: rate(seconds_of, 2 * small) / rate(seconds_of, small) for small in SIZES[:-1]}


def serve(budget, seconds_of, ticks, machine=float, rows=PLENTY, at_once=1):
    """Serve so many ticks; the sizes of the budget, and the seconds. at_once: rows that a program yields."""
    sizes, spent = [budget.size], 0.0
    for _ in range(ticks):
        limit = budget.limit(rows)
        assert limit <= 2 * max(budget.size, at_once), "no request pays for more than its double"
        taken = min(rows, max(limit, at_once))
        seconds = machine(seconds_of(taken))
        budget.note(taken, seconds)
        spent += seconds
        if budget.size != sizes[-1]:
            assert budget.size in (2 * sizes[-1], sizes[-1] // 2) or at_once > 1, "one step at a time"
            sizes.append(budget.size)
    return sizes, spent


class Machine:
    """The clock of a machine on which others work: for a `share` of the time it is three times slower, in periods of
    20 on average; besides, times spread a little. A call runs for so many seconds, and returns how long that took."""

    def __init__(self, seed=0, spread=0.03, share=0.2):
        self.random, self.spread, self.share = random.Random(seed), spread, share
        self.busy, self.left = False, 1.0

    def __call__(self, seconds):
        seconds *= max(0.1, self.random.gauss(1, self.spread))
        elapsed = 0.0
        while self.share:
            slowness = 3 if self.busy else 1
            if seconds * slowness <= self.left:
                self.left -= seconds * slowness
                return elapsed + seconds * slowness
            seconds -= self.left / slowness
            elapsed += self.left
            self.busy = not self.busy
            self.left = self.random.expovariate(1 / 20 if self.busy else self.share / (1 - self.share) / 20)
        return seconds


@engines
@pytest.mark.parametrize("size", SIZES)
def test_a_disturbed_start_is_corrected_while_it_serves(seconds_of, size):
    rng = random.Random(size)
    gains = {small: gain * rng.uniform(0.4, 2.0) for small, gain in gains_of(seconds_of).items()}
    budget = RowBudget(size, gains)
    sizes, _ = serve(budget, seconds_of, 6000, Machine(size, share=0.1))
    assert rate(seconds_of, budget.size) >= 0.82 * best_rate(seconds_of), "smaller differences drown in the noise"
    assert len(sizes) <= 12, "it does not go back and forth"


@engines
@pytest.mark.parametrize("size", SIZES)
def test_without_noise_the_right_budget_is_found_within_a_few_hundred_ticks(seconds_of, size):
    budget = RowBudget(size, {})
    serve(budget, seconds_of, 600)
    assert rate(seconds_of, budget.size) >= 0.9 * best_rate(seconds_of)
    assert budget.size <= 2 * right(seconds_of), "more rows would only delay everyone"


@engines
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_an_undisturbed_budget_stays(seconds_of, share):
    budget = RowBudget(right(seconds_of), gains_of(seconds_of))
    sizes, _ = serve(budget, seconds_of, 6000, Machine(1, 0.03 if share else 0.0, share))
    assert sizes == [right(seconds_of)]


@engines
def test_trials_cost_little(seconds_of):
    size = right(seconds_of)
    tried, fixed = RowBudget(size, gains_of(seconds_of)), RowBudget(size)
    _, seconds = serve(tried, seconds_of, 1000)
    rows, after = 0, 0.0
    for _ in range(5000):
        limit = tried.limit(PLENTY)
        tried.note(limit, seconds_of(limit))
        rows, after = rows + limit, after + seconds_of(limit)
    assert rows / after >= 0.98 * rate(seconds_of, size)
    assert serve(fixed, seconds_of, 1000)[0] == [size]
    assert seconds <= 1.1 * 1000 * seconds_of(size), "nor at first"


@given(
    size=st.sampled_from(SIZES),
    gains=st.dictionaries(st.sampled_from(SIZES[:-1]), st.floats(1e-3, 1e3)),
    ticks=st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 3), st.floats(0, 1e6), st.sampled_from("ttttxf")), max_size=300
    ),
)
@settings(max_examples=100, deadline=None)
def test_any_ticks(size, gains, ticks):
    """Light load, programs that yield several rows, times of any kind, ticks that end without one, and failures."""
    budget = RowBudget(size, gains)
    for rows, at_once, seconds, what in ticks:
        before = budget.size
        limit = budget.limit(rows)
        assert 1 <= limit <= max(2 * before, 8)
        taken = max(at_once, min(rows, limit))
        if what == "t":
            budget.note(taken, seconds)
            assert budget.size in SIZES
        elif what == "f":
            assert not budget.failed() or limit > before
            assert budget.most >= budget.size or budget.most == before


@given(st.integers(1, 1024), st.lists(st.tuples(st.integers(1, 200), st.floats(0, 10)), max_size=300))
@settings(max_examples=50, deadline=None)
def test_a_budget_that_was_given_never_changes(size, ticks):
    budget = RowBudget(size)
    for rows, seconds in ticks:
        assert budget.limit(rows) == size
        budget.note(rows, seconds)
        assert not budget.failed()
    assert budget.size == size


def test_a_machine_that_changes_is_followed():
    budget = RowBudget(64, gains_of(ENGINES["a device that is never full"]))
    for name, size in [("a device that takes 16 rows at once", 16), ("one with a large overhead", 64)] * 2:
        sizes, _ = serve(budget, ENGINES[name], 12_000, Machine(1, 0.02, 0.1))
        assert budget.size == size and len(sizes) == 3, (name, sizes)


def test_with_few_rows_nothing_is_tried():
    budget = RowBudget(8, gains_of(ENGINES["one with a large overhead"]))
    for _ in range(1000):
        assert budget.limit(3) == 8
        budget.note(3, 1.0)
    assert budget.size == 8


def test_a_budget_of_one_is_left_although_programs_yield_two_rows_at_once():
    budget = RowBudget(1, {1: 0.2, 2: 0.3})
    serve(budget, ENGINES["a device that takes 16 rows at once"], 1000, at_once=2)
    assert budget.size == 16


def test_programs_that_yield_two_rows_do_not_keep_the_budget_at_two():
    """Half of it cannot be tried; its double can. Every ninth tick has one row, as of a decoding."""
    budget = RowBudget(2, {1: 0.2, 2: 0.3})
    for number in range(1000):
        rows = max(2, budget.limit(PLENTY)) if number % 9 else 1
        budget.note(rows, ENGINES["a device that takes 16 rows at once"](rows))
    assert budget.size == 16


class Device:
    """A device that takes 16 rows at once, in 2 ms, and fails above `most`. Until `disturbed` ends, ticks of several
    rows take longer."""

    config = CONFIG

    def __init__(self, most=64, disturbed=0.0):
        self.most, self.sizes = most, []
        self.quiet = time.monotonic() + disturbed
        self.random = random.Random(7)

    def run(self, rows):
        self.sizes.append(len(rows))
        if len(rows) > self.most:
            raise MemoryError("out of memory")
        more = self.random.uniform(len(rows), 4 * len(rows)) if len(rows) > 1 and time.monotonic() < self.quiet else 0
        time.sleep(0.002 * (-(-len(rows) // 16) + more))
        return [row.z_t for row in rows]


def endless():
    row = Denoise(np.zeros(CONFIG.latent_shape, np.float32), 0.5, 1)
    while True:
        yield [row]


def serve_until(batcher, holds):
    """Run a hundred programs until something holds; none of them fails."""
    jobs = [batcher.submit(endless()) for _ in range(100)]
    until(holds, 20)
    assert not any(job.future.done() for job in jobs)
    assert not batcher.close(0)


def test_a_batcher_recovers_from_a_disturbed_start():
    batcher = Batcher(Device(disturbed=0.8))
    assert batcher.budget == batcher.snapshot()["budget"] == 1
    serve_until(batcher, lambda: batcher.budget == 16)
    assert batcher.snapshot()["budget"] == 16


def test_a_trial_that_the_engine_cannot_run_fails_nothing():
    device = Device()
    batcher = Batcher(device)
    batcher.row_budget = RowBudget(4, gains_of(ENGINES["one with a large overhead"]))
    device.most = 8
    del device.sizes[:]
    serve_until(batcher, lambda: batcher.row_budget.most == 8 and device.sizes.count(8) > 200)
    assert device.sizes.count(16) == 1, "it is not tried again"
    assert batcher.budget == 8 and batcher.dead is None


def test_sizes_at_which_the_engine_fails_at_the_start_are_left_out(caplog):
    budget, times = measure_budget(Device(most=8))
    assert (budget.size, budget.most) == (8, 8)
    assert times.row == pytest.approx(0.002 / 8, rel=0.5)
    assert "cannot run 16 rows in a tick" in caplog.text
    with pytest.raises(MemoryError):
        measure_budget(Device(most=0))
