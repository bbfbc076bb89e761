"""Programs and tasks. A program is a generator that yields rows, receives their outputs and returns its result.

Programs are plain maths: no queue, no thread, no engine. `run` is the simple way to run them, the batcher the fast one.
A task is a program before it starts: plain values, which can be sent to another process, with a cost. Rows are tasks
too.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsd_serve.config import LATENT_EPS, ModelConfig
from dsd_serve.errors import InputError
from dsd_serve.flow import add_noise
from dsd_serve.params import SamplingParams, check_sampler
from dsd_serve.rows import Array, Cost, Decode, Encode, Engine, Latents, OnPreview, Pixels, Program, Row
from dsd_serve.samplers import (
    SAMPLERS,
    Denoiser,
    Rows,
    evaluation_times,
    guided,
    initial_noise,
    keeping,
    num_rows,
    timesteps,
)

# on_preview(number of the task in its request, step, pixels)
OnPreviews = Callable[[int, int, Pixels], None]


class Task(Protocol):
    """A unit of work for a backend: plain values with a cost and a program."""

    @property
    def cost(self) -> Cost:
        """Rows and ticks, previews included."""
        ...

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        """The program that computes the result. on_preview: see `generate`; ignored by tasks without previews."""
        ...


def generate(
    config: ModelConfig,
    label: int | Mapping[int, float],
    params: SamplingParams,
    on_preview: OnPreview | None = None,
    noise: Latents | None = None,
) -> Generator[list[Row], list[Array], Pixels]:
    """Draw one image: uint8 [3, H, W].

    label: a class, or several with weights that sum to 1. noise: the initial noise, float32 [L, C], instead of that of
    the seed. on_preview(step, pixels) is called with the decoded clean estimate of every `params.preview_every`-th
    step, counted from 1; its Decode row is in the same tick as the rows of the next evaluation.
    """
    z = initial_noise(params.seed, params.index, config.latent_shape) if noise is None else noise
    check_sampler(params.sampler, config.flow_map)
    denoise = guided({label: 1.0} if isinstance(label, int) else label, params, config.null_label)
    z = yield from sample(z, timesteps(params.num_steps), denoise, params, on_preview)
    (pixels,) = yield [Decode(z)]
    return pixels


def sample(
    z: Latents, ts: list[float], denoise: Denoiser, params: SamplingParams, on_preview: OnPreview | None
) -> Rows:
    if on_preview is not None and params.preview_every:
        denoise = with_previews(denoise, ts, params.preview_every, on_preview)
    return (yield from SAMPLERS[params.sampler](z, ts, denoise))


def with_previews(denoise: Denoiser, ts: list[float], every: int, on_preview: OnPreview) -> Denoiser:
    """`denoise` that also decodes the clean estimate after every `every`-th step, in the tick of its next evaluation.

    It counts the first evaluation at each timestep; the last step gets no preview, because the image itself follows.
    """
    steps = {t: step for step, t in enumerate(ts[:-1], start=1)}
    pending: list[tuple[int, Latents]] = []

    def observed(z_t: Latents, t: float, r: float | None = None) -> Rows:
        inner = denoise(z_t, t, r)
        rows = next(inner)
        shown = [pending.pop()] if pending else []
        outputs = yield rows + [Decode(z_hat) for _, z_hat in shown]
        for (step, _), pixels in zip(shown, outputs[len(rows) :], strict=True):
            on_preview(step, pixels)
        z_hat: Latents
        try:
            inner.send(outputs[: len(rows)])
            raise AssertionError("a denoiser evaluates the network only once")
        except StopIteration as stop:
            z_hat = stop.value
        step = steps.pop(t, 0)
        if step and step % every == 0 and step < len(ts) - 1:
            pending.append((step, z_hat))
        return z_hat

    return observed


def encode(pixels: Pixels) -> Rows:
    """An image, uint8 [3, H, W] of the network's size -> latents float32 [L, C]."""
    (z,) = yield [Encode(pixels)]
    return z


def decode(z: Latents) -> Generator[list[Row], list[Array], Pixels]:
    """Latents float32 [L, C] -> an image, uint8 [3, H, W]."""
    (pixels,) = yield [Decode(z)]
    return pixels


def reconstruct(pixels: Pixels) -> Generator[list[Row], list[Array], Pixels]:
    """Encode an image, uint8 [3, H, W] of the network's size, and decode its latents."""
    z = yield from encode(pixels)
    return (yield from decode(z))


def edit(
    config: ModelConfig,
    pixels: Pixels,
    label: int,
    params: SamplingParams,
    strength: float,
    mask: Array | None = None,
    on_preview: OnPreview | None = None,
) -> Generator[list[Row], list[Array], Pixels]:
    """Add noise to an image and denoise it towards a class (SDEdit, arXiv 2108.01073): uint8 [3, H, W].

    pixels: uint8 [3, H, W] of the network's size. label: a class, or the null label for none. strength: the amount of
    noise in (0, 1], which is also the share of `params.num_steps` that runs; 1 keeps nothing. mask: bool [H, W], True
    where the image is redrawn; the rest of the image keeps its pixels.
    """
    check_sampler(params.sampler, config.flow_map)
    z = yield from encode(pixels)
    ts = edit_timesteps(params.num_steps, strength)
    z_t = add_noise(z, initial_noise(params.seed, params.index, config.latent_shape), np.float32(ts[0]))
    denoise = guided({label: 1.0}, params, config.null_label)
    if mask is not None:
        denoise = keeping(denoise, z, tokens_of(mask, config.patch_size))
    z = yield from sample(z_t, ts, denoise, params, on_preview)
    drawn = yield from decode(z)
    return drawn if mask is None else np.where(mask, drawn, pixels)


def edit_timesteps(num_steps: int, strength: float) -> list[float]:
    if not 0 < strength <= 1:
        raise InputError(f"strength must be above 0 and at most 1, got {strength}")
    return timesteps(math.ceil(num_steps * strength), 1 - strength)


def tokens_of(mask: Array, patch_size: int) -> Array:
    """The tokens that a mask of pixels, bool [H, W], touches: bool [L, 1]."""
    grid = mask.shape[0] // patch_size
    return mask.reshape(grid, patch_size, grid, patch_size).any((1, 3)).reshape(-1, 1)


def sampling_cost(params: SamplingParams, strength: float | None = None, num_labels: int = 1) -> Cost:
    """The cost of `generate`, or with a strength of `edit`; previews included."""
    ts = timesteps(params.num_steps) if strength is None else edit_timesteps(params.num_steps, strength)
    previews = (len(ts) - 2) // params.preview_every if params.preview_every else 0
    codec_rows = 1 if strength is None else 2  # a decode row, and for an edit an encode row
    return Cost(
        num_rows(params, ts, num_labels) + previews + codec_rows,
        len(evaluation_times(params.sampler, ts)) + codec_rows,
    )


def between(start: Latents, end: Latents, fraction: float, *, on_sphere: bool) -> Latents:
    """A point between two noises or two latents [L, C]; at 0 and 1 the ends themselves.

    Noise follows the great circle (slerp), which keeps its norm. Latents follow the straight line and are then
    normalised over the channels of each token, as by the encoder.
    """
    if fraction in (0, 1):
        return end if fraction else start
    if on_sphere:
        a, b = start.astype(np.float64).ravel(), end.astype(np.float64).ravel()
        angle = np.arccos(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
        if angle < 1e-6:
            return start
        mixed = (np.sin((1 - fraction) * angle) * a + np.sin(fraction * angle) * b) / np.sin(angle)
        return mixed.reshape(start.shape).astype(np.float32)
    z = (1 - fraction) * start.astype(np.float64) + fraction * end
    z -= z.mean(-1, keepdims=True)
    return (z / np.sqrt(z.var(-1, keepdims=True) + LATENT_EPS)).astype(np.float32)


def run(engine: Engine, program: Program) -> Any:
    """Run one program alone: the reference for the batcher."""
    return run_all(engine, [program])[0]


def run_all(engine: Engine, programs: Sequence[Program]) -> list[Any]:
    """Run programs in lockstep, all their rows in one call of the engine; returns their results in order."""
    results: dict[int, Any] = {}
    waiting = {number: next(program) for number, program in enumerate(programs)}
    while waiting:
        outputs = iter(engine.run([row for rows in waiting.values() for row in rows]))
        for number, rows in list(waiting.items()):
            try:
                waiting[number] = programs[number].send([next(outputs) for _ in rows])
            except StopIteration as stop:
                results[number] = stop.value
                del waiting[number]
    return [results[number] for number in range(len(programs))]


# Tasks.


@dataclass(frozen=True, slots=True)
class Generate:
    """Draw an image of a class: uint8 [3, H, W]."""

    label: int
    params: SamplingParams

    @property
    def cost(self) -> Cost:
        return sampling_cost(self.params)

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        return generate(config, self.label, self.params, on_preview)


@dataclass(frozen=True, slots=True)
class Edit:
    """Redraw an image, uint8 [3, H, W] of the network's size, towards a class; see `edit`."""

    pixels: Pixels
    label: int
    params: SamplingParams
    strength: float
    mask: Array | None = None  # bool [H, W], True where to redraw

    @property
    def cost(self) -> Cost:
        return sampling_cost(self.params, self.strength)

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        return edit(config, self.pixels, self.label, self.params, self.strength, self.mask, on_preview)


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """Encode an image, uint8 [3, H, W] of the network's size, and decode its latents."""

    pixels: Pixels

    @property
    def cost(self) -> Cost:
        return Cost(2, 2)

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        return reconstruct(self.pixels)


def walk_fractions(n: int) -> list[float]:
    """The fractions of the n >= 2 images of a walk: 0 is its start, 1 its end."""
    return [i / (n - 1) for i in range(n)]


@dataclass(frozen=True, slots=True)
class WalkEnd:
    """One end of a walk: a class, and the noise of an image."""

    label: int
    seed: int
    index: int = 0


@dataclass(frozen=True, slots=True)
class Interpolate:
    """Draw the image at `fraction` of the way between two ends, 0 to 1: uint8 [3, H, W].

    The noise follows the great circle, and the clean estimates of both classes are averaged. The seed and index of
    `params` are not used.
    """

    start: WalkEnd
    end: WalkEnd
    fraction: float
    params: SamplingParams

    @property
    def labels(self) -> dict[int, float]:
        """Labels with their weights; only one at either end, to save the rows of the other."""
        start, end = self.start.label, self.end.label
        if start == end or self.fraction in (0, 1):
            return {end if self.fraction == 1 else start: 1.0}
        return {start: 1 - self.fraction, end: self.fraction}

    @property
    def cost(self) -> Cost:
        return sampling_cost(self.params, num_labels=len(self.labels))

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        noises = [initial_noise(end.seed, end.index, config.latent_shape) for end in (self.start, self.end)]
        noise = between(noises[0], noises[1], self.fraction, on_sphere=True)
        return generate(config, self.labels, self.params, noise=noise)
