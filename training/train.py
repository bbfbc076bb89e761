"""dsd-train training/configs/NAME.toml [section.key=value ...]

Trains a DSD network. A run folder holds checkpoint.pt, metrics.jsonl, TensorBoard's events and PNG grids; starting a
run again in the same folder goes on from its checkpoint, to the bit. Ctrl-C or SIGTERM saves a checkpoint and exits.
Several devices: torchrun --nproc-per-node N -m training training/configs/NAME.toml
Several machines: the same on each, with --nnodes and --rdzv-endpoint of torchrun, run.dir on a disk that they share.
A run may go on with another number of processes: the batch, its pictures and its noise do not depend on it.
What a run will cost, before there are any pictures: dsd-train CONFIG --dry-run
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dsd_serve import __version__
from dsd_serve.checkpoint import read_checkpoint, read_model_dir, read_weights, write_checkpoint
from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.errors import CheckpointError, ConfigError, DSDError
from dsd_serve.imaging import codec as pictures_io
from dsd_serve.network import DSD, to_images
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate, run_all
from training.loss import Draws, Objective
from training.monitor import Monitor, denoised_psnr, latent_metrics
from training.run_config import OptimSection, TrainConfig, load_config
from training.sources import Order, Pictures, hold_out, micro_batches
from training.teachers import Lpips, VisionModel

log = logging.getLogger(__name__)

FEW_TOKENS = 64  # below, plain attention is the faster on a CPU: at 16 tokens 1.6 times, at 256 it is slower

SEED_STREAM = 0x0D5D  # keeps the draws of training apart from other uses of the same seed


@dataclass
class Device:
    """Where this process computes, and how."""

    device: torch.device
    bf16: bool
    compiled: bool
    rank: int = 0
    world: int = 1
    plain_attention: bool = False

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Mixed precision, and attention by plain matrix products where the fused one is slower."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16))
            if self.plain_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


@dataclass
class State:
    """What a checkpoint holds: after `step` optimiser steps."""

    objective: Objective
    ema: DSD
    optimizer: torch.optim.Optimizer
    muon: torch.optim.Optimizer | None = None  # beside it, for the matrices of the blocks
    vision: VisionModel | None = None  # frozen, so no part of a checkpoint
    step: int = 0
    finite: Tensor | None = None  # whether every gradient since the start was

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.muon is None else [self.optimizer, self.muon]


def agree_on_step(step: int, where: Device) -> None:
    """Raise CheckpointError unless all processes start from the same step."""
    if where.world == 1:
        return
    steps = torch.tensor([step, -step], device=where.device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    if steps[0] != -steps[1]:
        raise CheckpointError(
            f"the processes found checkpoints of steps {-int(steps[1])} to {int(steps[0])}; "
            "run.dir must be the same folder for all of them, on a disk that the machines share"
        )


def averaged(losses: dict[str, Tensor], where: Device) -> dict[str, float]:
    """The losses of the whole batch: each process knows those of its own pictures."""
    values = torch.stack(list(losses.values()))
    if where.world > 1:
        dist.all_reduce(values)
        values /= where.world
    return dict(zip(losses, values.tolist(), strict=True))


def lr_at(step: int, config: OptimSection) -> float:
    """Linear warm-up, then a cosine to lr * lr_final at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def ema_decay_at(step: int, config: OptimSection) -> float:
    """Short memory at first, so that the target encoder is not the random one for long."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def new_state(config: TrainConfig, device: torch.device) -> State:
    torch.manual_seed(config.run.seed)
    loss, network = config.loss, config.model_config()
    model = DSD(network).to(device)
    lpips = Lpips(Path(loss.lpips_file)).to(device) if loss.lpips_weight else None
    vision = VisionModel(Path(loss.vision_model), network.grid_size, device) if loss.vision_weight else None
    objective = Objective(model, loss, lpips, 0 if vision is None else vision.width).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    return State(objective, ema, *new_optimizers(objective, config.optim), vision)


def new_optimizers(
    objective: Objective, config: OptimSection
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """AdamW for everything; or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for p in objective.model.blocks.parameters() if p.ndim == 2] if config.name == "muon" else []
    of_muon = {id(p) for p in matrices}
    others = [p for p in objective.parameters() if id(p) not in of_muon]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        fused=True,
    )
    if not matrices:
        return optimizer, None
    return optimizer, torch.optim.Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def start_from(state: State, path: Path) -> None:
    """Give the network and its EMA copy the weights of a model directory. Raises CheckpointError when it is of another
    network; which classes it was trained on does not matter."""
    directory = read_model_dir(path)
    directory.check([directory.weights])
    ours = state.ema.config
    if (theirs := replace(directory.config, classes=ours.classes)) != ours:
        raise CheckpointError(f"run.start_from {path} is another network: {theirs}; this configuration has {ours}")
    weights = {name: torch.from_numpy(array) for name, array in read_weights(path).items()}
    state.objective.model.load_state_dict(weights)
    state.ema.load_state_dict(weights)


def save(state: State, config: TrainConfig, path: Path) -> None:
    write_checkpoint(
        path,
        {
            "step": state.step,
            "config": config.to_dict(),
            "network": state.ema.config.to_dict(),
            "objective": state.objective.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            **({} if state.muon is None else {"muon": state.muon.state_dict()}),
        },
    )


def restore(state: State, config: TrainConfig, path: Path) -> None:
    """Load a checkpoint into a fresh state. Raises CheckpointError when it is of another network or objective."""
    values = read_checkpoint(path)
    ours = config.model_config().to_dict()
    for key, value in ours.items():
        if values["network"].get(key) != value:
            raise CheckpointError(
                f"{path} has {key} = {values['network'].get(key)!r}, the configuration {value!r}; "
                "use another run.dir or the same network"
            )
    try:
        state.objective.load_state_dict(values["objective"])
        state.ema.load_state_dict(values["ema"])
        state.optimizer.load_state_dict(values["optimizer"])
        if state.muon is not None:
            state.muon.load_state_dict(values["muon"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this configuration: {' '.join(str(error).split())[:300]}") from None
    state.step = values["step"]


def generator_for(seed: int, step: int, number: int, device: torch.device) -> torch.Generator:
    """The random numbers of one micro-batch: a function of its place in the run, so that nothing need be saved."""
    state = np.random.SeedSequence([SEED_STREAM, seed, step, number]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def prepare(pixels: Tensor, labels: Tensor, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 pixels to images in [-1, 1] on the device, half of them mirrored."""
    device = generator.device
    images = to_images(pixels.to(device, non_blocking=True))
    if flip:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    return images, labels.to(device, non_blocking=True)


Batch = tuple[int, int, Tensor, Tensor]  # step, number of the micro-batch, pixels, labels


def train_step(
    state: State, forward: Any, config: TrainConfig, where: Device, batches: Iterator[Batch]
) -> dict[str, Tensor]:
    """One optimiser step over this process's micro-batches.

    Returns the loss and its parts, averaged over these, and grad_norm, which is that of the whole batch.
    """
    per_process = config.optim.batch_size // config.optim.micro_batch_size // where.world
    sums: dict[str, Tensor] = {}
    for number in range(per_process):
        batch = next(batches)
        assert batch[0] == state.step, "the data must come in the order of the steps"
        alone = isinstance(forward, DistributedDataParallel) and number < per_process - 1
        with forward.no_sync() if alone else contextlib.nullcontext():
            losses = add_gradient(state, forward, config, where, batch, 1 / per_process)
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
    images, labels = prepare(pixels, labels, config.data.flip, generator)
    draws = Draws.make(config.loss, len(images), state.objective.model.config.latent_shape, generator)
    features = None if state.vision is None else state.vision(images)
    with where.computing():
        total, parts = forward(state.ema, images, labels, draws, features)
        if backward:
            (total * share).backward()
    return {name: value.detach() for name, value in {"loss": total, **parts}.items()}


def update(state: State, config: TrainConfig) -> Tensor:
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


def evaluate(state: State, config: TrainConfig, held: Pictures, folder: Path) -> dict[str, float]:
    """Measure the EMA network on held-out pictures; write grids of reconstructions and of samples."""
    assert held.pixels is not None
    pixels, labels = torch.from_numpy(held.pixels), torch.from_numpy(held.labels)
    numbers, reconstructed = latent_metrics(state.ema, pixels)
    numbers["psnr_0.5"] = denoised_psnr(state.ema, pixels, labels, 0.5)
    pairs = [part.numpy() for pair in zip(pixels[:32], reconstructed[:32], strict=True) for part in pair]
    write_png(folder / f"reconstructions-{state.step:07d}.png", pairs, columns=8)
    if not config.run.samples_per_class:
        return numbers
    classes = state.ema.config.trained_classes[:10]
    params = [
        SamplingParams(
            seed=config.run.seed,
            index=i,
            num_steps=config.run.sample_steps,
            guidance_scale=config.run.sample_guidance,
        )
        for i in range(config.run.samples_per_class)
    ]
    programs = [generate(state.ema.config, label, p) for label in classes for p in params]
    pictures = run_all(TorchEngine(state.ema), programs)
    write_png(folder / f"samples-{state.step:07d}.png", pictures, columns=config.run.samples_per_class)
    return numbers


def write_png(path: Path, pictures: Sequence[Any], columns: int) -> None:
    path.write_bytes(pictures_io.write_image(pictures_io.grid(list(pictures), columns)))


class Journal:
    """metrics.jsonl, and TensorBoard where it is installed; silent on all but the first process."""

    def __init__(self, folder: Path, first: bool, step: int) -> None:
        self.file = self.board = None
        self.best_psnr = -math.inf
        if not first:
            return
        path = folder / "metrics.jsonl"
        kept = (
            [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
            if path.exists()
            else []
        )
        path.write_text("".join(line + "\n" for line in kept))  # what was logged after the checkpoint happens again
        self.best_psnr = max((json.loads(line).get("psnr", -math.inf) for line in kept), default=-math.inf)
        self.file = path.open("a", encoding="utf-8")
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in numbers.items()}}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def warn(self, step: int, sentence: str) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "warning": sentence}) + "\n")
            self.file.flush()
        if self.board is not None:
            self.board.add_text("warning", sentence, step)


class StopSignal:
    """Becomes true at SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.caught = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.catch)

    def catch(self, number: int, _: Any) -> None:
        if self.caught:
            sys.exit(128 + number)
        self.caught = True

    def agreed(self, where: Device) -> bool:
        """Whether any process caught one: all must stop after the same step."""
        if where.world == 1:
            return self.caught
        flag = torch.tensor([self.caught], dtype=torch.int32, device=where.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def choose_device(config: TrainConfig) -> Device:
    """The device of this process; under torchrun joins the group. Raises ConfigError when it is not there."""
    name = config.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device is {name!r}, but torch {torch.__version__} sees no CUDA device here")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
        num_micro = config.optim.batch_size // config.optim.micro_batch_size
        if num_micro % world:
            raise ConfigError(
                f"optim.batch_size / optim.micro_batch_size is {num_micro}; it must be a multiple of the {world} "
                "processes, so that each has as much to do; lower optim.micro_batch_size"
            )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bf16()
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and native)
    compiled = config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda")
    num_tokens, _ = config.model_config().latent_shape
    plain_attention = device.type == "cpu" and num_tokens < FEW_TOKENS
    return Device(device, bf16, compiled, rank, world, plain_attention)


def cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_pictures(config: TrainConfig) -> tuple[Pictures, Pictures]:
    """(training, held-out) pictures, in memory where they fit."""
    training, held = open_pictures(config)
    held.hold()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process of the machine would hold its own
    if training.num_bytes() * here <= config.data.memory_gb * 1e9:
        training.hold()
    return training, held


def open_pictures(config: TrainConfig) -> tuple[Pictures, Pictures]:
    """(training, held-out) pictures, not yet decoded."""
    network, data = config.model_config(), config.data
    shape = network.image_size, data.classes, network.num_classes, data.resize
    training = Pictures(data.path, *shape)
    if data.validation:
        held = Pictures(data.validation, *shape)
    else:
        training, held = hold_out(training)
    generator = np.random.Generator(np.random.Philox(key=[config.run.seed, 0]))
    return training, held.subset(np.sort(generator.permutation(len(held))[: config.run.eval_images]))


def open_batches(training: Pictures, config: TrainConfig, where: Device, first_step: int) -> Iterator[Batch]:
    """The micro-batches of this process from a step on, in the middle of an epoch or not."""
    optim, data = config.optim, config.data
    order = Order(len(training), optim.batch_size, config.run.seed, training.shards(), data.shuffle_shards)
    return micro_batches(
        training, order, first_step, optim.steps, optim.micro_batch_size, where.rank, where.world, data.num_workers
    )


def announce(state: State, config: TrainConfig, where: Device, training: Pictures, held: Pictures) -> None:
    """Say what is trained on what."""
    log.info(
        "%s: %d pictures (%s), %d held out; %.1fM parameters on %s, %s%s; %s",
        config.run.dir,
        len(training),
        "in memory" if training.pixels is not None else f"decoded by {config.data.num_workers} processes",
        len(held),
        sum(p.numel() for p in state.objective.model.parameters()) / 1e6,
        where.device,
        "bf16" if where.bf16 else "fp32",
        ", compiled" if where.compiled else "",
        f"resumes after step {state.step}" if state.step else "starts",
    )


def train(config: TrainConfig) -> State:
    """Train as the configuration says; returns the state at the end or where it was stopped."""
    where = choose_device(config)
    first = where.rank == 0
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        for unfinished in folder.glob(".checkpoint.pt.*.tmp"):  # of a process that was killed while it saved
            unfinished.unlink()
    training, held = load_pictures(config)
    state = new_state(config, where.device)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        restore(state, config, checkpoint)
    elif config.run.start_from:
        start_from(state, Path(config.run.start_from))
    agree_on_step(state.step, where)
    if first:
        announce(state, config, where, training, held)
    forward: Any = torch.compile(state.objective) if where.compiled else state.objective
    if where.world > 1:
        forward = DistributedDataParallel(forward)
    batches = open_batches(training, config, where, state.step)
    journal = Journal(folder, first, state.step)
    monitor = Monitor(config.monitor, state.ema.config.latent_dim, journal.best_psnr)
    bar = tqdm(total=config.optim.steps, initial=state.step, unit="step", disable=not first, dynamic_ncols=True)
    began, began_step, stop = time.perf_counter(), state.step, StopSignal()
    while True:
        done = state.step >= config.optim.steps
        stopping = stop.agreed(where)
        evaluating = done or (state.step % config.run.eval_every == 0 and not stopping)
        saving = done or stopping or (state.step % config.run.save_every == 0 and state.step > 0)
        if where.device.type == "cpu" or evaluating or saving:  # elsewhere asking waits for the device
            check_finite(state, checkpoint)
        if first and evaluating:
            numbers = evaluate(state, config, held, folder)
            report(state.step, numbers, journal, monitor, bar)
            began, began_step = time.perf_counter(), state.step
        if first and saving:
            save(state, config, checkpoint)
        if done or stopping:
            break

        losses = train_step(state, forward, config, where, batches)

        bar.update()
        if state.step % config.run.log_every == 0:
            check_finite(state, checkpoint)
            values = averaged(losses, where)
            rate = (state.step - began_step) * config.optim.batch_size / (time.perf_counter() - began)
            journal.write(state.step, {**values, "lr": lr_at(state.step, config.optim), "pictures_per_second": rate})
            bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.0f} pictures/s")
    bar.close()
    if first:
        log.info(
            "%s after step %d; checkpoint %s", "stopped" if stopping and not done else "done", state.step, checkpoint
        )
    if where.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return state


def check_finite(state: State, checkpoint: Path) -> None:
    """Raise ConfigError when a gradient was infinite or not a number: before anything of it is saved."""
    if state.finite is None or bool(state.finite):
        return
    kept = "nothing was saved yet"
    if checkpoint.exists():
        kept = f"{checkpoint} of step {read_checkpoint(checkpoint)['step']} is from before and is kept"
    raise ConfigError(
        f"the gradient is not finite at step {state.step}; {kept}; go on with a lower optim.lr, or run.precision=fp32"
    )


def report(step: int, numbers: dict[str, float], journal: Journal, monitor: Monitor, bar: Any) -> None:
    """Write down and show an evaluation, and say which thresholds it crosses. Step 0 is not judged."""
    journal.write(step, {**numbers, **monitor.floors()})
    bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for sentence in monitor.judge(numbers) if step else ():
        journal.warn(step, sentence)
        bar.write(f"WARNING: {sentence}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="dsd-train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("config", type=Path, help="a TOML file, see training/configs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="say what the run will cost; needs no data")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            from training.estimate import dry_run

            for line in dry_run(config):
                print(line, flush=True)
            return
        train(config)
    except DSDError as error:
        if not dist.is_initialized():
            sys.exit(f"dsd-train: {error}")
        print(f"dsd-train: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # Python's own end takes the group's threads away under them, and may abort
