"""The serving benchmark: its load, its arithmetic, and a short run against the real server."""

import math
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from benchmarks.serving.__main__ import highest_sustained
from benchmarks.serving.contestants import BenchError, Contestant, Running
from benchmarks.serving.load import Outcome, percentile, rate_of, summarise
from benchmarks.serving.scaling import capacity, simulate
from benchmarks.serving.simulated_engine import SimulatedEngine
from benchmarks.serving.tables import replace_section
from benchmarks.serving.workload import arrivals, program, requests
from dsd_serve.backends.row_budget import measure_budget
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.programs import reconstruct, run, run_all
from dsd_serve.rows import Decode, Denoise, Encode
from tests.support.data import ROOT, sample_image

CLASSES = (1, 207, 950)


@pytest.fixture(scope="module")
def config(demo_dir):
    return read_model_dir(demo_dir).config


def test_the_simulated_engine_takes_its_time_and_outputs_depend_on_their_row_alone(config):
    engine = SimulatedEngine(config, step_seconds=0.02, flat_rows=4)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((8, *config.latent_shape), dtype=np.float32)
    rows = [Denoise(z[i], i / 8, i) for i in range(6)] + [Decode(z[6]), Encode(sample_image(1, 0, config.image_size))]
    for count, seconds in ((1, 0.02), (4, 0.02), (8, 0.04)):
        began = time.perf_counter()
        outputs = engine.run(rows[:count])
        assert seconds <= time.perf_counter() - began < 2.5 * seconds
    assert [o.shape for o in outputs] == [config.latent_shape] * 6 + [config.pixel_shape, config.latent_shape]
    assert [o.dtype for o in outputs] == [np.float32] * 6 + [np.uint8, np.float32]
    for row, output in zip(rows, outputs, strict=True):
        assert np.array_equal(engine.run([row])[0], output)
    assert len({output.tobytes() for output in outputs[:6]}) == 6


def test_the_row_budget_of_the_simulated_engine_is_its_flat_range(config):
    assert measure_budget(SimulatedEngine(config, step_seconds=0.02, flat_rows=8))[0].size == 8


def test_programs_run_on_the_simulated_engine_alone_and_together(config):
    engine = SimulatedEngine(config, step_seconds=0.0)
    bodies = list(islice(requests(config.trained_classes), 12))
    together = run_all(engine, [program(config, body) for body in bodies])
    for body, drawn in zip(bodies, together, strict=True):
        assert np.array_equal(run(engine, program(config, body)), drawn)
    assert len({drawn.tobytes() for drawn in together}) == 12
    assert run(engine, reconstruct(sample_image(1, 0, config.image_size))).shape == config.pixel_shape


def test_requests_are_seeded_and_have_their_mix():
    bodies = list(islice(requests(CLASSES, seed=4), 600))
    assert bodies == list(islice(requests(CLASSES, seed=4), 600))
    assert bodies != list(islice(requests(CLASSES, seed=5), 600))
    assert Counter(body["steps"] for body in bodies) == {10: 200, 25: 200, 50: 200}
    assert Counter(body["guidance"] for body in bodies) == {3.0: 180, 1.0: 420}
    assert len({body["seed"] for body in bodies}) == 600


def test_arrivals_are_a_seeded_poisson_process_of_the_rate():
    due = arrivals(50, 100, CLASSES, seed=1)
    assert due == arrivals(50, 100, CLASSES, seed=1)
    times = np.array([arrival.at for arrival in due])
    assert len(due) == 5000
    gaps = np.diff(times)
    assert (gaps >= 0).all()
    # Gaps of a Poisson process are exponential: mean and deviation are equal, and e^-1 of them exceed the mean.
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert np.mean(gaps > 1 / 50) == pytest.approx(math.exp(-1), abs=0.02)
    counts = np.bincount(times.astype(int))
    assert np.var(counts) / np.mean(counts) == pytest.approx(1, abs=0.4)
    # Every contestant gets the same requests at any rate, sooner or later.
    assert [a.body for a in due][:100] == [a.body for a in arrivals(5, 20, CLASSES, seed=1)]


def test_percentiles_are_values_that_occurred_and_may_be_infinite():
    values = [*range(1, 100), math.inf]
    assert [percentile(values, p) for p in (50, 95, 99, 100)] == [50, 95, 99, math.inf]
    assert math.isnan(percentile([], 50))


def test_a_summary_counts_what_was_due_after_the_warmup_and_what_was_lost():
    served = [Outcome(at / 10, 10 if at % 2 else 50, 200, 0.1 if at % 2 else 0.5) for at in range(110)]
    summary = summarise(served, warmup=1.0, seconds=10.0)
    assert (summary.offered, summary.completed, summary.lost) == (100, 100, 0)
    assert (summary.short_p95, summary.p95) == (0.1, 0.5)
    assert summary.throughput == pytest.approx(10, rel=0.05)
    assert summary.sustained
    lost = [Outcome(o.at, o.steps, *((429, math.inf) if i % 10 == 0 else (o.status, o.latency))) for i, o in
            enumerate(served)]  # fmt: skip
    summary = summarise(lost, warmup=1.0, seconds=10.0)
    assert (summary.refused, summary.unfinished, summary.p95) == (10, 0, math.inf)
    assert not summary.sustained
    slower = [Outcome(o.at, o.steps, 200, o.at) for o in served]
    assert not summarise(slower, warmup=1.0, seconds=10.0).sustained


def test_the_rate_is_right_for_a_stream_and_for_bursts():
    assert rate_of([i / 40 for i in range(480)], 12) == pytest.approx(40, rel=0.01)
    for phase in np.arange(0, 1.6, 0.1):
        times = [phase + second * 1.6 + i / 1000 for second in range(8) for i in range(64)]
        assert rate_of([t for t in times if t < 12], 12) == pytest.approx(64 / 1.6, rel=0.04)
    assert rate_of([], 12) == 0.0


def test_the_search_finds_the_highest_sustained_load():
    tried = []

    def sustained(fraction):
        tried.append(fraction)
        return fraction <= 0.71

    known = {0.5: True, 0.8: False}
    assert 0.66 <= highest_sustained(sustained, known, ceiling=1.1) <= 0.71
    assert all(0.5 < fraction < 0.8 for fraction in tried)
    assert len(tried) <= 3
    assert highest_sustained(sustained, {0.5: False}, ceiling=0.04) == 0.0


def test_a_section_is_replaced_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "docs" / "benchmarks.md"
    replace_section(path, "real", "one")
    replace_section(path, "simulated", "two")
    path.write_text("# Title\n\n" + path.read_text() + "The end.\n")
    replace_section(path, "real", "three")
    text = path.read_text()
    assert text.startswith("# Title\n") and text.endswith("The end.\n")
    assert "three" in text and "two" in text and "one" not in text


@pytest.mark.slow
def test_our_server_on_the_simulated_engine_answers_all_of_a_short_run(demo_dir):
    with Running(Contestant("ours", "ours", 8), demo_dir, True, CLASSES) as running:
        summary = running.poisson(12, seconds=1.5, warmup=0.5)
        assert running.row_budget() == 32
        alone = running.measure("single", 0.1, 0.0)
        busy = running.measure("closed", 1.0, 0.5, clients=32)
    assert (summary.completed, summary.refused, summary.unfinished) == (summary.offered, 0, 0)
    assert summary.offered >= 10
    # Ten steps and the decoding, of 20 ms each, at any load; waiting for a tick and HTTP are added.
    assert 0.2 <= summary.short_p50 < 0.5
    assert 0.5 <= alone["p50"] < 0.8
    assert 3 / alone["p50"] < busy["rate"] < 60  # at most the rate of the engine
    assert running.process.poll() is not None


def test_a_server_that_does_not_start_gets_a_sentence(tmp_path):
    with pytest.raises(BenchError, match="ours did not start") as error:
        Running(Contestant("ours", "ours", 8), tmp_path, True, CLASSES)
    assert "config.json" in str(error.value)


def test_wrong_flags_get_a_sentence():
    for flags, words in (
        (["--contestants", "diffusers"], "name at least one server too"),
        (["--seconds", "0"], "--seconds must be 1 or more"),
        (["--loads", "0"], "--loads must be above 0"),
    ):
        command = [sys.executable, "-m", "benchmarks.serving", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert words in done.stderr


def test_the_simulation_of_many_devices_agrees_with_arithmetic():
    one = capacity(0.02, 32)
    quiet = simulate(1, 0.2 * one, 0.02, 32, seconds=40)
    # Alone, a request takes a call for each step and one for its image, and waits for the call that runs.
    assert 10.99 * 0.02 <= quiet.short.min() <= np.percentile(quiet.short, 95) <= 12.1 * 0.02
    full = simulate(1, 1.5 * one, 0.02, 32, seconds=60)
    assert 0.9 * one < full.rate < 1.02 * one
    assert full.rows > 28
    assert np.median(full.latencies) > 3 * np.median(quiet.latencies)
    two = simulate(2, 1.5 * one, 0.02, 32, seconds=60)
    assert two.rate == pytest.approx(1.5 * one, rel=0.05)
