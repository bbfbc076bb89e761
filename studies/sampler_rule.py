"""The statistics of the sampler study: values of several seeds, when two settings differ, and which is recommended."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

ERRORS = 2  # standard errors that a difference must exceed
SLACK = 1.05  # of the best setting's distance above that of real images


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of the values of independent seeds, and its standard error; 0 for a single seed."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), error


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of values - others, seed by seed.

    Two settings draw from the same noise for a seed, so the spread between seeds, which they share, cancels.
    """
    return mean_and_error([value - other for value, other in zip(values, others, strict=True)])


def above(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the values of the seeds are above the others' by more than ERRORS standard errors.

    Of two equal settings with five seeds, one is above the other in this sense with a probability of 6 % (Student's t).
    """
    mean, error = difference(values, others)
    return mean > ERRORS * error


def summarised(of_seeds: Mapping[str, Sequence[float]], digits: Mapping[str, int]) -> dict[str, Any]:
    """Of each metric its mean, its standard error as `..._error`, and under `of_seeds` the values themselves."""
    numbers: dict[str, Any] = {}
    rounded = {name: [round(value, digits[name]) for value in values] for name, values in of_seeds.items()}
    for name, values in rounded.items():
        mean, error = mean_and_error(values)
        numbers |= {name: round(mean, digits[name]), f"{name}_error": round(error, digits[name])}
    return {**numbers, "of_seeds": rounded}


def candidates(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The settings that a model directory can recommend, nearest first: those of evenly spaced timesteps."""
    return sorted((r for r in results if r["shift"] == 1), key=lambda r: r["frechet_lite0"])


def recommend(results: Iterable[Mapping[str, Any]], floor: float) -> dict[str, Any]:
    """The cheapest candidate whose quality cannot be told from the best one's.

    floor: frechet_lite0 of as many real images. Candidates are near if their distance is not `above` SLACK times the
    smallest one, both counted from the floor. Of these, the class accuracy must not be below the highest.
    """
    best, *others = candidates(results)
    limit = [floor + SLACK * max(value - floor, 0) for value in best["of_seeds"]["frechet_lite0"]]
    near = [best, *(r for r in others if not above(r["of_seeds"]["frechet_lite0"], limit))]
    highest = max(near, key=lambda r: r["top1_lite0"])["of_seeds"]["top1_lite0"]
    good = [r for r in near if not above(highest, r["of_seeds"]["top1_lite0"])]
    return dict(min(good, key=lambda r: (r["rows"], r["frechet_lite0"])))
