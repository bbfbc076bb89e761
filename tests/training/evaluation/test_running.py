"""Moments and scores that are summed piece by piece are those of the formulas of ADM, torch-fidelity and numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve.errors import InputError
from training.evaluation.distances import frechet, moments
from training.evaluation.running import RunningMoments, RunningScore, split_of


def summed(features, piece):
    running = RunningMoments()
    for begin in range(0, len(features), piece):
        running.add(features[begin : begin + piece])
    return running.moments()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 300), st.integers(1, 20), st.integers(1, 70), st.floats(-1e4, 1e4), st.integers(0, 1000))
def test_moments_are_those_of_the_whole_set(count, size, piece, centre, seed):
    features = (np.random.default_rng(seed).normal(size=(count, size)) + centre).astype(np.float32)
    found, whole = summed(features, piece), moments(features)
    assert np.allclose(found.mean, whole.mean, rtol=1e-12, atol=1e-12)
    assert np.allclose(found.covariance, whole.covariance, rtol=1e-8, atol=1e-10)


def test_a_distance_needs_two_images():
    running = RunningMoments()
    with pytest.raises(InputError, match="two images or more on each side, got 0"):
        running.moments()
    running.add(np.zeros((1, 3)))
    with pytest.raises(InputError, match="got 1"):
        running.moments()


def gaussians_with_a_common_basis(size, seed):
    """Two sets of moments with covariances that commute, and their distance in closed form."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    spreads = rng.uniform(0.1, 3, size=(2, size))
    means = rng.normal(size=(2, size))
    distance = ((means[0] - means[1]) ** 2).sum() + ((spreads[0] - spreads[1]) ** 2).sum()
    return means, [basis @ np.diag(spread**2) @ basis.T for spread in spreads], distance


def samples_with_moments(mean, covariance, count, rng):
    """Samples with exactly this mean and unbiased covariance."""
    raw = rng.normal(size=(count, len(mean)))
    raw -= raw.mean(0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_of_commuting_gaussians_is_the_closed_form(seed):
    means, covariances, distance = gaussians_with_a_common_basis(24, seed)
    rng = np.random.default_rng(seed)
    sides = [samples_with_moments(m, c, 500, rng) for m, c in zip(means, covariances, strict=True)]
    assert frechet(summed(sides[0], 64), summed(sides[1], 50)) == pytest.approx(distance, rel=1e-9)


def distance_by_eigenvalues(a, b):
    """torch-fidelity's formula: the trace of the root is the sum of the roots of the eigenvalues of the product."""
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).astype(complex)).real.sum()
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots


def distance_by_root(a, b, root, eps=1e-6):
    """The formula of ADM's evaluator: the trace of a root of the product, of shifted covariances where that fails."""
    product = root(a.covariance @ b.covariance)
    if not np.isfinite(product).all():
        shift = eps * np.eye(len(a.mean))
        product = root((a.covariance + shift) @ (b.covariance + shift))
    trace = np.trace(product).real
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace


def root_by_iteration(matrix):
    """A root of a matrix without scipy, by Denman and Beavers' iteration."""
    root, inverse = matrix, np.eye(len(matrix))
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    return root


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_of_any_gaussians_is_that_of_the_published_formulas(seed):
    rng = np.random.default_rng(seed)
    a, b = (summed(rng.normal(size=(400, 16)) @ rng.normal(size=(16, 16)), 64) for _ in range(2))
    assert frechet(a, b) == pytest.approx(distance_by_eigenvalues(a, b), rel=1e-6)
    assert frechet(a, b) == pytest.approx(distance_by_root(a, b, root_by_iteration), rel=1e-6)


@pytest.mark.parametrize("rank", [64, 20])
def test_the_distance_is_that_of_scipy_and_torch_fidelity(rank):
    """Also for covariances without full rank, where the root of the product is ill-conditioned."""
    linalg = pytest.importorskip("scipy.linalg")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    rng = np.random.default_rng(rank)
    a, b = (summed(rng.normal(size=(500, rank)) @ rng.normal(size=(rank, 64)), 64) for _ in range(2))
    found = frechet(a, b)
    assert found == pytest.approx(distance_by_root(a, b, linalg.sqrtm), rel=1e-4)
    theirs = metric_fid.fid_statistics_to_metric(
        {"mu": a.mean, "sigma": a.covariance}, {"mu": b.mean, "sigma": b.covariance}, False
    )
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def score_by_parts(logits, parts):
    """The formula of ADM's evaluator: exp of the mean divergence from the mean of a part, averaged over the parts."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in parts:
        divergence = (p[part] * (np.log(p[part]) - np.log(p[part].mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return np.mean(scores), np.std(scores)


def test_the_score_is_that_of_adm_over_the_same_splits():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(12_000, 10)) * 2
    splits = rng.integers(0, 3, 12_000)
    running = RunningScore(12_000)
    assert running.splits == 3, "of 5000 images or fewer"
    for begin in range(0, 12_000, 700):
        running.add(logits[begin : begin + 700], splits[begin : begin + 700])
    expected = score_by_parts(logits, [splits == split for split in range(3)])
    assert running.scores() == pytest.approx(expected, rel=1e-9)


def test_the_score_of_certain_and_of_equal_images():
    certain = RunningScore(8)
    certain.add(np.eye(4).repeat(2, 0) * 1e4, [0] * 8)
    assert certain.scores()[0] == pytest.approx(4), "four classes, each image sure of one"
    equal = RunningScore(8)
    equal.add(np.tile([1.0, 2.0], (8, 1)), [0] * 8)
    assert equal.scores() == (pytest.approx(1), 0)
    with pytest.raises(InputError, match="got none"):
        RunningScore(8).scores()


def test_the_split_of_an_image_depends_on_its_pixels_only():
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, 4, 4)).astype(np.uint8)
    splits = [split_of(image, 10) for image in images]
    assert splits[::-1] == [split_of(image.transpose(1, 2, 0).copy().transpose(2, 0, 1), 10) for image in images[::-1]]
    counts = np.bincount(splits, minlength=10)
    assert counts.min() > 140 and counts.max() < 260, counts
