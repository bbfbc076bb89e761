"""The requests of the benchmark: their mix, and when they arrive. Seeded, so that all contestants get the same."""

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
    """A request and the second at which it is sent."""

    at: float
    body: Body


def request(class_: int, number: int, steps: int, guidance: float) -> Body:
    return {"class": class_, "seed": number, "steps": steps, "guidance": guidance, "sampler": "euler"}


def requests(classes: Sequence[int], seed: int = 0) -> Iterator[Body]:
    """Endless requests: all steps equally often, 30 % guided, exactly so in every 60 and in random order there."""
    rng = np.random.default_rng([seed, 0])
    for number in itertools.count():
        if number % len(KINDS) == 0:
            order = rng.permutation(len(KINDS))
        steps, guidance = KINDS[order[number % len(KINDS)]]
        yield request(classes[number % len(classes)], number, steps, guidance)


def arrivals(rate: float, seconds: float, classes: Sequence[int], seed: int = 0) -> list[Arrival]:
    """Poisson arrivals of `rate` requests a second, given that their number is the expected one, in order.

    Given their number, the times of a Poisson process are independent and uniform. Fixing the number makes the offered
    load of a short run the one that was asked for; the bursts stay.
    """
    times = np.sort(np.random.default_rng([seed, 1]).uniform(0, seconds, round(rate * seconds)))
    return [Arrival(float(at), body) for at, body in zip(times, requests(classes, seed), strict=False)]


def program(config: ModelConfig, body: Body) -> Program:
    """The program that a request asks for; what the servers of the others run."""
    params = SamplingParams(
        seed=body["seed"], num_steps=body["steps"], sampler=body["sampler"], guidance_scale=body["guidance"]
    )
    return generate(config, body["class"], params)
