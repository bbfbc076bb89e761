"""The offline reference: diffusers' DiT of the network's size with random weights, in eager torch, in a plain loop.

Same width, depth, heads and number of tokens. It has no HTTP, no image encoding and no autoencoder, all of which are in
its favour. Batches hold requests of equal steps and guidance, as the pipelines of diffusers require.

python -m benchmarks.serving.reference MODEL SECONDS prints JSON.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.load import percentile
from benchmarks.serving.workload import GUIDANCE, KINDS, Body, requests
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.config import ModelConfig

BATCH_SIZES = (4, 14)  # 14: all unguided requests of one kind among 60


class DiT:
    """DiTTransformer2DModel with Euler's method."""

    def __init__(self, config: ModelConfig) -> None:
        import torch
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        torch.manual_seed(0)
        self.torch, self.config = torch, config
        self.shape = (config.latent_dim, config.grid_size, config.grid_size)
        self.network = DiTTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.latent_dim,
            num_layers=config.depth,
            sample_size=config.grid_size,
            patch_size=1,
            num_embeds_ada_norm=config.num_classes,
        ).eval()

    def generate(self, labels: Sequence[int], steps: int, guidance: float) -> Any:
        """Latents [B, C, H, W] of images with equal settings."""
        torch = self.torch
        with torch.inference_mode():
            z = torch.randn(len(labels), *self.shape)
            classes = torch.tensor(labels)
            if guidance != 1:
                classes = torch.cat([classes, torch.full_like(classes, self.config.num_classes)])
            for i in range(steps):
                t = torch.full((len(classes),), 1000 * (1 - i / steps))
                x = z if guidance == 1 else torch.cat([z, z])
                v = self.network(x, timestep=t, class_labels=classes).sample
                if guidance != 1:
                    conditional, unconditional = v.chunk(2)
                    v = unconditional + guidance * (conditional - unconditional)
                z = z + v / steps
            return z


def batches(bodies: Sequence[Body], size: int) -> list[list[Body]]:
    """Batches of at most `size` requests with equal settings."""

    def settings(body: Body) -> tuple[int, float]:
        return body["steps"], body["guidance"]

    groups = [list(group) for _, group in itertools.groupby(sorted(bodies, key=settings), settings)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def images_per_second(dit: DiT, bodies: Sequence[Body], size: int) -> float:
    began = time.perf_counter()
    for batch in batches(bodies, size):
        dit.generate([body["class"] for body in batch], batch[0]["steps"], batch[0]["guidance"])
    return len(bodies) / (time.perf_counter() - began)


def measure(config: ModelConfig, seconds: float) -> dict[str, Any]:
    """Images/s of the best batch size over the benchmark's mix, and the latency of one image of 25 steps."""
    dit = DiT(config)
    dit.generate([1], 10, GUIDANCE)
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds / 2
    while time.perf_counter() < deadline or len(latencies) < 3:
        began = time.perf_counter()
        dit.generate([1], 25, 1.0)
        latencies.append(time.perf_counter() - began)
    bodies = list(itertools.islice(requests(config.drawable_labels), len(KINDS)))
    rates = {size: images_per_second(dit, bodies, size) for size in BATCH_SIZES}
    best = max(rates, key=rates.__getitem__)
    parameters = sum(p.numel() for p in dit.network.parameters())
    return {"rate": rates[best], "batch_size": best, "p50": percentile(latencies, 50), "parameters": parameters}


if __name__ == "__main__":
    print(json.dumps(measure(read_model_dir(Path(sys.argv[1])).config, float(sys.argv[2]))))
