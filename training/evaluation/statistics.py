"""Statistics of real images, as papers publish them: mean and covariance of Inception features in an .npz file.

- mu [2048] and sigma [2048, 2048]: JiT, pytorch-fid, clean-fid and others;
- the same with mu_s [2023] and sigma_s [2023, 2023] of spatial features, for sFID, and often the images as arr_0:
  the reference batches of ADM, which DiT, SiT and many others use too;
- arr_0 alone, uint8 [N, H, W, 3]: their statistics are computed with the network of the samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.checkpoint import sha256
from dsd_serve.errors import CheckpointError
from training.evaluation.distances import Moments
from training.evaluation.npz import Npz

TOLERANCE = 1e-4  # relative asymmetry and negative eigenvalues of a covariance, which rounding explains


@dataclass(frozen=True)
class Statistics:
    """The statistics with which samples are compared. pool, spatial: None if the file has none.

    images, size: number and side in pixels of the images in the file, 0 without images. ADM's files hold 10,000
    beside the statistics of the whole training set.
    """

    name: str
    sha256: str
    pool: Moments | None
    spatial: Moments | None
    images: int = 0
    size: int = 0


def read_statistics(path: Path, sizes: tuple[int, int]) -> Statistics:
    """The statistics of a file. sizes: the numbers of pool and spatial features of the network.

    Raises CheckpointError for a file of another form, and for impossible values.
    """
    with Npz(path) as arrays:
        has_pool = {"mu", "sigma"} <= set(arrays.members)
        if not has_pool and "arr_0" not in arrays.members:
            found = ", ".join(list(arrays.members)[:5]) or "none"
            raise CheckpointError(
                f"{path} must hold statistics as arrays mu and sigma, or images as arr_0; its arrays: {found[:200]}"
            )
        pool = read_moments(arrays, "mu", "sigma", sizes[0]) if has_pool else None
        has_spatial = {"mu_s", "sigma_s"} <= set(arrays.members)
        spatial = read_moments(arrays, "mu_s", "sigma_s", sizes[1]) if has_spatial else None
        images = size = 0
        if "arr_0" in arrays.members and len(shape := arrays.header("arr_0").shape) == 4:
            images, size = shape[0], shape[1]
    return Statistics(path.name, sha256(path), pool, spatial, images, size)


def read_moments(arrays: Npz, mean_name: str, covariance_name: str, size: int) -> Moments:
    """Mean [size] and covariance [size, size] in float64, checked."""
    mean = numbers(arrays, mean_name, (size,))
    covariance = numbers(arrays, covariance_name, (size, size))
    scale = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > TOLERANCE * max(scale, 1e-30):
        raise CheckpointError(f"{arrays.path}: {covariance_name} is not a covariance: it is not symmetric")
    covariance = (covariance + covariance.T) / 2
    values = np.linalg.eigvalsh(covariance)
    if values[0] < -TOLERANCE * max(values[-1], 1e-30):
        raise CheckpointError(
            f"{arrays.path}: {covariance_name} is not a covariance: it has the negative eigenvalue {values[0]:.3g}"
        )
    return Moments(mean, covariance)


def numbers(arrays: Npz, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    header = arrays.header(name)
    if header.shape != shape or header.dtype.kind != "f":
        raise CheckpointError(
            f"{arrays.path}: {name} must be an array of floats of shape {shape}, as of the Inception network of FID, "
            f"got {header.dtype} of shape {header.shape}"
        )
    values = arrays.array(name).astype(np.float64)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{arrays.path}: {name} has values that are not finite")
    return values


def described(statistics: Statistics) -> dict[str, Any]:
    """The entry of the report."""
    images = {"images_in_file": statistics.images, "size": statistics.size} if statistics.images else {}
    return {"name": statistics.name, "sha256": statistics.sha256, **images}
