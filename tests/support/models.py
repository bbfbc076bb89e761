"""Checkpoints of tiny networks with random weights: with classes of their own, without any, or with a flow map."""

from dataclasses import replace
from pathlib import Path

from dsd_serve.config import ModelConfig

NAMES = ("Grandma's cat", "金毛犬", "Café")
TINY = ModelConfig(image_size=16, patch_size=8, latent_dim=8, hidden_size=32, depth=2, num_heads=2)
OWN = replace(TINY, num_classes=len(NAMES), class_names=NAMES)
PLAIN = replace(TINY, num_classes=0)
FLOW_MAP = replace(OWN, depth=3, flow_map=True)


def write_checkpoint(config: ModelConfig, file: Path, step: int = 0) -> Path:
    """A checkpoint as dsd-train writes them, of an untrained network that draws differently for every class.

    step: also the seed of its weights.
    """
    import torch

    from dsd_serve import checkpoint
    from dsd_serve.network import DSD

    torch.manual_seed(step)
    model = DSD(config)
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.05)
    values = {"step": step, "network": config.to_dict(), "ema": model.state_dict(), "config": None}
    checkpoint.write_checkpoint(file, values)
    return file


def export_model(config: ModelConfig, folder: Path, *arguments: str) -> Path:
    """The model directory that dsd-export makes of such a checkpoint."""
    from export.main import main

    checkpoint = write_checkpoint(config, folder / "checkpoint.pt")
    main([str(checkpoint), "-o", str(folder / "model"), "--steps", "2", *arguments])
    return folder / "model"
