"""dsd-train CONFIG --dry-run: what a run will cost, before there is any data.

Counted: parameters and floating-point operations. Measured on this device, with random images: the memory that the
backward pass keeps, the time of real micro-batches and of a real update. Derived: the time of the whole run here, and
on an H100 under assumptions that are printed with it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsd_serve.config import ModelConfig
from training.device import Device, choose_device
from training.loss import Objective
from training.run_config import LossSection, OptimSection, TrainConfig
from training.state import State, new_state
from training.step import Batch, add_gradient, update

H100_PEAK = 989e12  # dense bf16 FLOP/s of an H100 SXM, by its data sheet
H100_SHARE = 0.35  # of the peak that we assume is reached: our guess for a network of this size, compiled
H100_BYTES = 80e9
SLOW = 20.0  # seconds: a micro-batch that takes longer is timed once


@dataclass
class Speed:
    """What was measured: images in a micro-batch, seconds for it, seconds for an update of all weights."""

    images: int
    micro_seconds: float
    update_seconds: float

    def step_seconds(self, optim: OptimSection) -> float:
        """Of one optimiser step on one device of this kind."""
        return self.micro_seconds * optim.batch_size / self.images + self.update_seconds


def rows_per_image(loss: LossSection) -> int:
    """Rows that one image sends through the trunk in a step: two encodings, K draws, one decoding."""
    return loss.num_draws + 3


def flops_per_image(network: ModelConfig, loss: LossSection, objective: Objective | None = None) -> float:
    """Matrix products of a training step over its images: forward and, at twice the cost, backward.

    The target encoder has no backward. Of `objective` the heads are counted; LPIPS and a vision model never are.
    """
    tokens, width = network.latent_shape[0], network.hidden_size
    denoise = network.flops_per_row()
    border = 2 * tokens * width * (3 * network.patch_size**2 - network.latent_dim)  # pixels on one side, not latents
    conditioning = 2 * (256 * width + width * width)  # of t, which only denoise rows have
    pixels = denoise + border - conditioning
    no_gradient = 2 * tokens * width * 3 * network.patch_size**2  # into the pixels themselves
    trunk = 3 * (2 * pixels + loss.num_draws * denoise) + pixels - no_gradient
    return trunk + (3 * head_flops(objective, tokens, loss.num_draws) if objective is not None else 0)


def head_flops(objective: Objective, tokens: int, num_draws: int) -> float:
    """Of the heads that only training has, forward, for one image."""

    def per_token(head: nn.Module | None) -> int:
        return 2 * sum(p.numel() for p in head.parameters() if p.ndim == 2) if head is not None else 0

    denoise_rows = per_token(objective.alignment_head) + per_token(objective.vision_head)
    encode_rows = per_token(objective.representation_head)
    return tokens * (num_draws * denoise_rows + encode_rows) + per_token(objective.classifier)


def state_bytes(state: State) -> dict[str, int]:
    """What the run holds beside activations."""

    def count(parameters: Iterator[Tensor]) -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    trained = count(state.objective.parameters())
    of_muon = 0 if state.muon is None else count(p for group in state.muon.param_groups for p in group["params"])
    return {
        "weights": trained,
        "EMA copy": count(state.ema.parameters()),
        "gradients": trained,
        "optimiser": 2 * (trained - of_muon) + of_muon,
    }


def random_batch(network: ModelConfig, number: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (number, *network.pixel_shape), generator=generator, dtype=torch.uint8)
    return step, 0, pixels, torch.randint(0, network.num_classes, (number,), generator=generator)


def saved_bytes(state: State, forward: Any, config: TrainConfig, where: Device, number: int) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward one, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in state.objective.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address counted for another

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        add_gradient(state, forward, config, where, random_batch(state.ema.config, number, 0), 1.0, backward=False)
    return sum(kept.values())


def kept_for_backward(config: TrainConfig, where: Device) -> tuple[int, int]:
    """Bytes an image, and those that do not grow with images, as weights in another precision.

    Both grow by the same with every block, so that networks of one and of two blocks tell those of any depth.
    """
    loss = config.loss.model_copy(update={"alignment_layer": 1})
    models = (config.model.model_copy(update={"depth": depth}) for depth in (1, 2))
    shallow = (config.model_copy(update={"model": model, "loss": loss}) for model in models)
    (one, fixed_one), (two, fixed_two) = (probe(item, where) for item in shallow)
    more = config.network_config().depth - 1
    return one + more * (two - one), fixed_one + more * (fixed_two - fixed_one)


def probe(config: TrainConfig, where: Device) -> tuple[int, int]:
    """The same, of this network itself."""
    state = new_state(config, where.device)
    one, two = (saved_bytes(state, state.objective, config, where, number) for number in (1, 2))
    return two - one, max(0, 2 * one - two)


def seconds(where: Device, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    return time.perf_counter() - began


def measure_speed(state: State, forward: Any, config: TrainConfig, where: Device, number: int) -> Speed:
    """Time real micro-batches of `number` images and real updates; the first of each warms up."""
    network = state.ema.config

    def micro() -> None:
        add_gradient(state, forward, config, where, random_batch(network, number, state.step), 1.0)

    first = seconds(where, micro)
    times = [seconds(where, micro) for _ in range(1 if first > SLOW else 3)]
    updates = [seconds(where, lambda: update(state, config))]
    for _ in range(0 if first > SLOW else 2):
        micro()  # an update without gradients would be none
        updates.append(seconds(where, lambda: update(state, config)))
    return Speed(number, min(times), min(updates))


def forget_peak(where: Device) -> None:
    """Begin to measure peak memory anew: what was probed before is no part of a step."""
    if where.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where.device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(where: Device) -> tuple[int, str]:
    """Most memory since then, and of what."""
    if where.device.type == "cuda":
        return torch.cuda.max_memory_allocated(where.device), "on the device"
    return proc_bytes("/proc/self/status", "VmHWM"), "of the process, libraries included"


def free_bytes(where: Device) -> int:
    """Memory that a process may still take."""
    if where.device.type == "cuda":
        return torch.cuda.mem_get_info(where.device)[0]
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def dry_run(config: TrainConfig) -> Iterator[str]:
    """The lines of the report, each when it is known."""
    where = choose_device(config)
    loss, optim, network = config.loss, config.optim, config.network_config()
    state = new_state(config, where.device)
    trained = sum(p.numel() for p in state.objective.model.parameters())
    heads = sum(p.numel() for p in state.objective.parameters()) - trained
    flops = flops_per_image(network, loss, state.objective)
    images, rows, tokens = optim.steps * optim.batch_size, rows_per_image(loss), network.latent_shape[0]
    yield f"network: {trained / 1e6:.1f}M parameters, and {heads / 1e6:.1f}M of heads that only training has"
    yield f"run: {optim.steps} steps of {optim.batch_size} images, {images / 1e6:.1f}M images"
    yield f"an image: {rows} rows of {tokens} tokens, {flops / 1e9:.0f} GFLOP forward and backward"

    parts = state_bytes(state)
    each, extra = kept_for_backward(config, where)
    fixed = sum(parts.values()) + extra
    yield "memory held: " + ", ".join(f"{name} {size(number)}" for name, number in parts.items())
    yield (
        f"memory kept for the backward pass: {size(each)} an image in {'bf16' if where.bf16 else 'fp32'}; "
        f"{size(fixed + each * optim.micro_batch_size)} in all with micro-batches of {optim.micro_batch_size}"
    )
    if fixed + each > free_bytes(where):
        yield f"speed: not measured, for only {size(free_bytes(where))} are free here"
    else:
        yield from on_this_device(state, config, where, flops, max(1, int((0.7 * free_bytes(where) - fixed) // each)))
    yield on_h100(config, where, flops, sum(parts.values()))


def on_this_device(state: State, config: TrainConfig, where: Device, flops: float, most: int) -> Iterator[str]:
    """The sentences about real steps, with micro-batches of at most `most` images."""
    rows, tokens = rows_per_image(config.loss), state.ema.config.latent_shape[0]
    number = min(config.optim.micro_batch_size, most)
    if where.device.type == "cpu":
        number = min(number, max(1, 256 // tokens))  # more go no faster there
    forward: Any = torch.compile(state.objective) if where.compiled else state.objective
    forget_peak(where)
    speed = measure_speed(state, forward, config, where, number)
    peak, of_what = peak_bytes(where)
    rate = config.optim.batch_size / speed.step_seconds(config.optim)
    yield (
        f"measured on {where.device}, micro-batches of {number}: {rate:.2f} images/s, {rate * rows * tokens:.0f} "
        f"tokens/s, {rate * flops / 1e12:.2f} TFLOP/s; an update takes {speed.update_seconds:.2f} s; "
        f"peak memory {size(peak)} {of_what}"
    )
    whole = duration(config.optim.steps * config.optim.batch_size / rate)
    yield f"the whole run here: {whole}, reading of images and evaluations not counted"


def on_h100(config: TrainConfig, where: Device, flops: float, held: int) -> str:
    """The sentence about a machine that is not here. Its memory is counted with what it would keep: bf16, fused."""
    optim, rate = config.optim, H100_PEAK * H100_SHARE / flops
    each, extra = kept_for_backward(config, replace(where, bf16=True, plain_attention=False))
    fits = max(0, int((0.9 * H100_BYTES - held - extra) // each))
    return (
        f"on one H100, not measured but assumed to reach {H100_SHARE:.0%} of {H100_PEAK / 1e12:.0f} TFLOP/s in bf16: "
        f"{rate:.0f} images/s, {optim.batch_size / rate:.2f} s a step, "
        f"{duration(optim.steps * optim.batch_size / rate)}; {size(each)} an image, so that its 80 GB hold "
        f"micro-batches of {fits} or less"
    )


def size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def duration(value: float) -> str:
    hours = value / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 2 else f"{value / 60:.1f} min"
