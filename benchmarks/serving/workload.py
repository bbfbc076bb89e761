"""The requests of the benchmark, their mix and arrival times, seeded so that all contestants get the same."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd_serve.config import ModelConfig
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate
from dsd_serve.rows import Program

STEPS = (10, 25, 50)
SHORT = 10
GUIDED = 0.3
GUIDANCE = 3.0
KINDS = [(steps, GUIDANCE if i < 20 * GUIDED else 1.0) for steps in STEPS for i in range(20)]

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Arrival:
    """A request and the time at which it is due, in seconds."""

    at: float
    body: Body


def request(class_: int, number: int, steps: int, guidance: float) -> Body:
    return {"class": class_, "seed": number, "steps": steps, "guidance": guidance, "sampler": "euler"}


def requests(classes: Sequence[int], seed: int = 0) -> Iterator[Body]:
    """Endless requests: every 60 hold all steps equally often and 30 % guided ones, in random order."""
    rng = np.random.default_rng([seed, 0])
    for number in itertools.count():
        if number % len(KINDS) == 0:
            order = rng.permutation(len(KINDS))
        steps, guidance = KINDS[order[number % len(KINDS)]]
        yield request(classes[number % len(classes)], number, steps, guidance)


def arrivals(rate: float, seconds: float, classes: Sequence[int], seed: int = 0) -> list[Arrival]:
    """Poisson arrivals of `rate` requests/s, conditioned on the expected number of them, in order.

    Given their number, the times of a Poisson process are independent and uniform. With a fixed number a short run
    offers exactly the nominal load, with the usual bursts.
    """
    times = np.sort(np.random.default_rng([seed, 1]).uniform(0, seconds, round(rate * seconds)))
    return [Arrival(float(at), body) for at, body in zip(times, requests(classes, seed), strict=False)]


def program(config: ModelConfig, body: Body) -> Program:
    """The program of a request, as the other servers run it."""
    params = SamplingParams(
        seed=body["seed"], num_steps=body["steps"], sampler=body["sampler"], guidance_scale=body["guidance"]
    )
    return generate(config, body["class"], params)
