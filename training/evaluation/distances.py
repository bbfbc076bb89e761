"""Distances between sets of images, computed from their features, and the similarity of image pairs (SSIM).

Features are float [N, D] of any network, a row per image. No metric compares across networks or sample counts: the
Frechet distance of few samples is biased upwards, so it is always reported with its counts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dsd_serve.errors import InputError

Features = NDArray[Any]  # float [N, D]
CHUNK = 2048  # rows of a kernel or distance matrix at a time
NEIGHBOURS = 3  # as arXiv 1904.06991


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def moments(features: Features) -> Moments:
    """Mean and unbiased covariance in float64; InputError for fewer than two images."""
    if len(features) < 2:
        raise InputError(f"a distance needs two images or more on each side, got {len(features)}")
    exact = np.asarray(features, np.float64)
    return Moments(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)))


def latent_psnr(latents: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """How close each of N latents [N, L, C] is to the reference's, [N] in dB: 10 log10 of the reference's mean square
    over that of the difference; at most 120."""
    exact = np.asarray(reference, np.float64)
    error = np.square(latents - exact).mean((1, 2))
    return np.minimum(120.0, 10 * np.log10(np.square(exact).mean((1, 2)) / np.maximum(error, 1e-300)))


def spread(features: Features, labels: NDArray[np.int64]) -> float | None:
    """How far images of a class differ: root of the mean over classes of their unbiased mean square distance from the
    mean of the class. None unless a class has two images or more."""
    groups = [np.asarray(features[labels == label], np.float64) for label in np.unique(labels)]
    variances = [group.var(0, ddof=1).sum() for group in groups if len(group) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else None


def frechet(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), the squared Frechet distance of two Gaussians.

    At least 0. After Dowson and Landau (1982). tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), whose argument is
    positive semidefinite: two symmetric eigenvalue problems, whereas a root of the product itself may come out complex.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(product, 0)).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(max(distance, 0.0))  # rounding can make it slightly negative


def frechet_to(features: Features, real: Moments) -> float:
    """`frechet` of features [N, D] to a set: the same value, much faster for fewer images than features.

    With the covariance A = X' X / (N - 1) of centred features, A B has the eigenvalues of X B X' / (N - 1), N by N.
    """
    if not 2 <= len(features) <= features.shape[1]:
        return frechet(moments(features), real)
    exact = np.asarray(features, np.float64)
    mean = exact.mean(0)
    x = (exact - mean) / np.sqrt(len(exact) - 1)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(x @ real.covariance @ x.T), 0)).sum()
    difference = mean - real.mean
    return float(max(difference @ difference + (x * x).sum() + np.trace(real.covariance) - 2 * cross, 0.0))


class KernelSet:
    """Features [N, D] with the mean of their kernel over pairs, computed once for comparisons with many sets."""

    def __init__(self, features: Features) -> None:
        count, size = features.shape
        if count < 2:
            raise InputError(f"a distance needs two images or more on each side, got {count}")
        self.scaled = np.asarray(features, np.float32) / np.float32(np.sqrt(size))
        self.within = (kernel_sum(self.scaled, self.scaled) - kernel_diagonal(self.scaled)) / (count * (count - 1))


def kid(a: KernelSet, b: KernelSet) -> float:
    """Kernel distance: the unbiased squared MMD with the kernel (x y / D + 1)^3 of KID (arXiv 1801.01401).

    Over all pairs of images, where KID averages over random subsets: the same expectation, deterministic. It may come
    out slightly below 0 for sets of one distribution.
    """
    between = kernel_sum(a.scaled, b.scaled) / (len(a.scaled) * len(b.scaled))
    return float(a.within + b.within - 2 * between)


def kernel_sum(x: Features, y: Features) -> float:
    """Sum of the kernel over all pairs of rows. Products in float32, whose errors average out; sums in float64."""
    return float(sum(((x[i : i + CHUNK] @ y.T + 1) ** 3).sum(dtype=np.float64) for i in range(0, len(x), CHUNK)))


def kernel_diagonal(x: Features) -> float:
    return float((((x * x).sum(1) + 1) ** 3).sum(dtype=np.float64))


def check_enough(samples: int, real: int, neighbours: int = NEIGHBOURS) -> None:
    """Raise InputError if `precision_recall` cannot compare so many images."""
    if min(samples, real) <= neighbours:
        raise InputError(f"precision and recall need more than {neighbours} images a side, got {samples} and {real}")


def precision_recall(samples: Features, real: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision, the share of samples within the real set, and recall, the share of real images within the samples.

    arXiv 1904.06991. A set covers a ball around each of its images, up to that image's `neighbours`-th nearest
    neighbour in the set. Both values are from 0 to 1 and depend on the counts of both sets. Raises InputError for too
    few images.
    """
    check_enough(len(samples), len(real), neighbours)
    return covered(samples, real, neighbours), covered(real, samples, neighbours)


def covered(points: Features, balls: Features, neighbours: int) -> float:
    """The share of points [N, D] that lie in a ball around one of `balls` [M, D]."""
    middle = np.asarray(balls, np.float64).mean(0)
    x, y = (torch.from_numpy((side - middle).astype(np.float32)) for side in (points, balls))
    # + 1 because the nearest neighbour of an image in its own set is the image itself.
    radii = torch.cat([squared_distances(part, y).kthvalue(neighbours + 1).values for part in y.split(CHUNK)])
    inside = [(squared_distances(part, y) <= radii).any(1) for part in x.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By matrix products, for points centred at 0: far from it the result is lost to cancellation."""
    return ((x * x).sum(1)[:, None] - 2 * (x @ y.T) + (y * y).sum(1)).clamp(min=0)


def class_score(log_probabilities: Features) -> float:
    """exp of the mean KL divergence of each image's class distribution from the marginal one: the Inception score.

    arXiv 1606.03498. log_probabilities: [N, K], normalised. The score ranges from 1, all images alike, to K.
    """
    log_p = np.asarray(log_probabilities, np.float64)
    p = np.exp(log_p)
    marginal = np.log(np.maximum(p.mean(0), 1e-300))
    return float(np.exp((p * (log_p - marginal)).sum(1).mean()))


def gaussian(sigma: float, reach: int) -> torch.Tensor:
    """Weights [2 reach + 1] of a Gaussian window, float64; they sum to 1."""
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    return line / line.sum()


def smoothed(x: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """[N, 1, H, W] -> [N, 1, H - 2 reach, W - 2 reach]: the convolution with a separable window, without padding."""
    return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))


@torch.inference_mode()
def blur(pixels: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    """Images uint8 [N, 3, H, W] blurred by a Gaussian of `sigma` pixels, with replicated borders."""
    if sigma <= 0:
        raise InputError(f"the sigma of a blur must be above 0 pixels, got {sigma:g}")
    reach = int(np.ceil(3 * sigma))
    line = gaussian(sigma, reach).float()
    parts = []
    for begin in range(0, len(pixels), 256):
        x = torch.from_numpy(pixels[begin : begin + 256]).float().flatten(0, 1)[:, None]
        soft = smoothed(F.pad(x, (reach,) * 4, mode="replicate"), line)
        parts.append(soft.round().clamp(0, 255).byte().view(-1, *pixels.shape[1:]).numpy())
    return np.concatenate(parts)


WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, its authors' values


@torch.inference_mode()
def ssim(pixels: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    """Mean structural similarity of images uint8 [N, 3, H, W], per channel: at most 1, for equal images.

    Wang, Bovik, Sheikh and Simoncelli (2004): Gaussian windows of 11 pixels with sigma 1.5, only whole windows.
    """
    if min(pixels.shape[2:]) < WINDOW:
        raise InputError(f"SSIM needs images of {WINDOW} pixels or more, got {pixels.shape[2]} x {pixels.shape[3]}")
    parts = [
        ssim_of(torch.from_numpy(pixels[i : i + 256]), torch.from_numpy(others[i : i + 256]))
        for i in range(0, len(pixels), 256)
    ]
    return float(torch.cat(parts).mean())


def ssim_of(pixels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair of images: uint8 [B, 3, H, W] twice -> float64 [B]."""
    line = gaussian(SIGMA, WINDOW // 2)
    x, y = (side.double().flatten(0, 1)[:, None] for side in (pixels, others))  # [3B, 1, H, W]
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    mean_x, mean_y = smoothed(x, line), smoothed(y, line)
    var_x, var_y = smoothed(x * x, line) - mean_x**2, smoothed(y * y, line) - mean_y**2
    covariance = smoothed(x * y, line) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1).view(len(pixels), -1).mean(1)
