"""The settings that the sampler study measures, by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsd_serve.params import SamplingParams
from dsd_serve.samplers import num_rows, timesteps

REFERENCE_STEPS = 500
EVALUATIONS = (5, 9, 19, 39)  # of the network, without guidance: those of heun with 3, 5, 10 and 20 steps
FEW = (1, 2, 3, 4, 5, 6, 8, 9)  # evaluations at which few steps are studied
SHIFTS = (0.5, 2.0)  # besides 1, which is even steps
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)
ADDED_GUIDANCE = (1.0, 1.5, 2.0, 3.0)  # of models that have learnt theirs
INTERVALS = ((0.0, 0.75), (0.1, 1.0), (0.25, 1.0))
ENOUGH = 9  # evaluations at which guidance and shift are studied: more hardly change the images
SEEDS = (1, 2, 3, 4, 5)  # each draws its share of the images of a setting


@dataclass(frozen=True)
class Setting:
    """Sampling settings. shift s: times t become t / (t + s (1 - t)), so above 1 more of the steps are at noisy t."""

    sampler: str
    evaluations: int
    guidance_scale: float
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    shift: float = 1.0

    @property
    def num_steps(self) -> int:
        """heun evaluates twice in all steps but the last."""
        return (self.evaluations + 1) // 2 if self.sampler == "heun" else self.evaluations

    def params(self, seed: int) -> SamplingParams:
        return SamplingParams(
            seed=seed,
            num_steps=self.num_steps,
            sampler=self.sampler,
            guidance_scale=self.guidance_scale,
            guidance_start=self.guidance_start,
            guidance_stop=self.guidance_stop,
        )

    @property
    def timesteps(self) -> list[float]:
        return [shifted(t, self.shift) for t in timesteps(self.num_steps)]

    @property
    def rows(self) -> int:
        """Rows of the network for one image."""
        return num_rows(self.params(SEEDS[0]), self.timesteps)

    @property
    def key(self) -> str:
        interval = f"{self.guidance_start:g}-{self.guidance_stop:g}"
        return f"{self.sampler} {self.evaluations} shift {self.shift:g} guidance {self.guidance_scale:g} {interval}"

    @property
    def reference(self) -> "Setting":
        """The setting that its latents are compared with: the same guidance, with hardly any sampler error."""
        return replace(self, sampler="heun", evaluations=2 * REFERENCE_STEPS - 1, shift=1.0)


def shifted(t: float, shift: float) -> float:
    """The shift of Stable Diffusion 3 (arXiv 2403.03206) for t = 0 noise: s = 1 changes nothing; t = 0 and 1 stay."""
    return t / (t + shift * (1 - t)) if t else 0.0


def default_setting(defaults: Mapping[str, Any]) -> Setting:
    """The model's recommendation."""
    steps = defaults["num_steps"]
    evaluations = 2 * steps - 1 if defaults["sampler"] == "heun" else steps
    return Setting(defaults["sampler"], evaluations, defaults["guidance_scale"])


def settings_of(defaults: Mapping[str, Any], samplers: Sequence[str]) -> dict[str, list[Setting]]:
    """The settings of each part of the study. A setting in several parts is measured once.

    defaults: the model's recommendation. samplers: those that the model can run. A model with the sampler flow_map has
    learnt its guidance: it is studied without further guidance, except in the part of that name.
    """
    guidance: Sequence[float]
    intervals: list[Setting]
    if "flow_map" in samplers:
        best = default_setting(defaults)
        scales, guidance, intervals = [1.0], ADDED_GUIDANCE, []
        shifted_settings = [replace(best, evaluations=n) for n in (2, 3, 4)]
    else:
        guided = defaults["guidance_scale"] if defaults["guidance_scale"] > 1 else 2.0
        best = Setting("dpmpp_2m", ENOUGH, guided)
        scales, guidance = [1.0, guided], sorted({*GUIDANCE, guided})
        intervals = [
            replace(best, guidance_scale=g, guidance_start=start, guidance_stop=stop)
            for g in (guided, guided + 1)
            for start, stop in INTERVALS
        ]
        shifted_settings = [
            replace(best, sampler=sampler, evaluations=n) for sampler in ("heun", "dpmpp_2m") for n in (5, ENOUGH)
        ]

    def at(counts: Sequence[int]) -> list[Setting]:
        settings = [Setting(s, n, g) for g in scales for s in samplers for n in counts]
        return [s for s in settings if s.sampler != "heun" or (s.evaluations % 2 and s.evaluations > 1)]

    return {
        "default": [default_setting(defaults)],
        "few": at(FEW),
        "samplers": at(EVALUATIONS),
        "guidance": [replace(best, guidance_scale=g) for g in guidance],
        "interval": [best, *intervals] if intervals else [],
        "shift": [replace(s, shift=shift) for s in shifted_settings for shift in sorted((*SHIFTS, 1.0))],
    }
