"""The Inception network of FID, by torch-fidelity, and the standard metrics of sets of images on its features.

The user gives the path of the weights: torch-fidelity's .pth (weights-inception-2015-12-05-6726825d.pth), or the same
as .safetensors. Nothing is downloaded. Only tensors are read, never a pickle with code.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dsd_serve.errors import CheckpointError, EngineUnavailableError

SUBSET = 1000  # images of a KID subset, the usual size
NEIGHBOURS = 3
NAMES = {
    "frechet_inception_distance": "fid",
    "inception_score_mean": "inception_score",
    "inception_score_std": "inception_score_std",
    "kernel_inception_distance_mean": "kid",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
}


def load_fidelity() -> Any:
    """The package torch_fidelity. Raises EngineUnavailableError if it cannot be imported."""
    try:
        import torch_fidelity
    except ImportError as error:
        raise EngineUnavailableError(
            f"--inception needs torch-fidelity, which cannot be imported ({error}): pip install '.[fidelity]'"
        ) from None
    except RuntimeError as error:  # torchvision built for another torch
        raise EngineUnavailableError(
            "--inception needs torch-fidelity, and it needs torchvision, which does not fit this torch "
            f"({' '.join(str(error).split())[:120]}): install the build of torchvision that belongs to "
            f"torch {torch.__version__}"
        ) from None
    return torch_fidelity


def read_inception(path: Path) -> io.BytesIO:
    """The weights of a .pth or .safetensors file as an in-memory .pth of tensors only. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            f"there are no Inception weights {path}; torch-fidelity publishes them as "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is refused: it holds something other than tensors, or is damaged") from None
    except Exception as error:  # torch and safetensors raise anything on broken files
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(weights, dict) or "Conv2d_1a_3x3.conv.weight" not in weights:
        raise CheckpointError(f"{path} does not hold the Inception network of torch-fidelity")
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    buffer.seek(0)
    return buffer


class Pixels(Dataset[Tensor]):
    """Images uint8 [N, 3, S, S] as a data set for torch-fidelity."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[index])


class InceptionNetwork:
    """The network itself, for features of images that arrive in batches. Calls give float32 arrays:

    pool [N, 2048] for FID; spatial [N, 2023] for sFID, the first 7 channels of the 17 x 17 map `mixed_6/conv`, as ADM's
    evaluator takes them; logits [N, 1008] without bias for the Inception score.
    """

    sizes = (2048, 2023)  # features of an image, pool and spatial

    def __init__(self, path: Path, device: str = "cpu") -> None:
        fidelity, weights = load_fidelity(), read_inception(path)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.version, self.device = str(fidelity.__version__), torch.device(device)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            ).to(self.device)
        except RuntimeError as error:  # of load_state_dict
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} does not hold the Inception network of torch-fidelity: {reason}") from None
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep)

    def keep(self, _: object, __: object, maps: Tensor) -> None:
        self.spatial = maps[:, :7].permute(0, 2, 3, 1).flatten(1)  # ADM's order: rows, columns, channels

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], ...]:
        """Images uint8 [3, H, W] of one size. The network scales them to 299 x 299 as TensorFlow 1 does."""
        pool, logits = self.network(torch.from_numpy(np.stack(pixels)).to(self.device))
        assert self.spatial is not None
        return pool.cpu().numpy(), self.spatial.float().cpu().numpy(), logits.cpu().numpy()


class Inception:
    """The metrics of torch-fidelity with the weights of a file; package and weights are checked at construction."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.fidelity, self.weights, self.device = load_fidelity(), read_inception(path), device

    def compare(self, samples: NDArray[np.uint8], real: NDArray[np.uint8]) -> dict[str, Any]:
        """The metrics of samples against real images, both uint8 [N, 3, S, S], with the counts of both."""
        self.weights.seek(0)
        fewest = min(len(samples), len(real))
        metrics = self.fidelity.calculate_metrics(
            input1=Pixels(samples),
            input2=Pixels(real),
            cuda=self.device.startswith("cuda"),
            isc=True,
            fid=True,
            kid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            feature_extractor_weights_path=self.weights,
            kid_subset_size=min(SUBSET, fewest),
            prc_neighborhood=NEIGHBOURS,
            save_cpu_ram=True,
            cache=False,
            verbose=True,
        )
        numbers = {ours: float(metrics[theirs]) for theirs, ours in NAMES.items()}
        return {"images": len(samples), "reference_images": len(real), **numbers}
