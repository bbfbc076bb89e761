"""Paths and data of the tests: generated images, the smallest network, and real images if available."""

import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("DSD_DATA", ROOT.parent / "shared" / "data"))
CLASSES = (1, 207, 950)

# The smallest network that still has every part.
TINY = ["model.image_size=16", "model.hidden_size=32", "model.depth=2", "model.num_heads=2", "model.latent_dim=8"]


def sample_image(label: int, number: int, size: int = 24) -> np.ndarray:
    """An image with a colour and a stripe that depend on its label, and some noise: uint8 [3, size, size]."""
    rng = np.random.default_rng([label, number])
    pixels = np.full((3, size, size), 40, np.int64)
    pixels[label % 3] += 120
    pixels[:, :, rng.integers(size) :] += 40
    return np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8)


def train_arguments(folder: Path, *overrides: str) -> list[str]:
    return [
        *TINY,
        f"data.path={folder}",
        f"data.validation={folder}",
        f"data.classes={list(CLASSES)}",
        "optim.batch_size=8",
        "optim.micro_batch_size=4",
        "optim.warmup_steps=2",
        "run.compile=off",
        "run.device=cpu",
        "run.eval_images=8",
        "run.samples_per_class=1",
        "run.sample_steps=2",
        *overrides,
    ]
