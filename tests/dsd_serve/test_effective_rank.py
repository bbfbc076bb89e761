"""Effective rank of known spectra."""

import numpy as np
import pytest

from dsd_serve.effective_rank import centred_rank, effective_rank

RNG = np.random.default_rng


def test_effective_rank_of_known_spectra():
    white = RNG(0).standard_normal((500, 16, 8), np.float32)
    assert 7.9 < centred_rank(white) <= 8
    assert 7.9 < effective_rank(white) <= 8
    line = RNG(1).standard_normal((500, 16, 1)) * np.arange(1.0, 9.0)
    assert centred_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(np.zeros((3, 4, 8))) == pytest.approx(1)
    assert effective_rank(np.eye(8)) == pytest.approx(8)


def test_nearly_constant_latents_have_a_low_effective_rank():
    """A constant with a little white noise; centring would magnify the noise."""
    constant = RNG(0).standard_normal((1, 1, 8))
    collapsed = constant / constant.std() + 0.01 * RNG(1).standard_normal((500, 16, 8))
    assert centred_rank(collapsed) > 5
    assert effective_rank(collapsed) < 1.5
