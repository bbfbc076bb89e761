"""Effective rank of latents: the number of directions that their tokens span."""

import numpy as np

from dsd_serve.rows import Array


def effective_rank(latents: Array) -> float:
    """RankMe (arXiv 2210.02885), after Roy and Vetterli (2007): exp of the entropy of the normalised singular values.

    latents: [..., C], of one image or of several. Returns a number from 1 to C. The tokens are not centred: the
    normaliser fixes the energy of a token, so latents that collapse to a constant do not shrink, and without the
    constant only the small remainder would be measured, as if magnified.
    """
    return exp_entropy(np.linalg.svd(tokens_of(latents), compute_uv=False))


def centred_rank(latents: Array) -> float:
    """The effective rank after the mean token is subtracted. latents: [..., C]. Returns a number from 1 to C."""
    tokens = tokens_of(latents)
    return exp_entropy(np.linalg.svd(tokens - tokens.mean(0), compute_uv=False))


def tokens_of(latents: Array) -> Array:
    return latents.reshape(-1, latents.shape[-1]).astype(np.float64)


def exp_entropy(values: Array) -> float:
    """exp of the entropy of non-negative values, normalised to sum to 1."""
    share = values / max(values.sum(), 1e-12)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))
