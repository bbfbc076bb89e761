"""Tasks: what is asked of the network for one result, as plain values.

A task can travel to another process; the program that carries it out, which `program` makes, cannot. A row is a task
too: its result is the row's output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsd_serve import programs
from dsd_serve.config import ModelConfig
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Cost, OnPreview, Program, between
from dsd_serve.rows import Array, Pixels, Row
from dsd_serve.samplers import initial_noise

# on_preview(number of the task in its request, step, pixels)
OnPreviews = Callable[[int, int, Pixels], None]


@dataclass(frozen=True, slots=True)
class Generate:
    """Draw a picture of a class: uint8 [3, H, W]."""

    label: int
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Edit:
    """Redraw a picture, uint8 [3, H, W] of the network's size, towards a class; see `programs.edit`."""

    pixels: Pixels
    label: int
    params: SamplingParams
    strength: float
    mask: Array | None = None  # bool [H, W], True where to draw


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """Encode a picture, uint8 [3, H, W] of the network's size, and decode its latents."""

    pixels: Pixels


@dataclass(frozen=True, slots=True)
class WalkEnd:
    """One end of a walk: a class, and the noise of an image."""

    label: int
    seed: int
    index: int = 0


@dataclass(frozen=True, slots=True)
class Interpolate:
    """Draw the picture at `fraction` of the way between two ends, 0 to 1: uint8 [3, H, W].

    Noises go along the great circle, and the clean estimates of both classes are averaged. The seed and index of
    `params` have no part in it.
    """

    start: WalkEnd
    end: WalkEnd
    fraction: float
    params: SamplingParams

    @property
    def labels(self) -> dict[int, float]:
        """Labels with their weights; at the ends only one of them, which saves the other's rows."""
        start, end = self.start.label, self.end.label
        if start == end or self.fraction in (0, 1):
            return {end if self.fraction == 1 else start: 1.0}
        return {start: 1 - self.fraction, end: self.fraction}


Task = Generate | Edit | Reconstruct | Interpolate | Row


def program(task: Task, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
    """The program that carries a task out. on_preview: of Generate and Edit, see `programs.generate`."""
    if isinstance(task, Generate):
        return programs.generate(config, task.label, task.params, on_preview)
    if isinstance(task, Edit):
        return programs.edit(config, task.pixels, task.label, task.params, task.strength, task.mask, on_preview)
    if isinstance(task, Reconstruct):
        return programs.reconstruct(task.pixels)
    if isinstance(task, Interpolate):
        noises = [initial_noise(end.seed, end.index, config.latent_shape) for end in (task.start, task.end)]
        noise = between(noises[0], noises[1], task.fraction, on_sphere=True)
        return programs.generate(config, task.labels, task.params, noise=noise)
    return programs.row(task)


def cost(task: Task) -> Cost:
    """What the program of a task takes, previews included."""
    if isinstance(task, Generate):
        return programs.cost_of(task.params)
    if isinstance(task, Edit):
        return programs.cost_of(task.params, task.strength)
    if isinstance(task, Interpolate):
        return programs.cost_of(task.params, num_labels=len(task.labels))
    return Cost(2, 2) if isinstance(task, Reconstruct) else Cost(1, 1)


def all_of(
    tasks: Sequence[Task], config: ModelConfig, on_previews: OnPreviews | None = None
) -> list[tuple[Program, Cost]]:
    """Programs and costs of the tasks of one request, as `Batcher.submit_all` takes them."""

    def on_preview(number: int) -> OnPreview | None:
        return None if on_previews is None else lambda step, pixels: on_previews(number, step, pixels)

    return [(program(task, config, on_preview(number)), cost(task)) for number, task in enumerate(tasks)]
