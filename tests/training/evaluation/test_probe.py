import numpy as np
import pytest

from dsd_serve.errors import InputError
from training.evaluation.probe import Ridge, latent_statistics, probe_accuracy, split_every


def test_the_probe_reads_linear_classes_and_nothing_from_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400) + 100
    directions = rng.standard_normal((4, 6, 5))
    latents = (directions[labels - 100] + 0.5 * rng.standard_normal((400, 6, 5))).astype(np.float32)
    train, test = split_every(400)
    assert len(test) == 80
    assert not set(train) & set(test)
    accuracy = probe_accuracy(latents[train], labels[train], latents[test], labels[test])
    assert accuracy > 0.95
    assert accuracy == probe_accuracy(latents[train], labels[train], latents[test], labels[test]), "nothing is random"
    noise = rng.standard_normal((400, 6, 5)).astype(np.float32)
    assert probe_accuracy(noise[train], labels[train], noise[test], labels[test]) < 0.5


def test_ridge_solves_the_normal_equations():
    rng = np.random.default_rng(1)
    x, y, new = rng.standard_normal((30, 4)), rng.standard_normal((30, 2)), rng.standard_normal((5, 4))
    ridge = Ridge(x, y)
    centred = x - x.mean(0)
    energy = 0.1 * np.trace(centred.T @ centred) / 4
    weights = np.linalg.solve(centred.T @ centred + energy * np.eye(4), centred.T @ (y - y.mean(0)))
    assert np.allclose(ridge.predict(new, 0.1), (new - x.mean(0)) @ weights + y.mean(0))


def test_the_statistics_of_known_latents():
    rng = np.random.default_rng(2)
    z = rng.standard_normal((500, 4, 3)).astype(np.float32) * [1, 2, 3] + [0, 5, 0]
    statistics = latent_statistics(z.astype(np.float32))
    assert (statistics["images"], statistics["tokens"], statistics["channels"]) == (500, 4, 3)
    assert np.allclose(statistics["channel_mean"], [0, 5, 0], atol=0.25)
    assert np.allclose(statistics["channel_std"], [1, 2, 3], rtol=0.08)
    assert statistics["image_std"] == pytest.approx(2, rel=0.08)
    assert statistics["effective_rank"] < 3
    constant = latent_statistics(np.ones((20, 4, 3), np.float32))
    assert constant["effective_rank"] == pytest.approx(1)
    assert constant["image_std"] == 0


def test_too_few_images_for_a_probe_get_a_sentence():
    z, labels = np.zeros((8, 2, 2), np.float32), np.array([1, 2] * 4)
    with pytest.raises(InputError, match="10 training images or more, got 8"):
        probe_accuracy(z, labels, z, labels)
    with pytest.raises(InputError, match="two classes"):
        probe_accuracy(z, labels * 0, z, labels)
