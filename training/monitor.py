"""Training metrics: effective rank, spread of the latents, PSNR, and warnings of collapse and of memorisation."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsd_serve.effective_rank import centred_rank, effective_rank
from dsd_serve.flow import add_noise
from dsd_serve.imaging.codec import psnr
from dsd_serve.network import DSD, to_images, to_pixels
from training.run_config import MonitorSection


@torch.no_grad()
def latent_metrics(model: DSD, pixels: Tensor, batch_size: int = 128) -> tuple[dict[str, float], Tensor]:
    """Metrics of a network on images uint8 [N, 3, S, S], by name, and the reconstructions uint8 [N, 3, S, S].

    effective_rank and centred_rank 1 to C; channel_std_min and channel_std_max: spread of single channels over all
    tokens; image_std: mean spread of a channel at one place over images, near 0 when all get the same latents.
    """
    device = model.role_embed.weight.device
    latents, decoded = [], []
    for part in pixels.split(batch_size):
        z = model.encode(to_images(part.to(device)))
        latents.append(z.cpu())
        decoded.append(to_pixels(model.decode(z)).cpu())
    z, reconstructed = torch.cat(latents), torch.cat(decoded)
    std = z.reshape(-1, z.shape[-1]).std(0)
    numbers = {
        "effective_rank": effective_rank(z.numpy()),
        "centred_rank": centred_rank(z.numpy()),
        "channel_std_min": float(std.min()),
        "channel_std_max": float(std.max()),
        "image_std": float(z.std(0).mean()),
        "psnr": psnr(pixels.numpy(), reconstructed.numpy()),
    }
    return numbers, reconstructed


@torch.no_grad()
def denoised_psnr(model: DSD, pixels: Tensor, labels: Tensor, t: float, batch_size: int = 128) -> float:
    """PSNR in dB of images that were encoded, noised to t, denoised in one step and decoded; the noise is fixed.

    pixels uint8 [N, 3, S, S], labels int64 [N]. It compares across runs, which the denoising loss does not: collapsed
    latents are easy to denoise but decode badly.
    """
    device = model.role_embed.weight.device
    generator, decoded = torch.Generator().manual_seed(0), []
    for part, classes in zip(pixels.split(batch_size), labels.split(batch_size), strict=True):
        z = model.encode(to_images(part.to(device)))
        noise = torch.randn(z.shape, generator=generator).to(device)
        times = torch.full((len(z),), t, device=device)
        z_hat = model.denoise(add_noise(z, noise, t), times, classes.to(device))
        decoded.append(to_pixels(model.decode(z_hat)).cpu())
    return psnr(pixels.numpy(), torch.cat(decoded).numpy())


MEMORISED = "the network begins to memorise"  # prefix of the warning, which is given once per run


class Monitor:
    """Warnings of collapse, a sentence for each threshold that an evaluation crosses, and one of memorisation.

    past: the lines of the journal of earlier parts of the run.
    """

    def __init__(self, thresholds: MonitorSection, latent_dim: int, past: Sequence[Mapping[str, Any]] = ()) -> None:
        self.thresholds, self.latent_dim = thresholds, latent_dim
        self.best_psnr = max((line["psnr"] for line in past if "psnr" in line), default=-math.inf)
        # psnr_0.5 of held-out and of training images, by evaluation
        self.denoised = [denoised_pair(line) for line in past if "training_psnr_0.5" in line]
        self.warned = any(str(line.get("warning", "")).startswith(MEMORISED) for line in past)

    def floors(self) -> dict[str, float]:
        """The thresholds by name, logged with the metrics so that both show as curves."""
        rank = self.thresholds.rank_share * self.latent_dim
        floors = {"effective_rank_floor": rank, "image_std_floor": self.thresholds.image_std}
        if math.isfinite(self.best_psnr):
            floors["psnr_floor"] = self.best_psnr - self.thresholds.psnr_drop
        return floors

    def warnings(self, numbers: dict[str, float]) -> list[str]:
        """A sentence for each threshold that one evaluation crosses."""
        floors = self.floors()
        rank, spread, quality = (numbers[name] for name in ("effective_rank", "image_std", "psnr"))
        self.best_psnr = max(self.best_psnr, quality)
        sentences = []
        if rank < floors["effective_rank_floor"]:
            floor = floors["effective_rank_floor"]
            sentences.append(f"the latents collapse: effective rank {rank:.1f} of {self.latent_dim}, below {floor:.1f}")
        if spread < floors["image_std_floor"]:
            sentences.append(f"the latents collapse: they hardly differ between images (spread {spread:.3f})")
        if quality < floors.get("psnr_floor", -math.inf):
            sentences.append(f"reconstruction gets worse: {quality:.1f} dB, its best was {self.best_psnr:.1f} dB")
        if sentence := self.memorised(numbers):
            sentences.append(sentence)
        return sentences

    def memorised(self, numbers: Mapping[str, float]) -> str:
        """A sentence, once in a run, if held-out images were denoised worse at each of the last evaluations while
        training images were denoised better; else empty."""
        if "training_psnr_0.5" not in numbers:
            return ""
        self.denoised.append(denoised_pair(numbers))
        count = self.thresholds.overfit_evals
        last = self.denoised[-count - 1 :]
        if self.warned or not count or len(last) <= count:
            return ""
        falls = all(after[0] < before[0] for before, after in pairwise(last))
        (first_held, first_seen), (held, seen) = last[0], last[-1]
        if not falls or first_held - held < self.thresholds.overfit_drop or seen <= first_seen:
            return ""
        self.warned = True
        return (
            f"{MEMORISED} the training images: denoised from t = 0.5, held-out images fell from {first_held:.1f} to "
            f"{held:.1f} dB over {count} evaluations, training images rose from {first_seen:.1f} to {seen:.1f} dB; "
            "stop here, or train with more images, with data.crop and data.colour, or a smaller network"
        )


def denoised_pair(numbers: Mapping[str, float]) -> tuple[float, float]:
    return numbers["psnr_0.5"], numbers["training_psnr_0.5"]
