"""The device of a training process, and agreement between the processes of a run."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, ConfigError
from training.run_config import RunConfig

DRIVER = Path("/proc/driver/nvidia/version")
FEW_TOKENS = 64  # below this plain attention is faster on a CPU: 1.6 times at 16 tokens; at 256 it is slower


@dataclass
class Device:
    """Device, precision and attention of this process, and its rank in a run of `world` processes."""

    device: torch.device
    bf16: bool
    compiled: bool
    rank: int = 0
    world: int = 1
    plain_attention: bool = False

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Mixed precision, and attention as plain matrix products where the fused kernel is slower."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16))
            if self.plain_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield


def distributed(objective: nn.Module, where: Device) -> Any:
    """The forward pass of the training objective: compiled, and one of several processes, as `where` says.

    By default dynamo cuts a compiled network wherever DistributedDataParallel sends a bucket of gradients, 33 times for
    dsd-b, so that sending overlaps with the backward pass; whole graphs gain more where links are fast.
    """
    forward: Any = torch.compile(objective) if where.compiled else objective
    if where.world == 1:
        return forward
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(forward)


def agree_on_step(step: int, where: Device) -> None:
    """Raises CheckpointError unless all processes start from the same step."""
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
    """Losses averaged over all processes, each of which has those of its own images."""
    values = torch.stack(list(losses.values()))
    if where.world > 1:
        dist.all_reduce(values)
        values /= where.world
    return dict(zip(losses, values.tolist(), strict=True))


def choose_device(config: RunConfig, network: ModelConfig) -> Device:
    """The device of this process, for a run with this network; joins the process group under torchrun. Raises
    ConfigError if it is unavailable.
    """
    name = config.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := unused_gpu()):
            raise ConfigError(
                f"this machine has an NVIDIA driver, but torch {torch.__version__} cannot use it: {reason}; update the "
                "driver or install a torch for it, or set run.device=cpu to train on the CPU"
            )
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device is {name!r}, but torch {torch.__version__} sees no CUDA device here")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if name.startswith("cuda:") and here > 1:
            raise ConfigError(
                f"run.device must be cuda for the {here} processes of this machine, which take a GPU each, got {name!r}"
            )
        if name == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        # gloo beside NCCL, for flags in the memory of the CPU: they do not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if name.startswith("cuda") else "gloo")
        num_micro = config.optim.batch_size // config.optim.micro_batch_size
        if num_micro % world:
            raise ConfigError(
                f"optim.batch_size / optim.micro_batch_size is {num_micro}; it must be a multiple of the {world} "
                "processes, so that each has the same share; lower optim.micro_batch_size"
            )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"run.device must be auto, cpu, cuda, cuda:N or another device of torch, got {name!r}"
        ) from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"run.device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    native = gpu_multiplies_bf16() if device.type == "cuda" else cpu_multiplies_bf16()
    bf16 = config.run.precision == "bf16" or (config.run.precision == "auto" and native)
    compiled = config.run.compile == "on" or (config.run.compile == "auto" and device.type == "cuda")
    num_tokens, _ = network.latent_shape
    plain_attention = device.type == "cpu" and num_tokens < FEW_TOKENS
    return Device(device, bf16, compiled, rank, world, plain_attention)


def unused_gpu() -> str | None:
    """Why torch, which is built for CUDA, sees no GPU although there is a driver; None if there is none, or if
    CUDA_VISIBLE_DEVICES decides what is seen."""
    if torch.version.cuda is None or not DRIVER.exists() or "CUDA_VISIBLE_DEVICES" in os.environ:
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0][:300]
    return "it finds no device"


def gpu_multiplies_bf16() -> bool:
    """Not whether it can be emulated, as on a T4, where it is slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
