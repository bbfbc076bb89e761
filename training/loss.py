"""The DSD objective and the two baselines that collapse (arXiv 2511.14716).

For an augmented image x the latents are z = E(x+), from the online encoder, where x+ is x with some patches masked; the
targets are z_target = E_ema(x), from the EMA encoder and the unmasked image. With z_t = t z + (1 - t) noise the three
objectives are

    dsd            w(t) || z_hat(z_t, t, y) - sg(z_target) ||^2    both remedies: stop-gradient, clean-latent prediction
    stop_gradient  || v(z_t, t, y) - (sg(z_target) - noise) ||^2   the first remedy alone
    naive          || v(z_t, t, y) - (z - noise) ||^2              neither

and the gradient reaches the encoder through z_t in all of them. To these are added pixel losses of the reconstruction
(l1 or l2, optionally a Laplacian pyramid and LPIPS), and auxiliary losses on hidden states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_serve.flow import add_noise, velocity
from dsd_serve.network import DSD, patchify, unpatchify
from training.run_config import LossSection

MAX_T = 0.999  # losses are never evaluated at t = 1
SMALLEST_BAND = 4  # least side, in pixels, of the pyramid's coarsest band


@dataclass
class Draws:
    """The random numbers of one micro-batch of B images with K draws each. A step is a pure function of them.

    noise [B K, L, C], t [B K] in (0, 0.999], null [B K] bool (drop the label), mask [B, L] bool (hide the patch from
    the encoder), decode_noise [B, L, C] and decode_t [B] in (0, 1]: noise of the decoded latents (t = 1: none).
    """

    noise: Tensor
    t: Tensor
    null: Tensor
    mask: Tensor
    decode_noise: Tensor
    decode_t: Tensor

    @classmethod
    def make(
        cls, config: LossSection, batch: int, latent_shape: tuple[int, int], generator: torch.Generator
    ) -> "Draws":
        device, length = generator.device, latent_shape[0]
        rows = batch * config.num_draws

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        t = torch.sigmoid(config.t_mean + config.t_std * normal(rows))
        t = (config.t_shift * t / (1 - (1 - config.t_shift) * t)).clamp(max=MAX_T)
        masked = uniform(batch, 1) < config.mask_probability
        noised = uniform(batch) < config.reconstruction_noise
        decode_t = config.reconstruction_t + (1 - config.reconstruction_t) * uniform(batch)
        return cls(
            noise=normal(rows, *latent_shape),
            t=t,
            null=uniform(rows) < config.class_dropout,
            mask=masked & (uniform(batch, length) < config.mask_ratio),
            decode_noise=normal(batch, *latent_shape),
            decode_t=torch.where(noised, decode_t, 1.0),
        )


def projector(hidden_size: int, width: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, width or hidden_size))


class NetworkObjective(nn.Module):
    """A loss with its trainable modules. model: the network; subclasses may add heads."""

    model: DSD


class Objective(NetworkObjective):
    """The online network and the heads that only training needs; `forward` gives the loss and its parts.

    perceptual: LPIPS or the like, images x images -> distances; neither trained nor saved. features: width F of the
    frozen vision model's output.
    """

    def __init__(self, model: DSD, config: LossSection, perceptual: nn.Module | None = None, features: int = 0) -> None:
        super().__init__()
        self.frozen = (perceptual,)  # in a tuple, so that it is not a submodule: neither trained nor saved
        self.model, self.config = model, config
        size = model.config.hidden_size
        self.alignment_layer = config.alignment_layer or max(1, model.config.depth // 2)
        self.alignment_head = projector(size) if config.alignment_weight else None
        self.vision_head = projector(size, features) if config.vision_weight else None
        self.representation_head = projector(size) if config.representation_weight else None
        classified = bool(config.classification_weight) and model.config.num_classes > 1
        self.classifier = nn.Linear(size, model.config.num_classes) if classified else None

    def forward(
        self, ema: DSD, images: Tensor, labels: Tensor, draws: Draws, features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images [B, 3, S, S] in [-1, 1], labels int64 [B] -> total loss, and its unweighted parts by name.

        features [B, L, F]: output of the frozen vision model; needed if loss.vision_weight is above 0.
        """
        config, model = self.config, self.model
        batch, draws_each = images.shape[0], config.num_draws

        hidden, _ = model.trunk(*model.embed_images(self.hide(images, draws.mask)))  # [B, L, W]
        z = model.to_latents(hidden)  # [B, L, C]
        with torch.no_grad():
            target_hidden, _ = ema.trunk(*ema.embed_images(images))  # [B, L, W]
            ema_z = ema.to_latents(target_hidden)
            target_hidden = F.layer_norm(target_hidden.float(), target_hidden.shape[-1:])
        z_target = self.target(z, ema_z)

        # One forward for the denoise and the decode rows: the same mixture that the server runs.
        source = z if config.gradient_through_z_t else z.detach()
        t = draws.t[:, None, None]
        z_t = add_noise(source.repeat_interleave(draws_each, 0), draws.noise, t)  # [B K, L, C]
        rows = torch.where(draws.null, model.config.null_label, labels.repeat_interleave(draws_each))
        z_decode = add_noise(z, draws.decode_noise, draws.decode_t[:, None, None])
        noised, decode = model.embed_noised(z_t, draws.t, rows), model.embed_latents(z_decode)
        mixed = torch.cat([noised[0], decode[0]]), torch.cat([noised[1], decode[1]])
        out, tapped = model.trunk(*mixed, tap=self.alignment_layer)
        z_hat = model.to_z_hat(out[: batch * draws_each], z_t, draws.t)
        decoded = model.to_images(out[batch * draws_each :])

        parts = {
            "denoise": self.denoise_loss(z_hat, z_t, z_target.repeat_interleave(draws_each, 0), draws.noise, t),
            "reconstruction": (F.l1_loss if config.reconstruction_norm == "l1" else F.mse_loss)(decoded, images),
        }
        if config.pyramid_weight:
            parts["pyramid"] = pyramid_distance(decoded, images)
        (perceptual,) = self.frozen
        if perceptual is not None:
            parts["lpips"] = perceptual(decoded, images).mean()
        if self.vision_head is not None:
            assert features is not None
            seen = self.vision_head(tapped[: batch * draws_each])
            parts["vision"] = distance(seen, features.repeat_interleave(draws_each, 0))
        if self.alignment_head is not None:
            aligned = self.alignment_head(tapped[: batch * draws_each])
            parts["alignment"] = distance(aligned, target_hidden.repeat_interleave(draws_each, 0))
        if self.representation_head is not None:
            parts["representation"] = distance(self.representation_head(hidden), target_hidden)
        if self.classifier is not None:
            parts["classification"] = F.cross_entropy(self.classifier(hidden.mean(1)).float(), labels)
        total = torch.stack([getattr(config, f"{name}_weight") * part for name, part in parts.items()]).sum()
        return total, parts

    def target(self, z: Tensor, ema_z: Tensor) -> Tensor:
        """The target of denoising, [B, L, C]. Only in the naive objective the gradient flows into it."""
        return z if self.config.objective == "naive" else ema_z

    def denoise_loss(self, z_hat: Tensor, z_t: Tensor, z_target: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.config.objective != "dsd":
            return F.mse_loss(velocity(z_hat, z_t, t), z_target - noise)
        error = (z_hat - z_target) ** 2
        if self.config.denoise_weighting == "velocity":
            error = error / (1 - t).clamp(min=self.config.denoise_floor) ** 2
        return error.mean()

    def hide(self, images: Tensor, mask: Tensor) -> Tensor:
        """The augmentation x+ of the online encoder: hidden patches become grey."""
        if not self.config.mask_probability:
            return images
        size = self.model.config.patch_size
        return unpatchify(patchify(images, size) * ~mask[..., None], size)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine distance over tokens, in [0, 2]."""
    return 1 - F.cosine_similarity(prediction.float(), target, dim=-1).mean()


def pyramid_distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean l1 over the bands of a Laplacian pyramid (as in arXiv 1707.05776), [B, 3, S, S] in [-1, 1] -> a scalar.

    All bands have the same weight, so edges and textures, which contribute little to plain l1, weigh as much as flat
    colour.
    """
    difference = one.float() - other.float()  # the pyramid is linear: one of the difference is enough
    bands = []
    while difference.shape[-1] >= 2 * SMALLEST_BAND and difference.shape[-1] % 2 == 0:
        low = F.avg_pool2d(difference, 2)
        bands.append((difference - F.interpolate(low, scale_factor=2)).abs().mean())
        difference = low
    return torch.stack([*bands, difference.abs().mean()]).mean()
