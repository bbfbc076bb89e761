"""The teacher of a distillation, and the trajectories that it draws with guidance."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_serve.checkpoint import read_checkpoint, read_model_dir, read_weights
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.flow import jump
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams, guidance_words, with_values
from training.distillation.distill_config import TeacherSection
from training.transfer import start_place


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the scale, 1 being off, and the times from `start` to `stop` at which it is on."""

    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def at(self, t: Tensor) -> Tensor:
        """The scales [B] at times [B]."""
        return torch.where((self.start <= t) & (t <= self.stop), self.scale, 1.0)

    def __str__(self) -> str:
        return guidance_words(self.scale, self.start, self.stop)


@dataclass(frozen=True)
class Teacher:
    """A frozen network, and how it draws best.

    network: the EMA weights. fingerprint: sha256 of them, in hex. defaults: its recommended sampling settings.
    guidance: what is distilled.
    """

    name: str
    network: DSD
    fingerprint: str
    defaults: SamplingParams
    guidance: Guidance


@dataclass(frozen=True)
class Trajectories:
    """B trajectories of n steps, from noise at t = 0 to clean latents at t = 1.

    times [B, n + 1], z [B, n + 1, L, C], labels int64 [B]; of the first n points estimates [B, n, L, C], guided, and
    null_estimates [B, n, L, C], those without a class.
    """

    times: Tensor
    z: Tensor
    labels: Tensor
    estimates: Tensor
    null_estimates: Tensor


def read_teacher(place: str, section: TeacherSection, device: torch.device) -> Teacher:
    """The teacher in a model directory, hf:org/name or a checkpoint. section: its guidance, None where recommended.

    Raises CheckpointError if it cannot be read; ConfigError or InputError if the guidance is unknown or impossible.
    """
    path = Path(place)
    if path.suffix == ".pt" or path.is_file():
        name, config, weights, recommended = of_checkpoint(path)
    else:
        directory = read_model_dir(start_place(place))
        directory.check([directory.weights])
        name, config, recommended = directory.name, directory.config, directory.defaults
        weights = {key: torch.from_numpy(array) for key, array in read_weights(directory.path).items()}
    if section.guidance is None and recommended is None and config.num_classes:
        raise ConfigError(
            f"a checkpoint recommends no guidance, so give the one to distill, as teacher.guidance=4; got {place}"
        )
    guidance = guidance_of(section, recommended or SamplingParams(guidance_scale=1.0))
    if guidance.scale != 1 and not config.num_classes:
        raise ConfigError(f"teacher.guidance must be 1, which is off: {place} has no classes, got {guidance.scale:g}")
    network = DSD(config)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{place} does not fit its own network: {' '.join(str(error).split())[:300]}") from None
    defaults = recommended or SamplingParams(num_steps=25, sampler="heun", guidance_scale=guidance.scale)
    return Teacher(name, network.requires_grad_(False).eval().to(device), digest(weights), defaults, guidance)


def guidance_of(section: TeacherSection, recommended: SamplingParams) -> Guidance:
    """The guidance of a configuration, completed by the recommended one. Raises InputError for an empty interval."""
    given = {
        "guidance_scale": section.guidance,
        "guidance_start": section.guidance_start,
        "guidance_stop": section.guidance_stop,
    }
    params = with_values(recommended, given)
    return Guidance(params.guidance_scale, params.guidance_start, params.guidance_stop)


def of_checkpoint(path: Path) -> tuple[str, ModelConfig, dict[str, Tensor], SamplingParams | None]:
    """Name, network, EMA weights and recommended settings, where a checkpoint has any."""
    values = read_checkpoint(path)
    try:
        config, weights = ModelConfig.from_dict(values["network"]), values["ema"]
    except KeyError as error:
        raise CheckpointError(f"{path} is incomplete: it has no {error}") from None
    sampling = values.get("sampling")
    recommended = with_values(SamplingParams(), sampling) if isinstance(sampling, dict) else None
    return path.resolve().parent.name or "model", config, weights, recommended


def digest(weights: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def even_times(batch: int, steps: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Times [batch, steps + 1] from 0 to 1, the inner ones shifted at random by up to 0.4 of a step; even without a
    generator.

    A student trained on evenly spaced times only would not learn other jumps.
    """
    times = torch.linspace(0, 1, steps + 1, device=device).repeat(batch, 1)
    if generator is not None:
        times[:, 1:-1] += 0.8 * (torch.rand(batch, steps - 1, generator=generator, device=device) - 0.5) / steps
    return times


@torch.no_grad()
def draw_trajectories(
    denoise: Any, noise: Tensor, labels: Tensor, times: Tensor, guidance: Guidance, null_label: int
) -> Trajectories:
    """Trajectories by dpmpp_2m (dsd_serve/samplers.py), each with times of its own.

    denoise: the teacher's, (z_t, t, labels) -> z_hat. noise [B, L, C], labels int64 [B], times [B, n + 1]. A step takes
    two rows, of a network without classes one.
    """
    batch, steps = len(noise), times.shape[1] - 1
    null = torch.full_like(labels, null_label)
    points, estimates, null_estimates = [noise], list[Tensor](), list[Tensor]()
    for i in range(steps):
        t, r, z = times[:, i], times[:, i + 1], points[-1]
        if null_label:
            both = denoise(torch.cat([z, z]), torch.cat([t, t]), torch.cat([labels, null])).float()
            of_class, of_null = both[:batch], both[batch:]
        else:
            of_class = of_null = denoise(z, t, labels).float()
        z_hat = estimate = of_null + column(guidance.at(t)) * (of_class - of_null)
        if 1 < i < steps - 1:
            before = times[:, i - 1]
            ratio = (half_log_snr(t) - half_log_snr(before)) / (half_log_snr(r) - half_log_snr(t))  # [B]
            estimate = z_hat + (z_hat - estimates[-1]) / (2 * column(ratio))
        points.append(jump(estimate, z, column(t), column(r)))
        estimates.append(z_hat)
        null_estimates.append(of_null)
    return Trajectories(
        times, torch.stack(points, 1), labels, torch.stack(estimates, 1), torch.stack(null_estimates, 1)
    )


def half_log_snr(t: Tensor) -> Tensor:
    return torch.log(t / (1 - t))


def column(t: Tensor) -> Tensor:
    """Times [B] against latents [B, L, C]."""
    return t[:, None, None]
