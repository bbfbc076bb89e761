"""Sampling settings: their fields, limits, and names in every dialect.

A dialect is a set of names for the same settings: `SamplingParams` and Triton use the field names, the HTTP API, the
settings of an image and the Python client use the short names of `API_NAMES`, config.json holds the recommended ones
under their field names, and /v1 has OpenAI's and diffusers' names. All conversions are here. A new setting is a field
of `SamplingParams` and, to offer it over HTTP, a field of `SamplingQuery` and of `SamplingUsed` in server/schemas.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dsd_serve.errors import InputError, shown

SAMPLER_NAMES = ("euler", "heun", "dpmpp_2m")
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


def setting(
    default: Any, api: str = "", openai: str = "", *, recommended: bool = False, shown_with_image: bool = True
) -> Any:
    """A field of `SamplingParams`.

    api, openai: its name in those dialects, if it is not the field's. recommended: a model directory holds the value to
    use where a caller gives none. shown_with_image: the value belongs to what is needed to draw an image again.
    """
    metadata = {"api": api, "openai": openai, "recommended": recommended, "shown_with_image": shown_with_image}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one image. Raises InputError with the allowed range.

    seed: 0 to 2^63 - 1. index: number of the image among those of one request, so that image i of a request equals
    image i of any other request with that seed. num_steps: steps of the sampler (heun evaluates the network twice in
    all but the last). guidance_scale: classifier-free guidance, 1 is off. guidance_start and guidance_stop: the times
    (0 = noise, 1 = data) between which it is on (arXiv 2404.07724); elsewhere a step costs one row, not two.
    preview_every: also decode the clean estimate every that many steps, 0 is never.
    """

    seed: int = setting(0)
    index: int = setting(0)
    num_steps: int = setting(25, "steps", "num_inference_steps", recommended=True)
    sampler: str = setting("heun", recommended=True)
    guidance_scale: float = setting(1.0, "guidance", recommended=True)
    guidance_start: float = setting(0.0)
    guidance_stop: float = setting(1.0)
    preview_every: int = setting(0, shown_with_image=False)

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, MAX_SEED)
        whole("index", self.index, 0, MAX_SEED)
        whole("num_steps", self.num_steps, 1, MAX_STEPS)
        whole("preview_every", self.preview_every, 0, MAX_STEPS)
        for name in ("guidance_scale", "guidance_start", "guidance_stop"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise InputError(f"{name} must be a number, got {shown(value)}", name)
        if self.sampler not in SAMPLER_NAMES:
            raise InputError(f"sampler must be one of {', '.join(SAMPLER_NAMES)}, got {shown(self.sampler)}", "sampler")
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE:  # also refuses NaN
            raise InputError(
                f"guidance_scale must be between 0 and {MAX_GUIDANCE:g} (1 is off), got {shown(self.guidance_scale)}",
                "guidance_scale",
            )
        if not 0 <= self.guidance_start <= self.guidance_stop <= 1:
            raise InputError(
                "guidance_start and guidance_stop must be times from 0 to 1 in this order, got "
                f"{self.guidance_start} and {self.guidance_stop}",
                "guidance_start",
            )

    def is_guided(self, t: float) -> bool:
        """Whether a step at time t needs the row without a class."""
        return self.guidance_scale != 1 and self.guidance_start <= t <= self.guidance_stop


def whole(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}", name)


# Dialects: field name -> name.
FIELDS = tuple(item.name for item in fields(SamplingParams))
API_NAMES = {item.name: item.metadata["api"] or item.name for item in fields(SamplingParams)}
OPENAI_NAMES = {API_NAMES[item.name]: item.metadata["openai"] or item.name for item in fields(SamplingParams)}
RECOMMENDED = tuple(item.name for item in fields(SamplingParams) if item.metadata["recommended"])
SHOWN_WITH_IMAGE = tuple(item.name for item in fields(SamplingParams) if item.metadata["shown_with_image"])


def with_values(defaults: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """`defaults` with the values, by field name, that are there and not None. Unknown names are left out.

    Raises InputError.
    """
    given = {name: values[name] for name in FIELDS if values.get(name) is not None}
    return SamplingParams(**{**to_fields(defaults), **given})


def to_fields(params: SamplingParams) -> dict[str, Any]:
    """All settings by field name: what travels to Triton, and what an ETag covers."""
    return {name: getattr(params, name) for name in FIELDS}


def to_config(params: SamplingParams) -> dict[str, Any]:
    """The recommended settings, as config.json holds them under `sampling`."""
    return {name: getattr(params, name) for name in RECOMMENDED}


def to_api(params: SamplingParams) -> dict[str, Any]:
    """The settings that draw an image again, under the names of the HTTP API."""
    return {API_NAMES[name]: getattr(params, name) for name in SHOWN_WITH_IMAGE}


def from_api(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The inverse of `to_api`: what is missing or None is that of `defaults`. Other keys are left out.

    Raises InputError, whose sentence and `param` have the API's name.
    """
    try:
        return with_values(defaults, {name: values.get(api) for name, api in API_NAMES.items()})
    except InputError as error:
        raise error.renamed(API_NAMES.get(error.param or "", error.param)) from None
