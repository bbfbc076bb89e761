"""Programs: what a request does, as a generator that yields rows and is sent their outputs.

Programs are plain maths: no queue, no thread, no engine. `run` is the obvious way to run them; batcher.py the fast one.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

from dsd_serve.config import ModelConfig
from dsd_serve.params import SamplingParams
from dsd_serve.rows import Array, Decode, Encode, Latents, Pixels, Row
from dsd_serve.samplers import SAMPLERS, Denoiser, Rows, guided, initial_noise, timesteps

Program = Generator[list[Row], list[Array], Any]
OnPreview = Callable[[int, Pixels], None]


class RunsRows(Protocol):
    """The part of an engine that programs need."""

    def run(self, rows: Sequence[Row]) -> list[Array]: ...


def generate(
    config: ModelConfig, label: int, params: SamplingParams, on_preview: OnPreview | None = None
) -> Generator[list[Row], list[Array], Pixels]:
    """Draw one picture of a class: uint8 [3, H, W].

    on_preview(step, pixels) is called with the decoded clean estimate of every `params.preview_every`-th step, counted
    from 1; its Decode row rides along with the rows of the evaluation that follows.
    """
    z = initial_noise(params.seed, params.index, config.latent_shape)
    denoise = guided(label, params.guidance_scale, config.null_label)
    ts = timesteps(params.num_steps)
    if on_preview is not None and params.preview_every:
        denoise = with_previews(denoise, ts, params.preview_every, on_preview)
    z = yield from SAMPLERS[params.sampler](z, ts, denoise)
    (pixels,) = yield [Decode(z)]
    return pixels


def with_previews(denoise: Denoiser, ts: list[float], every: int, on_preview: OnPreview) -> Denoiser:
    """`denoise` that also decodes the clean estimate after every `every`-th step, in the tick of its next evaluation.

    It counts the first evaluation at each timestep; the last step gets no preview, because the picture itself follows.
    """
    steps = {t: step for step, t in enumerate(ts[:-1], start=1)}
    pending: list[tuple[int, Latents]] = []

    def observed(z_t: Latents, t: float) -> Rows:
        inner = denoise(z_t, t)
        rows = next(inner)
        shown = [pending.pop()] if pending else []
        outputs = yield rows + [Decode(z_hat) for _, z_hat in shown]
        for (step, _), pixels in zip(shown, outputs[len(rows) :], strict=True):
            on_preview(step, pixels)
        z_hat: Latents
        try:
            inner.send(outputs[: len(rows)])
            raise AssertionError("a denoiser evaluates the network once")
        except StopIteration as stop:
            z_hat = stop.value
        step = steps.pop(t, 0)
        if step and step % every == 0 and step < len(ts) - 1:
            pending.append((step, z_hat))
        return z_hat

    return observed


def reconstruct(pixels: Pixels) -> Generator[list[Row], list[Array], Pixels]:
    """Encode a picture, uint8 [3, H, W] of the network's size, and decode its latents."""
    (z,) = yield [Encode(pixels)]
    (decoded,) = yield [Decode(z)]
    return decoded


def run(engine: RunsRows, program: Program) -> Any:
    """Run one program to its end, alone: the reference that the batcher must agree with."""
    return run_all(engine, [program])[0]


def run_all(engine: RunsRows, programs: Sequence[Program]) -> list[Any]:
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
