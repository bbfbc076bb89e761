"""The configuration of a distillation: the sections of a run, and those of its own.

All values are our choice; docs/distillation.md says what was tried.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from dsd_serve.errors import ConfigError
from dsd_serve.params import MAX_GUIDANCE
from training.config_file import Section, read_config
from training.run_config import OptimSection, RunConfig, RunSection, Share

Scale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
MAX_TEACHER_STEPS = 100


class TeacherSection(Section):
    """The teacher's sampling: dpmpp_2m, with randomly shifted times in every trajectory."""

    guidance: Scale | None = None  # left out, as the next two: what the model recommends
    guidance_start: Share | None = None  # time from which guidance is on; 0 is noise, 1 is data
    guidance_stop: Share | None = None  # time until which it is on
    steps: Annotated[int, Field(ge=2, le=MAX_TEACHER_STEPS)] = 8  # of a trajectory


class JumpSection(Section):
    """Which jumps (t, r) the student learns on the trajectories, times being those of their points."""

    per_trajectory: PositiveInt = 6  # pairs of points t < r
    from_noise: Share = 0.25  # share of the jumps that are made to begin at t = 0
    rolled_out: Share = 0.5  # share of the jumps to r = 1 that begin where a jump of the student ended
    class_dropout: Share = 0.1  # share of trajectories without a class, and so without guidance


class DistillLossSection(Section):
    """The parts of the loss."""

    jump_weight: NonNegativeFloat = 1.0  # squared error of the clean estimate of a jump
    end_weight: NonNegativeFloat = 1.0  # the same for jumps to r = 1
    flow_weight: NonNegativeFloat = 1.0  # the same at r = t, for other samplers, edits and the null label
    image_weight: NonNegativeFloat = 1.0  # jumps to r = 1, decoded by the teacher: l1 of pixels, and of a pyramid
    feature_weight: NonNegativeFloat = 0.5  # the same images, encoded by the teacher: cosine distance of hidden states
    encode_weight: NonNegativeFloat = 2.0  # squared error of latents, so that the student encodes as its teacher
    decode_weight: NonNegativeFloat = 8.0  # l1 of images, so that it decodes as its teacher


class DistillOptimSection(OptimSection):
    """As in training. Batches are of trajectories; a student that starts as its teacher needs no long warm-up and no
    weight decay."""

    steps: PositiveInt = 2000
    batch_size: PositiveInt = 32
    micro_batch_size: PositiveInt = 32
    warmup_steps: int = 50
    weight_decay: float = 0.0
    ema_decay: Share = 0.99


class DistillRunSection(RunSection):
    """The run. start_from: the teacher, from the command line; a model directory or a checkpoint."""

    held_out_seeds: PositiveInt = 128  # images whose latents are compared with the teacher's at every evaluation
    sample_steps: Annotated[int, Field(ge=1, le=MAX_TEACHER_STEPS)] = 2  # of samples, and as the recommendation


class DistillConfig(RunConfig):
    teacher: TeacherSection = TeacherSection()
    jumps: JumpSection = JumpSection()
    optim: DistillOptimSection = DistillOptimSection()
    loss: DistillLossSection = DistillLossSection()
    run: DistillRunSection = DistillRunSection()

    @model_validator(mode="after")
    def learns_jumps(self) -> Self:
        if not (self.loss.jump_weight or self.loss.end_weight):
            raise ConfigError("loss.jump_weight or loss.end_weight must be above 0: otherwise no jump is learnt")
        return self


def load_distill_config(path: Path | None, overrides: Sequence[str], folder: str) -> DistillConfig:
    """Read a TOML file, or the defaults, and apply overrides. folder: run.dir unless they name it."""
    return read_config(DistillConfig, path, overrides, folder)
