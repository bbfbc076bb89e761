"""The network, in the order in which it runs.

Legend of shapes: B rows (E of them to encode, M to denoise, D to decode in the unified forward), L latent tokens
(= patches), C latent channels, W hidden size, H heads, S pixels along one side, P pixels along one side of a patch,
K times that a row is conditioned on (2 in a flow map, t and r; else 1).

    pixels  --patch_embed--\\                          /-- latent_head -- normalise -->  latents      (encode)
                             >-- + pos -- blocks(c) --<--- latent_head -------------->  z_hat        (denoise)
    latents --latent_embed-/                          \\-- pixel_head --------------->  pixels       (decode)

c is role embedding + (denoise only) time embedding + label embedding. In a flow map the last third of the blocks gets
the embedding of r, the time to jump to, in place of that of t (DMF, arXiv 2510.24474): it has no further weights, and
with r = t it is the network without a flow map. The paper states one ViT for the three roles; how
the roles share it is our choice: everything but the two linear layers at each border.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsd_serve.config import FREQUENCIES, LATENT_EPS, ModelConfig, mlp_size
from dsd_serve.flow import from_velocity
from dsd_serve.rows import DECODE, DENOISE, ENCODE


class PatchEmbed(nn.Module):
    """Images to tokens: one linear layer over the pixels of each patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(3 * config.patch_size**2, config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patchify(images, self.patch_size))  # [B, L, W]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] -> [B, L, 3 P P], patches in row-major order."""
    grid = images.shape[-1] // patch_size
    x = images.reshape(-1, 3, grid, patch_size, grid, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * patch_size**2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """[B, L, 3 P P] -> [B, 3, S, S], the inverse of `patchify`."""
    grid = math.isqrt(patches.shape[1])
    x = patches.reshape(-1, grid, grid, 3, patch_size, patch_size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, grid * patch_size, grid * patch_size)


class TimestepEmbedder(nn.Module):
    """t in [0, 1] to a vector: sinusoidal features, then two layers (DiT, arXiv 2212.09748)."""

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        half = FREQUENCIES // 2
        frequencies = 1000 * torch.exp(-math.log(10000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None, None] * self.frequencies  # [B, 1, FREQUENCIES / 2]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # [B, 1, W]


class LabelEmbedder(nn.Module):
    """Labels to vectors; the last row is `null_label`, no class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)[:, None]  # [B, 1, W]


class Attention(nn.Module):
    """Full self-attention with RMS-normalised queries and keys (arXiv 2302.05442).

    Only the keys have a learned scale: a scale of the queries would do the same to their products.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_scale = nn.Parameter(torch.ones(self.head_dim))
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = -1, x.shape[1], self.num_heads, self.head_dim
        q, k, v = (layer(x).reshape(heads) for layer in (self.q, self.k, self.v))  # [B, L, H, W / H]
        # float32 also under autocast; the 1 / sqrt of attention is folded into a weight when the graph is exported
        q = F.rms_norm(q.float(), (self.head_dim,), eps=1e-6)
        k = F.rms_norm(k.float(), (self.head_dim,), self.k_scale * self.head_dim**-0.5, eps=1e-6)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.to(q.dtype)))  # [B, H, L, W / H]
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, L, W]


class Mlp(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = mlp_size(hidden_size)
        self.gate = nn.Linear(hidden_size, inner, bias=False)
        self.up = nn.Linear(hidden_size, inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """A transformer block whose norms are modulated by the conditioning (adaLN-Zero of DiT).

    The projection of the conditioning is shared by all blocks (PixArt-alpha's adaLN-single); a block adds a bias.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size)
        self.adaLN_bias = nn.Parameter(torch.zeros(6 * hidden_size))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        parts = (modulation + self.adaLN_bias).chunk(6, dim=-1)  # each [B, 1, W]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # [B, L, W]
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # [B, L, W]


class DSD(nn.Module):
    """The one network: encode, denoise, decode, and `forward` for a mixture of all three."""

    pos_embed: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embed = PatchEmbed(config)
        self.latent_embed = nn.Linear(config.latent_dim, size)
        self.register_buffer("pos_embed", positions(config.grid_size, size), persistent=False)
        self.role_embed = nn.Embedding(3, size)  # by place in RowCounts
        self.t_embed = TimestepEmbedder(size)
        self.y_embed = LabelEmbedder(config.num_classes, size)
        self.adaLN_modulation = nn.Linear(size, 6 * size, bias=False)
        self.blocks = nn.ModuleList(Block(size, config.num_heads) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(size, eps=1e-6)
        self.latent_head = nn.Linear(size, config.latent_dim)
        self.pixel_head = nn.Linear(size, 3 * config.patch_size**2)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for linear layers, 0.02 for embeddings; zero adaLN, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.adaLN_modulation.weight)

    # The parts. Training uses them to look at hidden states; serving uses `forward` only.

    def embed_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[E, 3, S, S] in [-1, 1] -> tokens [E, L, W] and conditioning [E, K, W]."""
        tokens = self.patch_embed(images) + self.pos_embed
        return tokens, self.role(ENCODE, tokens)

    def embed_noised(self, z_t: Tensor, t: Tensor, labels: Tensor, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z_t [M, L, C], t [M], labels [M], r [M] (None: t) -> tokens [M, L, W] and conditioning [M, K, W].

        r is for flow maps alone.
        """
        assert r is None or self.config.flow_map
        tokens = self.latent_embed(z_t) + self.pos_embed
        role, times = self.role(DENOISE, tokens), self.t_embed(t)  # [M, K, W], [M, 1, W]
        if self.config.flow_map:
            times = torch.cat([times, times if r is None else self.t_embed(r)], dim=1)  # [M, 2, W]
        return tokens, role + times + self.y_embed(labels)

    def embed_latents(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [D, L, C] -> tokens [D, L, W] and conditioning [D, K, W]."""
        tokens = self.latent_embed(z) + self.pos_embed
        return tokens, self.role(DECODE, tokens)

    def role(self, role: int, tokens: Tensor) -> Tensor:
        return self.role_embed.weight[role].expand(tokens.shape[0], 1 + self.config.flow_map, -1)  # [B, K, W]

    def trunk(self, x: Tensor, c: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor]:
        """All blocks. x [B, L, W], c [B, K, W] -> final hidden states, and those after block `tap` (1 = first)."""
        modulation = self.adaLN_modulation(F.silu(c))  # [B, K, 6 W]
        of_t, of_r = modulation.chunk(2, dim=1) if self.config.flow_map else (modulation, modulation)  # [B, 1, 6 W]
        early_blocks = self.config.depth - self.config.late_blocks
        tapped = x
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, of_t if number <= early_blocks else of_r)  # [B, L, W]
            if number == tap:
                tapped = x
        return self.final_norm(x), tapped

    def to_latents(self, hidden: Tensor) -> Tensor:
        """Hidden states of encode rows -> latents [E, L, C] of zero mean and unit variance over the channels."""
        return F.layer_norm(self.latent_head(hidden).float(), (self.config.latent_dim,), eps=LATENT_EPS)

    def to_z_hat(self, hidden: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Hidden states of denoise rows -> clean estimates [M, L, C].

        Not normalised: a conditional mean is shorter than the latents that it is the mean of.
        """
        out = self.latent_head(hidden).float()
        return out if self.config.prediction == "latents" else from_velocity(out, z_t, t[:, None, None])

    def to_images(self, hidden: Tensor) -> Tensor:
        """Hidden states of decode rows -> images [D, 3, S, S], nominally in [-1, 1], not clipped."""
        return unpatchify(self.pixel_head(hidden).float(), self.config.patch_size)

    # The three roles.

    def encode(self, images: Tensor) -> Tensor:
        """images [E, 3, S, S] in [-1, 1] -> latents [E, L, C]."""
        hidden, _ = self.trunk(*self.embed_images(images))
        return self.to_latents(hidden)

    def denoise(self, z_t: Tensor, t: Tensor, labels: Tensor, r: Tensor | None = None) -> Tensor:
        """Estimate the clean latents behind noised ones.

        z_t: [M, L, C], t: [M] in [0, 1) (0 = noise), labels: [M] in [0, num_classes], num_classes = no class.
        r: [M] in [t, 1], for flow maps alone: the velocity of the estimate then carries z_t to time r in one jump. None
        is r = t.
        Returns z_hat [M, L, C]; the velocity is (z_hat - z_t) / (1 - t), see flow.py.
        """
        hidden, _ = self.trunk(*self.embed_noised(z_t, t, labels, r))
        return self.to_z_hat(hidden, z_t, t)

    def decode(self, z: Tensor) -> Tensor:
        """latents [D, L, C] -> images [D, 3, S, S], not clipped."""
        hidden, _ = self.trunk(*self.embed_latents(z))
        return self.to_images(hidden)

    # The unified forward: what is exported and served.

    def forward(
        self,
        encode_pixels: Tensor,
        denoise_latents: Tensor,
        denoise_t: Tensor,
        denoise_labels: Tensor,
        decode_latents: Tensor,
        denoise_r: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All three kinds of rows through the same matrix products; any of E, M, D may be 0.

        encode_pixels uint8 [E, 3, S, S], denoise_latents [M, L, C], denoise_t [M], denoise_labels int64 [M],
        decode_latents [D, L, C], and of flow maps denoise_r [M]. Returns encoded_latents [E, L, C],
        denoised_latents [M, L, C] (z_hat) and decoded_pixels uint8 [D, 3, S, S].
        """
        parts = [
            self.embed_images(to_images(encode_pixels)),
            self.embed_noised(denoise_latents, denoise_t, denoise_labels, denoise_r),
            self.embed_latents(decode_latents),
        ]
        x = torch.cat([tokens for tokens, _ in parts])  # [E + M + D, L, W]
        c = torch.cat([conditioning for _, conditioning in parts])  # [E + M + D, K, W]
        hidden, _ = self.trunk(x, c)  # [E + M + D, L, W]
        encoded, denoised, decoded = hidden.split([tokens.shape[0] for tokens, _ in parts])
        return (
            self.to_latents(encoded),
            self.to_z_hat(denoised, denoise_latents, denoise_t),
            to_pixels(self.to_images(decoded)),
        )


def to_images(pixels: Tensor) -> Tensor:
    """uint8 pixels -> images in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """images, clipped to [-1, 1] -> uint8 pixels, rounded to the nearest."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def positions(grid_size: int, hidden_size: int) -> Tensor:
    """Fixed 2-D sine and cosine positions [L, W] of a square grid, as in MAE (arXiv 2111.06377)."""
    quarter = hidden_size // 4
    frequencies = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # [G, W / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [G, W / 2]
    rows = line[:, None].expand(-1, grid_size, -1)
    columns = line[None].expand(grid_size, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid_size**2, hidden_size).float()
