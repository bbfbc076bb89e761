"""Metrics of latents: effective rank, spread, and the accuracy of a linear probe."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_serve.effective_rank import centred_rank, effective_rank
from dsd_serve.errors import InputError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, as shares of the mean energy of a direction
EVERY = 5  # every fifth image is a test image if there is no separate test set


def latent_statistics(latents: NDArray[np.float32]) -> dict[str, Any]:
    """Metrics of latents [N, L, C], N at least 2.

    effective_rank, centred_rank: 1 to C, see dsd_serve/effective_rank.py. channel_mean, channel_std: [C], over images
    and tokens.
    image_std: mean spread over images of a channel at one place, near 0 when all images get the same latents.
    """
    z = torch.from_numpy(np.asarray(latents, np.float32))
    tokens = z.flatten(0, 1).double()
    return {
        "images": len(z),
        "tokens": z.shape[1],
        "channels": z.shape[2],
        "effective_rank": effective_rank(latents),
        "centred_rank": centred_rank(latents),
        "image_std": float(z.std(0).mean()),
        "channel_mean": tokens.mean(0).tolist(),
        "channel_std": tokens.std(0).tolist(),
    }


def probe_accuracy(
    train: NDArray[np.float32],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float32],
    test_labels: NDArray[np.int64],
) -> float:
    """Accuracy of a linear classifier of latents [N, L, C] with labels [N] on the test images, 0 to 1.

    Ridge regression onto one column per class, in closed form and so deterministic. Its strength is the one of
    STRENGTHS with the best accuracy on every fifth training image; the smallest of equals.
    """
    classes, targets = np.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise InputError("a linear probe needs images of two classes or more")
    if len(train) < 2 * EVERY:
        raise InputError(f"a linear probe needs {2 * EVERY} training images or more, got {len(train)}")
    x, y = (side.reshape(len(side), -1).astype(np.float64) for side in (train, test))
    one_hot = np.eye(len(classes))[targets]
    rest = np.arange(len(x)) % EVERY != EVERY - 1
    trial = Ridge(x[rest], one_hot[rest])
    scores = [(trial.predict(x[~rest], strength).argmax(1) == targets[~rest]).mean() for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(scores))]
    predicted = classes[Ridge(x, one_hot).predict(y, best).argmax(1)]
    return float((predicted == test_labels).mean())


class Ridge:
    """Ridge regression of targets [N, K] on x [N, D] for any strength, from one singular value decomposition."""

    def __init__(self, x: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        self.mean, self.offset = x.mean(0), targets.mean(0)
        left, self.values, self.right = np.linalg.svd(x - self.mean, full_matrices=False)
        self.projected = left.T @ (targets - self.offset)

    def predict(self, x: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        """[M, D] -> [M, K]. strength: a share of the mean squared singular value."""
        energy = strength * float((self.values**2).mean())
        weights = (self.values / (self.values**2 + max(energy, 1e-12)))[:, None] * self.projected
        return (x - self.mean) @ self.right.T @ weights + self.offset


def split_every(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (train, test): every fifth image is a test image."""
    index = np.arange(count)
    held = index % EVERY == EVERY - 1
    return index[~held], index[held]
