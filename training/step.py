"""One optimiser step: learning rate, random numbers, gradients, update of the network and of its EMA copy."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dsd_serve.network import to_images
from training.augmentation import augment
from training.device import Device
from training.loss import Draws
from training.run_config import OptimSection, RunConfig, TrainConfig
from training.state import State

SEED_STREAM = 0x0D5D  # separates the draws of training from other uses of the same seed


def lr_at(step: int, config: OptimSection) -> float:
    """Linear warm-up, then a cosine to lr * lr_final at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ema_decay_at(step: int, config: OptimSection) -> float:
    """Decay of the EMA at a step. It starts low, so that the target encoder soon leaves its random weights."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def generator_for(seed: int, step: int, number: int, device: torch.device) -> torch.Generator:
    """The generator of one micro-batch, a function of its place in the run: checkpoints need no random state."""
    state = np.random.SeedSequence([SEED_STREAM, seed, step, number]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


Batch = tuple[int, int, Tensor, Tensor]  # step, number of the micro-batch, pixels, labels


def train_step(
    state: State, forward: Any, config: TrainConfig, where: Device, batches: Iterator[Batch]
) -> dict[str, Tensor]:
    """One optimiser step over this process's micro-batches.

    Returns the loss and its parts, averaged over them, and grad_norm, that of the whole batch.
    """

    def add(number: int, share: float) -> dict[str, Tensor]:
        batch = next(batches)
        assert batch[:2] == (state.step, number), "the data must come in the order of the steps"
        return add_gradient(state, forward, config, where, batch, share)

    return accumulated_step(state, forward, config, where, add)


def accumulated_step(
    state: State, forward: Any, config: RunConfig, where: Device, add: Callable[[int, float], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """One optimiser step. add: the gradient of a micro-batch, by its number in the step and its share of this process's
    part; the micro-batches go to the processes in turn. Returns as `train_step`.
    """
    per_process = config.optim.batch_size // config.optim.micro_batch_size // where.world
    sums: dict[str, Tensor] = {}
    for turn in range(per_process):
        alone = isinstance(forward, DistributedDataParallel) and turn < per_process - 1
        with forward.no_sync() if alone else contextlib.nullcontext():
            losses = add(where.rank + turn * where.world, 1 / per_process)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value / per_process
    return {**sums, "grad_norm": update(state, config)}


def add_gradient(
    state: State,
    forward: Any,
    config: TrainConfig,
    where: Device,
    batch: Batch,
    share: float,
    backward: bool = True,
) -> dict[str, Tensor]:
    """Forward and backward over one micro-batch, `share` of the step; its loss and parts."""
    step, micro, pixels, labels = batch
    generator = generator_for(config.run.seed, step, micro, where.device)
    images = augment(to_images(pixels.to(where.device, non_blocking=True)), config.data, generator)
    labels = labels.to(where.device, non_blocking=True)
    draws = Draws.make(config.loss, len(images), state.objective.model.config.latent_shape, generator)
    features = None if state.vision is None else state.vision(images)
    with where.computing():
        total, parts = forward(state.ema, images, labels, draws, features)
        if backward:
            (total * share).backward()
    return {name: value.detach() for name, value in {"loss": total, **parts}.items()}


def update(state: State, config: RunConfig) -> Tensor:
    """Step the optimisers and the EMA copy; returns the norm of the gradient before clipping."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(state.step, config.optim)
    norm = torch.nn.utils.clip_grad_norm_(state.objective.parameters(), config.optim.grad_clip)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        weight = 1 - ema_decay_at(state.step, config.optim)
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.objective.model.parameters()), weight)
    finite = torch.isfinite(norm)
    state.finite = finite if state.finite is None else state.finite & finite
    state.step += 1
    return norm
