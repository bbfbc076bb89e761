"""dsd-train CONFIG --dry-run: the cost of a run, before there is any data.

Counted: parameters and floating-point operations. Measured on this device, with random images: the memory that the
backward pass keeps, the time of real micro-batches and of a real update. Derived from these: the time of the whole run.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsd_serve.config import ModelConfig
from training.device import Device, choose_device
from training.loss import Objective
from training.run_config import LossSection, OptimSection, RunConfig, TrainConfig
from training.state import State, new_state
from training.step import Batch, add_gradient, update

SLOW = 20.0  # seconds: a micro-batch that takes longer, once compiled, is timed once


@dataclass
class Speed:
    """Measured speed: images in a micro-batch, seconds for it, seconds for an update of all weights."""

    images: int
    micro_seconds: float
    update_seconds: float

    def step_seconds(self, optim: OptimSection) -> float:
        """Seconds of one optimiser step on one such device."""
        return self.micro_seconds * optim.batch_size / self.images + self.update_seconds


def rows_per_image(loss: LossSection) -> int:
    """Rows that one image sends through the trunk in a step: two encodings, K draws, one decoding."""
    return loss.num_draws + 3


def flops_per_image(network: ModelConfig, loss: LossSection, objective: Objective | None = None) -> float:
    """Floating-point operations of the matrix products of a training step, per image: forward, and backward at twice
    the cost.

    The target encoder has no backward pass. The heads of `objective` are counted, LPIPS and a vision model are not.
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
    """Operations of the training heads, forward, for one image."""

    def per_token(head: nn.Module | None) -> int:
        return 2 * sum(p.numel() for p in head.parameters() if p.ndim == 2) if head is not None else 0

    denoise_rows = sum(map(per_token, (objective.alignment_head, objective.vision_head)))
    encode_rows = per_token(objective.representation_head)
    return tokens * (num_draws * denoise_rows + encode_rows) + per_token(objective.classifier)


def state_bytes(state: State) -> dict[str, int]:
    """Bytes that a run holds besides activations, by kind."""

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


def random_batch(network: ModelConfig, images: int, step: int, number: int = 0) -> Batch:
    """A micro-batch of random images: `number` of that step."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (images, *network.pixel_shape), generator=generator, dtype=torch.uint8)
    return step, number, pixels, torch.randint(0, max(1, network.num_classes), (images,), generator=generator)


Micro = Callable[[int, bool], Any]  # forward over a micro-batch of so many images, and backward if asked


def micro_batches(state: State, forward: Any, config: TrainConfig, where: Device) -> Micro:
    """Micro-batches of random images."""

    def micro(number: int, backward: bool) -> None:
        batch = random_batch(state.ema.config, number, state.step)
        add_gradient(state, forward, config, where, batch, 1.0, backward=backward)

    return micro


def saved_bytes(state: State, micro: Micro, number: int) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward one, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in state.objective.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage is freed and its address reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        micro(number, False)
    return sum(kept.values())


def kept_for_backward(state: State, micro: Micro) -> tuple[int, int]:
    """Bytes that the backward pass needs: of each image, and in any case, as weights cast to bf16.

    Measured by the forward passes of micro-batches of two images and of four. micro: not compiled.
    """
    two, four = (saved_bytes(state, micro, number) for number in (2, 4))
    return (four - two) // 2, max(0, 2 * two - four)


def seconds(where: Device, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    return time.perf_counter() - began


def measure_speed(state: State, micro: Micro, config: RunConfig, where: Device, number: int) -> Speed:
    """Time real micro-batches of `number` images and real updates.

    The first of each is not counted: it compiles the network, or allocates the state of the optimiser.
    """

    def once() -> None:
        micro(number, True)

    once()
    times = [seconds(where, once)]
    rounds = 1 if times[0] > SLOW else 2
    times += [seconds(where, once) for _ in range(rounds if rounds > 1 else 0)]
    update(state, config)
    updates = []
    for _ in range(rounds):
        once()  # an update needs gradients
        updates.append(seconds(where, lambda: update(state, config)))
    return Speed(number, min(times), min(updates))


def speed_here(state: State, micro: Micro, config: RunConfig, where: Device, most: int) -> Speed:
    """The speed on this device, in micro-batches of at most `most` images."""
    number = min(config.optim.micro_batch_size, most)
    if where.device.type == "cpu":
        number = min(number, max(1, 256 // state.ema.config.latent_shape[0]))  # larger batches are no faster there
    return measure_speed(state, micro, config, where, number)


def reset_peak(where: Device) -> None:
    """Restart the measurement of peak memory: earlier passes do not count."""
    if where.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where.device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(where: Device) -> tuple[int, str]:
    """Peak memory since `reset_peak`, and a phrase for what it includes."""
    if where.device.type == "cuda":
        return torch.cuda.max_memory_allocated(where.device), "on the device"
    return proc_bytes("/proc/self/status", "VmHWM"), "of the process, libraries included"


def free_bytes(where: Device) -> int:
    """Memory that a process can still allocate."""
    if where.device.type == "cuda":
        return torch.cuda.mem_get_info(where.device)[0]
    return proc_bytes("/proc/meminfo", "MemAvailable")


def proc_bytes(path: str, name: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Item:
    """What a step takes a batch of.

    name: image or trajectory. rows: of the network, in a step. flops: of these, forward and backward.
    """

    name: str
    rows: float
    flops: float


def dry_run(config: TrainConfig) -> Iterator[str]:
    """The lines of the report, each as soon as it is measured."""
    network = config.network_config()
    where = choose_device(config, network)
    state = new_state(config, where.device)
    assert isinstance(state.objective, Objective)
    item = Item("image", rows_per_image(config.loss), flops_per_image(network, config.loss, state.objective))
    forward: Any = torch.compile(state.objective) if where.compiled else state.objective
    yield from cost_lines(
        state,
        config,
        where,
        item,
        micro_batches(state, state.objective, config, where),
        micro_batches(state, forward, config, where),
    )


def cost_lines(
    state: State, config: RunConfig, where: Device, item: Item, plain: Micro, compiled: Micro
) -> Iterator[str]:
    """The lines of a report: counts, memory, and the speed of steps. plain, compiled: the same micro-batches."""
    optim, tokens = config.optim, state.ema.config.latent_shape[0]
    trained = sum(p.numel() for p in state.objective.model.parameters())
    heads = sum(p.numel() for p in state.objective.parameters()) - trained
    items = optim.steps * optim.batch_size
    yield f"network: {trained / 1e6:.1f}M parameters, and {heads / 1e6:.1f}M in heads for training only"
    name = {"image": "images", "trajectory": "trajectories"}[item.name]
    yield f"run: {optim.steps} steps of {optim.batch_size} {name}, {items / 1e6:.1f}M {name}"
    article = "an" if item.name == "image" else "a"
    cost = f"{item.flops / 1e9:.0f} GFLOP forward and backward"
    yield f"{article} {item.name}: {item.rows:g} rows of {tokens} tokens, {cost}"

    parts = state_bytes(state)
    each, extra = kept_for_backward(state, plain)
    fixed = sum(parts.values()) + extra
    yield "memory held: " + ", ".join(f"{name} {size(number)}" for name, number in parts.items())
    yield (
        f"memory kept for the backward pass: {size(each)} {article} {item.name} in {'bf16' if where.bf16 else 'fp32'}; "
        f"{size(fixed + each * optim.micro_batch_size)} in all with micro-batches of {optim.micro_batch_size}"
    )
    if fixed + 4 * each > free_bytes(where):
        yield f"speed: not measured: only {size(free_bytes(where))} are free here"
        return
    reset_peak(where)
    speed = speed_here(state, compiled, config, where, max(1, int((0.7 * free_bytes(where) - fixed) // each)))
    peak, of_what = peak_bytes(where)
    rate = optim.batch_size / speed.step_seconds(optim)
    yield (
        f"measured on {where.device}, micro-batches of {speed.images}: {rate:.2f} {name}/s, "
        f"{rate * item.rows * tokens:.0f} tokens/s, {rate * item.flops / 1e12:.2f} TFLOP/s; an update takes "
        f"{speed.update_seconds:.2f} s; peak memory {size(peak)} {of_what}"
    )
    whole = duration(items / rate)
    yield f"the whole run here: {whole}, without reading images and evaluations"


def size(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def duration(value: float) -> str:
    hours = value / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours" if hours >= 2 else f"{value / 60:.1f} min"
