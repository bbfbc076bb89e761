"""The metrics of evaluation against closed forms and plain, slow implementations."""

import numpy as np
import pytest

from dsd_serve.errors import InputError
from training.evaluation.distances import (
    KernelSet,
    Moments,
    blur,
    class_score,
    frechet,
    frechet_to,
    kid,
    latent_psnr,
    moments,
    precision_recall,
    spread,
    ssim,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def rotation(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def test_frechet_of_gaussians_that_share_their_axes(rng):
    """The distance is then |difference of means|^2 + the squared differences of the spreads."""
    axes = rotation(rng, 6)
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    mean = rng.standard_normal(6)
    first, second = Moments(mean, axes * a**2 @ axes.T), Moments(mean + 2, axes * b**2 @ axes.T)
    assert frechet(first, second) == pytest.approx(4 * 6 + ((a - b) ** 2).sum(), rel=1e-12)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_of_gaussians_in_two_dimensions_that_share_nothing():
    """tr (A B)^(1/2) of 2 x 2 matrices is (tr AB + 2 (det AB)^(1/2))^(1/2)."""
    a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    zero = np.zeros(2)
    assert frechet(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, rel=1e-12)
    assert frechet(Moments(zero, b), Moments(zero, a)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [5, 30, 200])
def test_the_fast_distance_of_few_images_is_the_same(rng, count):
    features = rng.standard_normal((count, 40)) * rng.uniform(0.1, 2, 40)
    real = moments(rng.standard_normal((100, 40)) + 0.3)
    assert frechet_to(features, real) == pytest.approx(frechet(moments(features), real), rel=1e-6)


def test_kid_follows_its_definition_and_is_zero_on_average_for_one_distribution(rng):
    x, y = rng.standard_normal((6, 8)), rng.standard_normal((5, 8)) + 1

    def kernel(a, b):
        return (a @ b / 8 + 1) ** 3

    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(KernelSet(x), KernelSet(y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-5)
    same = [kid(*(KernelSet(rng.standard_normal((50, 8))) for _ in "ab")) for _ in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(40)


def test_precision_and_recall_of_sets_that_are_known():
    real = np.array([[float(i), 0] for i in range(10)])
    near, far = real + np.array([0, 0.5]), real + np.array([0, 1000.0])
    assert precision_recall(near, real) == (1, 1)
    assert precision_recall(far, real) == (0, 0)
    few = np.concatenate([near[:2]] * 4)  # one corner of the real images: precise, but not diverse
    precision, recall = precision_recall(few, real)
    assert precision == 1
    assert recall < 0.5


def test_class_score_is_the_number_of_certain_classes():
    certain = np.log(np.eye(5).repeat(3, 0) + 1e-30)
    assert class_score(certain) == pytest.approx(5)
    assert class_score(np.full((7, 5), np.log(0.2))) == pytest.approx(1)


def test_ssim_of_equal_images_and_of_two_greys(rng):
    noise = rng.integers(0, 256, (3, 3, 16, 16), np.uint8)
    assert ssim(noise, noise) == pytest.approx(1)
    a, b, c1 = 100.0, 150.0, (0.01 * 255) ** 2
    grey = np.full((1, 3, 16, 16), 100, np.uint8), np.full((1, 3, 16, 16), 150, np.uint8)
    assert ssim(*grey) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))
    assert ssim(noise, 255 - noise) < 0


def test_ssim_of_one_window_is_its_formula(rng):
    x, y = (rng.integers(0, 256, (1, 1, 11, 11)).astype(np.uint8) for _ in range(2))
    line = np.exp(-(np.arange(-5.0, 6) ** 2) / 4.5)
    weights = np.outer(line, line) / line.sum() ** 2
    a, b = x[0, 0].astype(float), y[0, 0].astype(float)
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    both = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    assert ssim(x.repeat(3, 1), y.repeat(3, 1)) == pytest.approx(expected, rel=1e-9)


def test_latent_psnr_is_of_each_sample(rng):
    latents = rng.normal(size=(2, 4, 3))
    off = latents + np.array([0.1, 0.0])[:, None, None] * np.sqrt(np.square(latents).mean((1, 2)))[:, None, None]
    np.testing.assert_allclose(latent_psnr(off, latents), [20, 120])


def test_spread_is_within_classes(rng):
    """Two classes far apart, of which one does not vary: the root of half of the other's variance."""
    features, labels = np.zeros((400, 3)), np.repeat([5, 9], 200)
    features[:200] = rng.normal(size=(200, 3)) * 2 + 50
    assert spread(features, labels) == pytest.approx(np.sqrt(0.5 * 3 * 4), rel=0.1)
    assert spread(features[:3], np.arange(3)) is None


def test_blur_keeps_the_mean_and_lowers_the_contrast(rng):
    pixels = rng.integers(0, 256, (2, 3, 32, 32), np.uint8)
    soft = blur(pixels, 2.0)
    assert soft.dtype == np.uint8
    assert soft.shape == pixels.shape
    assert soft.mean() == pytest.approx(pixels.mean(), abs=3)
    assert soft.std() < pixels.std() / 4
    assert (blur(np.full((1, 3, 8, 8), 77, np.uint8), 1.0) == 77).all()


def test_wrong_inputs_get_a_sentence():
    one, small = np.zeros((1, 4)), np.zeros((1, 3, 8, 8), np.uint8)
    with pytest.raises(InputError, match="two images or more"):
        moments(one)
    with pytest.raises(InputError, match="two images or more"):
        KernelSet(one)
    with pytest.raises(InputError, match="more than 3 images"):
        precision_recall(one, one)
    with pytest.raises(InputError, match="11 pixels or more, got 8 x 8"):
        ssim(small, small)
    with pytest.raises(InputError, match="above 0 pixels"):
        blur(small, -1)
