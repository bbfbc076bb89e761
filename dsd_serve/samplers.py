"""Samplers of the flow dz/dt = velocity from t = 0 to t = 1, each a short generator.

A sampler takes noise z [L, C], increasing timesteps that begin anywhere below 1 and end at 1, and `denoise`, a
`Denoiser`. It never calls a network: it yields the rows that `denoise` yields, and receives their outputs.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from dsd_serve.flow import jump, velocity
from dsd_serve.params import SamplingParams
from dsd_serve.rows import Array, Denoise, Latents, Row

Rows = Generator[list[Row], list[Array], Latents]


class Denoiser(Protocol):
    """A generator function for the clean estimate z_hat of z_t at time t; of a flow map also for the jump to time r."""

    def __call__(self, z_t: Latents, t: float, r: float | None = None, /) -> Rows: ...


def timesteps(num_steps: int, start: float = 0.0) -> list[float]:
    """num_steps + 1 evenly spaced times from `start` to 1."""
    return [start + (1 - start) * i / num_steps for i in range(num_steps)] + [1.0]


def initial_noise(seed: int, index: int, shape: tuple[int, ...]) -> Latents:
    """Standard normal noise, float32 of `shape`, that depends on the seed and the index alone (counter-based Philox).

    seed, index: 0 to 2^63 - 1.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, index]))
    return generator.standard_normal(shape, dtype=np.float32)


def guided(labels: Mapping[int, float], params: SamplingParams, null_label: int) -> Denoiser:
    """Clean estimates with classifier-free guidance (arXiv 2207.12598), all rows of an evaluation in the same tick.

    labels: label -> weight, weights summing to 1; the estimates of several labels are averaged. Guidance adds the row
    without a class, and only where `params` has it on.
    """

    def denoise(z_t: Latents, t: float, r: float | None = None) -> Rows:
        rows: list[Row] = [Denoise(z_t, t, label, r) for label in labels]
        is_guided = params.is_guided(t)
        if is_guided:
            rows.append(Denoise(z_t, t, null_label, r))
        outputs = yield rows
        z_hat = average(outputs[: len(labels)], list(labels.values()))
        if not is_guided:
            return z_hat
        z_null = outputs[-1]
        return z_null + np.float32(params.guidance_scale) * (z_hat - z_null)

    return denoise


def average(estimates: Sequence[Latents], weights: Sequence[float]) -> Latents:
    if len(estimates) == 1:
        return estimates[0]
    total = np.zeros_like(estimates[0])
    for estimate, weight in zip(estimates, weights, strict=True):
        total += np.float32(weight) * estimate
    return total


def keeping(denoise: Denoiser, z: Latents, drawn: Array) -> Denoiser:
    """`denoise` that draws only the tokens of `drawn`, bool [L, 1]; the others stay those of z.

    A clean estimate of z gives the velocity z - noise, so known tokens stay on the straight path from their own noise.
    """

    def inpainted(z_t: Latents, t: float, r: float | None = None) -> Rows:
        z_hat = yield from denoise(z_t, t, r)
        return np.where(drawn, z_hat, z)

    return inpainted


def evaluation_times(sampler: str, ts: list[float]) -> list[float]:
    """The times at which a sampler evaluates the network; heun does so twice a step, except in the last."""
    return [*ts[:-1], *(ts[1:-1] if sampler == "heun" else [])]


def num_rows(params: SamplingParams, ts: list[float], num_labels: int = 1) -> int:
    """Denoise rows needed to sample over the timesteps `ts`."""
    return sum(num_labels + params.is_guided(t) for t in evaluation_times(params.sampler, ts))


def euler(z: Latents, ts: list[float], denoise: Denoiser) -> Rows:
    """First order, one evaluation per step.

    z: noise [L, C]. ts: increasing times, from below 1 to 1. Returns latents [L, C]. So do the other samplers.
    """
    for t, t_next in pairwise(ts):
        z_hat = yield from denoise(z, t)
        z = jump(z_hat, z, t, t_next)
    return z


def flow_map(z: Latents, ts: list[float], denoise: Denoiser) -> Rows:
    """The jumps of a model with a flow map (arXiv 2510.24474), one evaluation per step; for few steps."""
    for t, t_next in pairwise(ts):
        z_hat = yield from denoise(z, t, t_next)
        z = jump(z_hat, z, t, t_next)
    return z


def heun(z: Latents, ts: list[float], denoise: Denoiser) -> Rows:
    """Second order, two evaluations per step; the last step is Euler's, because t = 1 is never evaluated."""
    for t, t_next in pairwise(ts):
        v = velocity((yield from denoise(z, t)), z, t)
        z_next = z + (t_next - t) * v
        if t_next < 1:
            v_next = velocity((yield from denoise(z_next, t_next)), z_next, t_next)
            z_next = z + (t_next - t) * (v + v_next) / 2
        z = z_next
    return z


def dpmpp_2m(z: Latents, ts: list[float], denoise: Denoiser) -> Rows:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) with alpha = t, sigma = 1 - t: second order, one evaluation.

    The first step is first order, the last, and from noise also the second, because lambda = log(alpha / sigma) is
    infinite at t = 0 and t = 1. There, steps in lambda remain large for any num_steps, which costs a factor
    log(num_steps) in the error over the whole range.
    """
    previous: tuple[float, Latents] | None = None
    for t, t_next in pairwise(ts):
        z_hat = yield from denoise(z, t)
        estimate = z_hat
        if previous is not None and previous[0] > 0 and t_next < 1:
            r = (half_log_snr(t) - half_log_snr(previous[0])) / (half_log_snr(t_next) - half_log_snr(t))
            estimate = z_hat + (z_hat - previous[1]) / np.float32(2 * r)
        z = jump(estimate, z, t, t_next)  # the exact step of the linear part, for alpha = t
        previous = t, z_hat
    return z


def half_log_snr(t: float) -> float:
    """lambda, half the log signal-to-noise ratio."""
    return math.log(t / (1 - t))


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "flow_map": flow_map}
