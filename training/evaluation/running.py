"""Sums over images in constant memory: mean and covariance of features, and the Inception score."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import InputError
from training.evaluation.distances import Features, Moments

SPLIT = 5000  # images of a split of the Inception score, as in ADM's evaluator


class RunningMoments:
    """Mean and unbiased covariance of features [N, D] that arrive in pieces: two sums in float64.

    The features are taken relative to the mean of the first piece. Without that the covariance, the difference of two
    large sums, would lose digits where the mean is much larger than the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.origin: NDArray[np.float64] | None = None

    def add(self, features: Features) -> None:
        exact = np.asarray(features, np.float64)
        if self.origin is None:
            self.origin = exact.mean(0)
            self.sum = np.zeros(exact.shape[1])
            self.products = np.zeros((exact.shape[1], exact.shape[1]))
        exact = exact - self.origin
        self.count += len(exact)
        self.sum += exact.sum(0)
        self.products += exact.T @ exact

    def moments(self) -> Moments:
        """Raises InputError for fewer than two images."""
        if self.count < 2 or self.origin is None:
            raise InputError(f"a distance needs two images or more on each side, got {self.count}")
        offset = self.sum / self.count
        covariance = (self.products - np.outer(self.sum, offset)) / (self.count - 1)
        return Moments(self.origin + offset, covariance)


class RunningScore:
    """The Inception score (arXiv 1606.03498) as ADM's evaluator defines it: the mean over splits of 5000 images.

    ADM splits the images in the order of the file. In a folder that order is the order of the classes, and a split of
    few classes scores low. So here a hash of an image's pixels decides its split: at random, and the same in every
    order and file format. Splits then have about, not exactly, 5000 images.
    """

    def __init__(self, images: int) -> None:
        self.splits = max(1, -(-images // SPLIT))
        self.counts = np.zeros(self.splits, np.int64)
        self.sum: NDArray[np.float64] | None = None  # of the class probabilities, [splits, K]
        self.entropy = np.zeros(self.splits)  # the sum of p log p

    def add(self, logits: Features, splits: Sequence[int]) -> None:
        """logits [N, K], and the split of each image."""
        exact = np.asarray(logits, np.float64)
        exact = exact - exact.max(1, keepdims=True)
        log_p = exact - np.log(np.exp(exact).sum(1, keepdims=True))
        p = np.exp(log_p)
        if self.sum is None:
            self.sum = np.zeros((self.splits, p.shape[1]))
        np.add.at(self.counts, splits, 1)
        np.add.at(self.sum, splits, p)
        np.add.at(self.entropy, splits, (p * log_p).sum(1))

    def scores(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits. Raises InputError without images."""
        if self.sum is None:
            raise InputError("the Inception score needs an image or more, got none")
        used = self.counts > 0
        counts = self.counts[used]
        marginal = self.sum[used] / counts[:, None]
        log_marginal = np.log(np.maximum(marginal, 1e-300))
        values = np.exp(self.entropy[used] / counts - (marginal * log_marginal).sum(1))
        return float(values.mean()), float(values.std())


def split_of(pixels: NDArray[np.uint8], splits: int) -> int:
    """The split of an image, a number below `splits`."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % splits
