"""dsd-distill MODEL --dry-run: the cost of a distillation, also for an untrained preset."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsd_serve.config import PRESETS
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams
from training.device import Device, choose_device
from training.distillation.distill import add_gradient, new_student
from training.distillation.distill_config import DistillConfig, TeacherSection
from training.distillation.flow_map_loss import BatchMaker
from training.distillation.teacher import Teacher, guidance_of, read_teacher
from training.estimate import Item, Micro, cost_lines
from training.state import State


def untrained_teacher(preset: str, section: TeacherSection) -> Teacher:
    """A network with random weights, which costs as much as a trained one."""
    guidance = guidance_of(section, SamplingParams(guidance_scale=2.0))
    torch.manual_seed(0)
    network = DSD(PRESETS[preset]).requires_grad_(False).eval()
    return Teacher(preset, network, "", SamplingParams(), guidance)


def item_of(config: DistillConfig, teacher: Teacher) -> Item:
    """The rows of one trajectory, and their matrix products: forward, and backward at twice the cost of what is trained
    or once the cost of what is not."""
    network, jumps, loss = teacher.network.config, config.jumps, config.loss
    drawn = config.teacher.steps * (2 if network.num_classes else 1) + (1 if jumps.rolled_out else 0)
    of_images = 2.5  # the end decoded and encoded, half of it encoded again
    trained = jumps.per_trajectory + 2 + (0.5 if loss.encode_weight else 0) + (1 if loss.decode_weight else 0)
    through = (1 if loss.image_weight or loss.feature_weight else 0) + (1 if loss.feature_weight else 0)
    forward = drawn + of_images + (1 if loss.decode_weight else 0)
    return Item(
        "trajectory",
        forward + trained + through,
        (forward + 3 * trained + 2 * through) * network.flops_per_row(),
    )


def micro_batches(
    state: State, forward: Any, config: DistillConfig, where: Device, teacher: Teacher, fast: bool
) -> Micro:
    """Real micro-batches of so many trajectories."""
    maker = BatchMaker(teacher, state.objective.model, fast)

    def micro(number: int, backward: bool) -> None:
        add_gradient(state, forward, config, where, maker, 0, 1.0, number, backward)

    return micro


def dry_run(config: DistillConfig) -> Iterator[str]:
    """The lines of the report, each as soon as it is measured."""
    place = config.run.start_from
    if place in PRESETS and place != "demo" and not Path(place).exists():
        teacher = untrained_teacher(place, config.teacher)
    else:
        teacher = read_teacher(place, config.teacher, torch.device("cpu"))
    where = choose_device(config, teacher.network.config)
    teacher.network.to(where.device)
    state = new_student(config, teacher, where.device)
    forward: Any = torch.compile(state.objective) if where.compiled else state.objective
    yield from cost_lines(
        state,
        config,
        where,
        item_of(config, teacher),
        micro_batches(state, state.objective, config, where, teacher, False),
        micro_batches(state, forward, config, where, teacher, where.compiled),
    )
