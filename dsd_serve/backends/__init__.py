"""What runs tasks: the batcher on an engine of this process, or Triton servers; and what each says of its model."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from dsd_serve.config import ModelConfig
from dsd_serve.engines.selftest import Invariance
from dsd_serve.errors import ConfigError
from dsd_serve.params import SamplingParams


@dataclass(frozen=True)
class About:
    """A model and what runs it, as plain values that can travel.

    described: the engine's words. budget: rows a tick. card: the text of card.md. created: of its config.json, in
    seconds since 1970.
    """

    name: str
    config: ModelConfig
    defaults: SamplingParams
    fingerprint: str
    described: dict[str, str]
    invariance: Invariance
    budget: int
    card: str | None
    created: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "About":
        """The inverse of `to_dict`. Raises ConfigError, KeyError, TypeError for values that cannot be one."""
        about = cls(
            **{
                **values,
                "config": ModelConfig.from_dict(values["config"]),
                "defaults": SamplingParams(**values["defaults"]),
                "invariance": Invariance(**values["invariance"]),
            }
        )
        tested, card = about.invariance, about.card
        words = (about.name, *about.described, *about.described.values())
        sane = (
            all(isinstance(word, str) and len(word) <= 1000 for word in words)
            and len(about.described) <= 100
            and re.fullmatch("[0-9a-f]{64}", about.fingerprint)
            and all(type(number) is int for number in (about.budget, about.created))
            and 1 <= about.budget <= 1_000_000
            and 0 <= about.created < 2**53
            and (card is None or (isinstance(card, str) and len(card) <= 1_000_000))
            and all(type(number) is int for number in (tested.num_rows, tested.dependent_rows))
            and isinstance(tested.max_difference, int | float)
            and math.isfinite(tested.max_difference)
        )
        if not sane:
            raise ConfigError("the description of a model holds values that cannot be")
        return about
