"""In place of Inception with its weights: a small network with the same interface, and random weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

GRID = 4  # an image is first averaged to 3 x GRID x GRID


class InceptionDouble:
    """Fixed random features of an image."""

    sizes = (12, 7)
    classes = 20
    version = "double"

    def __init__(self, path: Path, device: str = "cpu") -> None:
        rng = np.random.default_rng(0)
        self.weights = [rng.normal(size=(3 * GRID * GRID, width)) for width in (*self.sizes, self.classes)]

    def __call__(self, pixels: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], ...]:
        stacked = np.stack(pixels).astype(np.float64) / 64 - 2
        count, _, height, width = stacked.shape
        small = stacked.reshape(count, 3, GRID, height // GRID, GRID, width // GRID).mean((3, 5)).reshape(count, -1)
        return tuple((small @ matrix).astype(np.float32) for matrix in self.weights)


def write_random_weights(path: Path) -> None:
    """Random weights of the Inception network of torch-fidelity, which must be installed, as a .pth file."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network.__init__("random", ["2048"], feature_extractor_weights_path="none")  # type: ignore[misc]
    torch.save(network.state_dict(), path)
