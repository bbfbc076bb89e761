"""Checks of engines that more than one of their test modules makes."""

from typing import Any

import numpy as np

from dsd_serve.engines.selftest import mixture


def check_outputs_are_kept(engine: Any) -> None:
    """Outputs are the caller's own: the next call leaves them as they are."""
    (row,) = mixture(engine.config, (0, 1, 0), seed=0)
    (first,) = engine.run([row])
    kept = first.copy()
    engine.run(mixture(engine.config, (0, 1, 0), seed=1))
    assert np.array_equal(first, kept)
