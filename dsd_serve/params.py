"""What a caller may choose for an image."""

from dataclasses import dataclass

from dsd_serve.errors import InputError, shown

SAMPLER_NAMES = ("euler", "heun", "dpmpp_2m")
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one image. Raises InputError with the allowed range.

    seed: 0 to 2^63 - 1. index: number of the image among those of one request, so that image i of a request equals
    image i of any other request with that seed. num_steps: steps of the sampler (heun evaluates the network twice in
    all but the last). guidance_scale: classifier-free guidance, 1 is off. guidance_start and guidance_stop: the times
    (0 = noise, 1 = data) from and to which it is on (arXiv 2404.07724); elsewhere a step costs one row, not two.
    preview_every: also decode the clean estimate every that many steps, 0 is never.
    """

    seed: int = 0
    index: int = 0
    num_steps: int = 25
    sampler: str = "heun"
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    preview_every: int = 0

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, MAX_SEED)
        whole("index", self.index, 0, MAX_SEED)
        whole("num_steps", self.num_steps, 1, MAX_STEPS)
        whole("preview_every", self.preview_every, 0, MAX_STEPS)
        if self.sampler not in SAMPLER_NAMES:
            raise InputError(f"sampler must be one of {', '.join(SAMPLER_NAMES)}, got {shown(self.sampler)}")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:  # also refuses NaN
            raise InputError(
                f"guidance_scale must be between 0 and {MAX_GUIDANCE:g} (1 is off), got {shown(self.guidance_scale)}"
            )
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise InputError(
                "guidance_start and guidance_stop must be times from 0 to 1 in this order, got "
                f"{self.guidance_start} and {self.guidance_stop}"
            )

    def is_guided(self, t: float) -> bool:
        """Whether a step at time t needs the row without a class."""
        return self.guidance_scale != 1 and self.guidance_start <= t <= self.guidance_stop


def whole(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}")
