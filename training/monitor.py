"""Training metrics: effective rank, spread of the latents, reconstruction PSNR, and warnings of collapse."""

import math

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
    tokens; picture_std: mean spread of a channel at one place over images, near 0 when all get the same latents.
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
        "picture_std": float(z.std(0).mean()),
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


class Monitor:
    """Warnings of collapse: a sentence for each threshold that an evaluation crosses."""

    def __init__(self, thresholds: MonitorSection, latent_dim: int, best_psnr: float = -math.inf) -> None:
        self.thresholds, self.latent_dim, self.best_psnr = thresholds, latent_dim, best_psnr

    def floors(self) -> dict[str, float]:
        """The thresholds by name, logged with the metrics so that both show as curves."""
        rank = self.thresholds.rank_share * self.latent_dim
        floors = {"effective_rank_floor": rank, "picture_std_floor": self.thresholds.picture_std}
        if math.isfinite(self.best_psnr):
            floors["psnr_floor"] = self.best_psnr - self.thresholds.psnr_drop
        return floors

    def warnings(self, numbers: dict[str, float]) -> list[str]:
        """A sentence for each threshold that one evaluation crosses."""
        floors = self.floors()
        rank, spread, quality = (numbers[name] for name in ("effective_rank", "picture_std", "psnr"))
        self.best_psnr = max(self.best_psnr, quality)
        sentences = []
        if rank < floors["effective_rank_floor"]:
            floor = floors["effective_rank_floor"]
            sentences.append(f"the latents collapse: effective rank {rank:.1f} of {self.latent_dim}, below {floor:.1f}")
        if spread < floors["picture_std_floor"]:
            sentences.append(f"the latents collapse: they hardly differ between images (spread {spread:.3f})")
        if quality < floors.get("psnr_floor", -math.inf):
            sentences.append(f"reconstruction gets worse: {quality:.1f} dB, its best was {self.best_psnr:.1f} dB")
        return sentences
