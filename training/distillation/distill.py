"""The run of a distillation: its state, its steps, and the model that comes out.

A step is a function of its number and the seed, so that a stopped run goes on bit-exactly on a CPU, with any number of
processes: nothing but the networks and optimisers needs to be saved.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_serve.checkpoint import read_checkpoint
from dsd_serve.errors import CheckpointError
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams, to_config
from training.device import Device, agree_on_step, choose_device, distributed
from training.distillation.distill_config import DistillConfig
from training.distillation.flow_map_loss import BatchMaker, FlowMapObjective
from training.distillation.held_out_seeds import HeldOutSeeds
from training.distillation.teacher import Teacher, read_teacher
from training.journal import Journal
from training.loop import Work, leave_group, remove_unfinished, run_loop
from training.state import State, freeze, new_optimizers, restore, save
from training.step import accumulated_step, generator_for

log = logging.getLogger(__name__)


def new_student(config: DistillConfig, teacher: Teacher, device: torch.device) -> State:
    """The state before the first step: the student is the teacher, with r as a further input.

    Raises ConfigError for a teacher that is too shallow for that.
    """
    model = DSD(replace(teacher.network.config, flow_map=True)).to(device)
    model.load_state_dict(teacher.network.state_dict())
    objective = FlowMapObjective(model, teacher.network, config.loss)
    freeze(model, config.optim.frozen)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    return State(objective, ema, *new_optimizers(objective, config.optim))


def recommended(config: DistillConfig, teacher: Teacher) -> SamplingParams:
    """The sampling settings that the student will recommend."""
    steps = config.run.sample_steps
    own = replace(teacher.defaults, sampler="flow_map", num_steps=steps)
    return replace(own, guidance_scale=1.0, guidance_start=0.0, guidance_stop=1.0)


def record(config: DistillConfig, teacher: Teacher) -> dict[str, Any]:
    """Values stored with the state: recommended settings for the export, and the identity of the teacher."""
    return {"sampling": to_config(recommended(config, teacher)), "distilled": identity(teacher)}


def identity(teacher: Teacher) -> dict[str, Any]:
    """Its name, and the values that must be the same when a run resumes."""
    return {
        "name": teacher.name,
        "fingerprint": teacher.fingerprint,
        "guidance": teacher.guidance.scale,
        "guidance_start": teacher.guidance.start,
        "guidance_stop": teacher.guidance.stop,
    }


def check_same_teacher(path: Path, teacher: Teacher) -> None:
    """Raises CheckpointError if a checkpoint is not of a distillation of this teacher."""
    stored = read_checkpoint(path).get("distilled")
    if stored is None:
        raise CheckpointError(f"{path} is a checkpoint of dsd-train; use another run.dir")
    for name, ours in identity(teacher).items():
        if name != "name" and stored[name] != ours:
            raise CheckpointError(
                f"{path} was distilled from {stored['name']} with {name} {stored[name]}, this teacher has {ours}; use "
                "another run.dir or the same teacher"
            )


def distill_step(
    state: State, forward: Any, config: DistillConfig, where: Device, maker: BatchMaker
) -> dict[str, Tensor]:
    """One optimiser step over this process's micro-batches; returns as `train_step`."""
    return accumulated_step(
        state,
        forward,
        config,
        where,
        lambda number, share: add_gradient(state, forward, config, where, maker, number, share),
    )


def add_gradient(
    state: State,
    forward: Any,
    config: DistillConfig,
    where: Device,
    maker: BatchMaker,
    number: int,
    share: float,
    batch: int | None = None,
    backward: bool = True,
) -> dict[str, Tensor]:
    """Forward and backward over one micro-batch, `share` of the step; its loss and parts. batch: trajectories, if not
    as configured."""
    generator = generator_for(config.run.seed, state.step, number, where.device)
    with where.computing():
        rows = maker.make(batch or config.optim.micro_batch_size, config.teacher.steps, config.jumps, generator)
        total, parts = forward(rows)
        if backward:
            (total * share).backward()
    return {name: value.detach() for name, value in {"loss": total, **parts}.items()}


def announce(state: State, config: DistillConfig, where: Device, teacher: Teacher) -> None:
    number = sum(p.numel() for p in state.ema.parameters()) / 1e6
    log.info(
        "%s: from %s, %s; %.1fM parameters on %s, %s%s; %s",
        config.run.dir,
        teacher.name,
        teacher.guidance,
        number,
        where.device,
        "bf16" if where.bf16 else "fp32",
        ", compiled" if where.compiled else "",
        f"resumes after step {state.step}" if state.step else "starts",
    )


def distill(config: DistillConfig) -> tuple[State, Path, bool]:
    """Distil run.start_from. Returns the state, its checkpoint, and whether a signal stopped the run early.

    Raises DSDError.
    """
    teacher = read_teacher(config.run.start_from, config.teacher, torch.device("cpu"))
    where = choose_device(config, teacher.network.config)
    teacher.network.to(where.device)
    first, folder = where.rank == 0, Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        remove_unfinished(folder)
    state, checkpoint = new_student(config, teacher, where.device), folder / "checkpoint.pt"
    if checkpoint.exists():
        check_same_teacher(checkpoint, teacher)
        restore(state, checkpoint)
    agree_on_step(state.step, where)
    if first:
        announce(state, config, where, teacher)
    forward = distributed(state.objective, where)
    maker = BatchMaker(teacher, state.objective.model, where.compiled)
    journal = Journal(folder, first, state.step)
    held = HeldOutSeeds(teacher, config, where) if first else None

    def evaluate(bar: Any) -> None:
        assert held is not None
        numbers = held.measure(state.ema)
        journal.write(state.step, numbers)
        bar.write(described(state.step, numbers))
        held.write_images(folder / f"samples-{state.step:07d}.png", state.ema)

    work = Work(
        step=lambda: distill_step(state, forward, config, where, maker),
        evaluate=evaluate,
        save=lambda: save(state, config, checkpoint, **record(config, teacher)),
        rate="trajectories_per_second",
    )
    stopped = run_loop(state, config, where, journal, checkpoint, work)
    leave_group(where)
    return state, checkpoint, stopped


def described(step: int, numbers: Mapping[str, float]) -> str:
    return f"step {step}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
