"""Sampling settings: their fields, limits, and their names in each interface.

The settings have different names in different interfaces: `SamplingParams` and Triton use the field names, the HTTP
API, the settings of an image and the Python client use the short names of `API_NAMES`, config.json holds the
recommended ones under their field names, and /v1 has OpenAI's and diffusers' names. All conversions are here. A new
setting is a field of `SamplingParams` and, to offer it over HTTP, a field of `SamplingQuery` (server/schemas.py), and
for /v1 one in server/openai_schemas.py: its limits, descriptions, answers, headers and all conversions follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dsd_serve.errors import InputError, shown

SAMPLER_NAMES = ("euler", "heun", "dpmpp_2m", "flow_map")
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, slots=True)
class Setting:
    """The description of a field of `SamplingParams`.

    about: its meaning, in a phrase. least, most: limits of a number, both included. choices: the values of a text. api,
    openai: its name in those interfaces; empty if it is the field's. recommended: a model directory holds the value for
    callers that give none. shown_with_image: drawing an image again needs the value. header: answers have it in a
    header X-DSD-*.
    """

    default: Any
    about: str
    least: float = 0
    most: float = 0
    choices: tuple[str, ...] = ()
    api: str = ""
    openai: str = ""
    recommended: bool = False
    shown_with_image: bool = True
    header: bool = False


def setting(default: Any, about: str, **more: Any) -> Any:
    """A field of `SamplingParams`; `more` as in `Setting`."""
    return field(default=default, metadata={"setting": Setting(default, about, **more)})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one image. Raises InputError with the allowed range.

    seed: 0 to 2^63 - 1. index: number of the image among those of one request, 0 to 2^63 - 1, so that image i of a
    request equals image i of any other request with that seed. num_steps: 1 to 1000 steps of the sampler (heun
    evaluates the network twice in all but the last). guidance_scale: of classifier-free guidance (arXiv 2207.12598),
    0 to 100; 1 is off. guidance_start <= guidance_stop: the times, from 0 (noise) to 1 (data), between which it is on
    (arXiv 2404.07724); elsewhere a step costs one row, not two. preview_every: steps between previews, which are
    decoded clean estimates, 0 to 1000; 0: none.
    """

    seed: int = setting(0, "seed of the noise", least=0, most=MAX_SEED, header=True)
    index: int = setting(0, "index of the first image", least=0, most=MAX_SEED)
    num_steps: int = setting(
        25,
        "number of steps of the sampler",
        least=1,
        most=MAX_STEPS,
        api="steps",
        openai="num_inference_steps",
        recommended=True,
        header=True,
    )
    sampler: str = setting(
        "heun",
        "euler, heun, dpmpp_2m, or flow_map if the model has one; heun takes two evaluations a step, one in the last",
        choices=SAMPLER_NAMES,
        recommended=True,
        header=True,
    )
    guidance_scale: float = setting(
        1.0,
        "guidance scale; 1: off",
        least=0,
        most=MAX_GUIDANCE,
        api="guidance",
        recommended=True,
        header=True,
    )
    guidance_start: float = setting(
        0.0, "time from which guidance is on; 0 is noise, 1 is data", least=0, most=1, recommended=True
    )
    guidance_stop: float = setting(
        1.0,
        "time until which guidance is on; outside this interval a step costs half",
        least=0,
        most=1,
        recommended=True,
    )
    preview_every: int = setting(
        0,
        "with events: steps between previews; 0: none",
        least=0,
        most=MAX_STEPS,
        shown_with_image=False,
    )

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            check(name, getattr(self, name), setting)
        if self.guidance_start > self.guidance_stop:
            raise InputError(
                "guidance_start and guidance_stop must be times from 0 to 1 in this order, got "
                f"{self.guidance_start} and {self.guidance_stop}",
                "guidance_start",
            )

    def is_guided(self, t: float) -> bool:
        """Whether a step at time t needs the row without a class."""
        return self.guidance_scale != 1 and self.guidance_start <= t <= self.guidance_stop


def check(name: str, value: Any, setting: Setting) -> None:
    if setting.choices:
        if value not in setting.choices:
            raise InputError(f"{name} must be one of {', '.join(setting.choices)}, got {shown(value)}", name)
    elif isinstance(setting.default, int):
        whole(name, value, setting.least, setting.most)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, got {shown(value)}", name)
    elif not setting.least <= value <= setting.most:  # also rejects NaN
        raise InputError(f"{name} must be between {setting.least:g} and {setting.most:g}, got {shown(value)}", name)


def whole(name: str, value: int, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}", name)


SETTINGS: dict[str, Setting] = {item.name: item.metadata["setting"] for item in fields(SamplingParams)}

FIELDS = tuple(SETTINGS)
# Field name -> the HTTP API's name; the API's name -> OpenAI's; header -> field name.
API_NAMES = {name: setting.api or name for name, setting in SETTINGS.items()}
OPENAI_NAMES = {API_NAMES[name]: setting.openai or name for name, setting in SETTINGS.items()}
HEADERS = {f"X-DSD-{API_NAMES[name].title()}": name for name, setting in SETTINGS.items() if setting.header}
RECOMMENDED = tuple(name for name, setting in SETTINGS.items() if setting.recommended)
SHOWN_WITH_IMAGE = tuple(name for name, setting in SETTINGS.items() if setting.shown_with_image)


def guidance_words(scale: float, start: float, stop: float) -> str:
    """Guidance for people to read: "guidance 3", or "guidance 3 from t = 0.2 to 0.8"."""
    interval = "" if (start, stop) == (0, 1) else f" from t = {start:g} to {stop:g}"
    return f"guidance {scale:g}{interval}"


def samplers_of(flow_map: bool) -> tuple[str, ...]:
    """The samplers of a model, which has a flow map or not."""
    return tuple(name for name in SAMPLER_NAMES if flow_map or name != "flow_map")


def check_sampler(name: str, flow_map: bool) -> None:
    """Raises InputError for a sampler that the model does not have. flow_map: whether it has a flow map."""
    if name not in (known := samplers_of(flow_map)):
        raise InputError(f"sampler must be one of {', '.join(known)} with this model, got {shown(name)}", "sampler")


def with_values(defaults: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """`defaults` with the given values, by field name. None and unknown names are ignored.

    Raises InputError.
    """
    given = {name: values[name] for name in FIELDS if values.get(name) is not None}
    return SamplingParams(**{**to_fields(defaults), **given})


def to_fields(params: SamplingParams) -> dict[str, Any]:
    """All settings by field name: what travels to Triton, and what an ETag covers."""
    return {name: getattr(params, name) for name in FIELDS}


def to_config(params: SamplingParams) -> dict[str, Any]:
    """The recommended settings, as config.json holds them under `sampling`.

    Guidance at all times is left out: it is the default, and an interval would change the fingerprints of models that
    have none.
    """
    everywhere = (params.guidance_start, params.guidance_stop) == (0, 1)
    left_out = ("guidance_start", "guidance_stop") if everywhere else ()
    return {name: getattr(params, name) for name in RECOMMENDED if name not in left_out}


def to_api(params: SamplingParams) -> dict[str, Any]:
    """The settings that draw an image again, under the names of the HTTP API."""
    return {API_NAMES[name]: getattr(params, name) for name in SHOWN_WITH_IMAGE}


def to_recommended(params: SamplingParams) -> dict[str, Any]:
    """The recommended settings, under the names of the HTTP API."""
    return {API_NAMES[name]: getattr(params, name) for name in RECOMMENDED}


def to_headers(values: Mapping[str, Any]) -> dict[str, str]:
    """Headers of an answer, from settings as `to_api` gives them."""
    shown = {header: values[API_NAMES[name]] for header, name in HEADERS.items()}
    return {header: f"{value:g}" if isinstance(value, float) else str(value) for header, value in shown.items()}


def from_openai(values: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, from their names in OpenAI's API to those of the HTTP API."""
    return {api: values[name] for api, name in OPENAI_NAMES.items() if values.get(name) is not None}


def from_api(values: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The inverse of `to_api`. Missing and None values are those of `defaults`; other keys are ignored.

    Raises InputError, whose sentence and `param` have the API's name.
    """
    try:
        return with_values(defaults, {name: values.get(api) for name, api in API_NAMES.items()})
    except InputError as error:
        raise error.renamed(API_NAMES.get(error.param or "", error.param)) from None
