from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd_serve.params import SamplingParams
from dsd_serve.rows import Denoise
from dsd_serve.samplers import SAMPLERS, guided, initial_noise, timesteps

MEAN, SPREAD = 0.7, 0.5


def z_hat_of_gaussian(z_t, t, r=None):
    """E[z | z_t] in closed form, for z ~ normal(MEAN, SPREAD^2); with r the clean estimate of the exact flow map."""
    if r is not None:
        z_r = exact((z_t - t * MEAN) / spread(t), r)
        return z_t + (1 - t) / (r - t) * (z_r - z_t)
    return MEAN + t * SPREAD**2 / spread(t) ** 2 * (z_t - t * MEAN)


def spread(t):
    """The standard deviation of z_t."""
    return np.sqrt(t**2 * SPREAD**2 + (1 - t) ** 2)


def exact(noise, t):
    """The exact solution of the flow at time t that starts at `noise`."""
    return t * MEAN + spread(t) * noise


def solve(name, num_steps, noise, start=0.0, end=1.0):
    """Run a sampler on the closed-form denoiser in float64; returns the end and the times of the evaluations."""
    evaluations = []
    ts = [start + (end - start) * i / num_steps for i in range(num_steps)] + [end]

    def denoise(z_t, t, r=None):
        evaluations.append(t)
        (answer,) = yield [(z_t, t, r)]
        return answer

    program = SAMPLERS[name](exact(noise, start), ts, denoise)
    rows = next(program)
    while True:
        try:
            rows = program.send([z_hat_of_gaussian(*row) for row in rows])
        except StopIteration as stop:
            return stop.value, evaluations


def measured_order(name, start, end):
    """The slope of log error against log steps, and the errors."""
    noise = np.linspace(-2, 2, 9).reshape(3, 3)
    counts = np.array([40, 80, 160, 320, 640])
    errors = [np.abs(solve(name, n, noise, start, end)[0] - exact(noise, end)).max() for n in counts]
    print(f"{name} from {start} to {end}: errors {errors}")
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_against_the_closed_form(name, order):
    slope = measured_order(name, 0.1, 0.9)
    print(f"slope {slope:.3f}")
    assert abs(slope - order) < 0.05


@pytest.mark.parametrize(("name", "least"), [("euler", 0.95), ("heun", 1.95), ("dpmpp_2m", 1.7)])
def test_order_over_the_whole_range(name, least):
    """dpmpp_2m loses a factor log(num_steps) at the ends, where lambda is infinite."""
    slope = measured_order(name, 0.0, 1.0)
    print(f"slope {slope:.3f}")
    assert slope > least


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 10), ("heun", 19), ("dpmpp_2m", 10), ("flow_map", 10)])
def test_number_of_evaluations_and_t_below_one(name, evaluations):
    _, times = solve(name, 10, np.zeros((1, 1)))
    assert len(times) == evaluations
    assert max(times) < 1


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_flow_map_is_exact_in_any_number_of_steps(num_steps):
    noise = np.linspace(-2, 2, 9)
    for start in (0.0, 0.4):
        end, _ = solve("flow_map", num_steps, noise, start)
        np.testing.assert_allclose(end, exact(noise, 1.0))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"flow_map"}))
def test_one_step_lands_on_the_clean_estimate(name):
    end, _ = solve(name, 1, np.ones((1, 1)))
    np.testing.assert_allclose(end, z_hat_of_gaussian(np.ones((1, 1)), 0.0))


@given(num_steps=st.integers(1, 300), start=st.floats(0, 0.99))
def test_timesteps_rise_from_start_to_one(num_steps, start):
    ts = timesteps(num_steps, start)
    assert len(ts) == num_steps + 1
    assert ts[0] == start
    assert ts[-1] == 1
    assert all(a < b for a, b in pairwise(ts))


def test_guidance():
    """Of a flow map both rows jump to the same time."""
    z_t, cond, null = np.zeros((2, 2), np.float32), np.full((2, 2), 3, np.float32), np.full((2, 2), 1, np.float32)
    program = guided({5: 1.0}, SamplingParams(guidance_scale=2.0), 1000)(z_t, 0.25, 0.5)
    rows = next(program)
    assert [(row.t, row.label, row.r) for row in rows] == [(0.25, 5, 0.5), (0.25, 1000, 0.5)]
    with pytest.raises(StopIteration) as stop:
        program.send([cond, null])
    assert stop.value.value.tolist() == [[5, 5], [5, 5]]
    assert [type(row) for row in next(guided({5: 1.0}, SamplingParams(), 1000)(z_t, 0.5))] == [Denoise]


def test_noise_depends_on_seed_and_index_alone():
    a, b = initial_noise(3, 0, (16, 16)), initial_noise(3, 1, (16, 16))
    assert np.array_equal(a, initial_noise(3, 0, (16, 16)))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.2
    assert a.dtype == np.float32
    many = np.stack([initial_noise(seed, 0, (64,)) for seed in range(500)])
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
