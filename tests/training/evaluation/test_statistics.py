"""Published statistics in all their forms; impossible ones get a sentence."""

import numpy as np
import pytest

from dsd_serve.errors import CheckpointError
from training.evaluation.statistics import described, read_statistics

SIZES = (6, 4)


def statistics(seed=0):
    """Mean and covariance of pool and of spatial features, by the names of ADM's files."""
    rng = np.random.default_rng(seed)
    found = {}
    for size, end in zip(SIZES, ("", "_s"), strict=True):
        features = rng.normal(size=(50, size))
        found |= {f"mu{end}": features.mean(0), f"sigma{end}": np.cov(features, rowvar=False)}
    return found


def read(path, **arrays):
    np.savez(path, **arrays)
    return read_statistics(path, SIZES)


def test_the_forms_in_which_statistics_are_published(tmp_path):
    path = tmp_path / "s.npz"
    both = statistics()
    pool = {name: both[name] for name in ("mu", "sigma")}
    only_pool = read(path, **pool)
    assert np.array_equal(only_pool.pool.mean, both["mu"]) and only_pool.spatial is None
    assert described(only_pool) == {"name": "s.npz", "sha256": only_pool.sha256}
    images = np.zeros((3, 8, 8, 3), np.uint8)
    adm = read(path, arr_0=images, **both)
    assert np.allclose(adm.spatial.covariance, both["sigma_s"], rtol=1e-12)
    assert (adm.images, adm.size) == (3, 8)
    assert adm.sha256 != only_pool.sha256
    assert read(path, arr_0=images).pool is None, "to be computed"
    single = read(path, **{name: value.astype(np.float32) for name, value in pool.items()})
    assert single.pool.covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mu": np.zeros(5)}, r"mu must be an array of floats of shape \(6,\).*got float64 of shape \(5,\)"),
        ({"mu": np.zeros(6, np.int64)}, "got int64"),
        ({"sigma": np.ones((6, 5))}, r"sigma must be .* of shape \(6, 6\)"),
        ({"mu": np.full(6, np.nan)}, "mu has values that are not finite"),
        ({"sigma": np.full((6, 6), np.inf)}, "sigma has values that are not finite"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "it is not symmetric"),
        ({"sigma": np.diag([1.0, 1, 1, 1, 1, -1])}, "negative eigenvalue -1"),
        ({"mu_s": np.zeros(6)}, r"mu_s must be .* shape \(4,\)"),
        ({"mu": np.array([None] * 6)}, "a pickle"),
    ],
)
def test_impossible_statistics_get_a_sentence(tmp_path, change, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path / "s.npz", **{**statistics(), **change})


def test_a_file_of_something_else_gets_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold statistics as arrays mu and sigma.*: x, y"):
        read(tmp_path / "s.npz", x=np.zeros(2), y=np.zeros(2))
