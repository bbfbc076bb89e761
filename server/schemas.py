"""Request models. Unknown parameters are rejected, so that a misspelling never becomes a silent default."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    model_validator,
)

from dsd_serve.labels import MAX_TEXT
from dsd_serve.params import MAX_SEED, SAMPLER_NAMES, SETTINGS
from server.settings import MIN_SIZE

CLASS_FORMAT = "class-name"  # in the OpenAPI document, of strings that name a class
MOST = 2**31 - 1  # of numbers that the server limits further: sizes, steps, images
MAX_DIGITS = 40
WHOLE = re.compile(r"-?[0-9]+(\.0*)?", re.ASCII)
REAL = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)


def whole(value: Any) -> Any:
    """Refuse text that Python reads as an integer although it is not plain digits, such as 1_000 or +7."""
    if isinstance(value, str) and not WHOLE.fullmatch(short(value)):
        raise ValueError("a valid integer in plain digits, such as 25")
    return value


def whole_or_text(value: Any) -> Any:
    """The same for a number that JSON may hold as text too, because JavaScript rounds what is above 2^53."""
    value = whole(value)
    return int(value.partition(".")[0]) if isinstance(value, str) else value


def real(value: Any) -> Any:
    """Refuse text that Python reads as a number although it is not plain digits, and integers beyond any float."""
    if isinstance(value, str) and not REAL.fullmatch(short(value)):
        raise ValueError("a finite number in plain digits, such as 0.5")
    if isinstance(value, int):
        try:
            float(value)
        except OverflowError:
            raise ValueError("a finite number") from None
    return value


def short(text: str) -> str:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of at most {MAX_DIGITS} characters")
    return text


def class_text(value: Any) -> Any:
    """A value that may name a class; the model decides whether it does."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"at most {MAX_TEXT} characters long")
    return value


def left_out(why: str, *same: Any) -> Callable[[Any], Any]:
    """A validator that refuses a parameter without a meaning here, except for its neutral values `same`."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in same:
            raise ValueError(f"left out: {why}")
        return value

    return check


def of_setting(name: str, **more: Any) -> Any:
    """The Field of a sampling setting: its limits and description, from dsd_serve/params.py. `more` wins."""
    setting = SETTINGS[name]
    options: dict[str, Any] = {"description": setting.about}
    if not setting.choices:
        options |= {"ge": setting.least, "le": setting.most}
    if isinstance(setting.default, float):
        options["allow_inf_nan"] = False
    return Field(**options | more)


WholeNumber = BeforeValidator(whole)
RealNumber = BeforeValidator(real)

Format = Literal["png", "jpeg", "webp", "json", "zip"]
Size = Annotated[
    int | None,
    Field(
        ge=MIN_SIZE,
        le=MOST,
        description="side of the images, in pixels; images are resized to it (default: the network's size)",
    ),
    WholeNumber,
]
ClassName = Annotated[  # the texts and examples are those of ImageNet-1k; server/openapi_model.py has others
    Any,  # the model decides which values name a class
    PlainValidator(
        class_text,
        json_schema_input_type=Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra={"format": CLASS_FORMAT})]
        | int,
    ),
    Field(
        description="ImageNet-1k index, wnid or name; /classes lists those of the model",
        examples=["207", "n02099601", "golden retriever"],
    ),
]
SamplerName = Annotated[str, Field(json_schema_extra={"enum": list(SAMPLER_NAMES)})]
SamplerChoice = Annotated[str, StringConstraints(max_length=MAX_TEXT)] | None  # the model decides which it has
Seed = Annotated[
    int | None,
    Field(
        ge=0,
        le=MAX_SEED,
        description="same seed, same image (default: random). JavaScript rounds JSON numbers above 2^53: send a "
        "string of digits there, and read the header X-DSD-Seed, which is exact",
        examples=[1],
    ),
    BeforeValidator(
        whole_or_text,
        json_schema_input_type=Annotated[int, Field(ge=0, le=MAX_SEED)]
        | Annotated[str, Field(pattern="^[0-9]{1,18}$")]
        | None,
    ),
]
Time = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), RealNumber]
Timeout = Annotated[
    float | None,
    Field(
        ge=0.001,
        le=MOST,
        allow_inf_nan=False,
        description="deadline of the request, in seconds; refused at once if it cannot be met",
    ),
    RealNumber,
]
ModelName = Annotated[
    str | None,
    Field(max_length=MAX_TEXT, description="name of the model, from /v1/models (default: the first)"),
]
Strength = Annotated[
    float,
    Field(
        ge=0.001,
        le=1,
        allow_inf_nan=False,
        description="amount of noise, and the share of the steps that run, rounded up; 1 keeps nothing of the image",
    ),
    RealNumber,
]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def whole_numbers(cls, values: Any) -> Any:
        """In JSON 4.0 is an integer too; strict validation, which a JSON body gets, takes no float for one."""
        if not isinstance(values, dict):
            return values
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in values.items()
        }


class SamplingQuery(Request):
    """Sampling settings. Defaults are the model's recommendation."""

    seed: Seed = None
    n: Annotated[
        int, Field(ge=1, le=MOST, description="number of images; image i is that of index + i"), WholeNumber
    ] = 1
    index: Annotated[int, of_setting("index"), WholeNumber] = 0
    steps: Annotated[int | None, of_setting("num_steps", le=MOST, examples=[8]), WholeNumber] = None
    sampler: Annotated[SamplerChoice, of_setting("sampler", json_schema_extra={"enum": [*SAMPLER_NAMES, None]})] = None
    guidance: Annotated[float | None, of_setting("guidance_scale"), RealNumber] = None
    guidance_start: Annotated[float | None, of_setting("guidance_start"), RealNumber] = None
    guidance_stop: Annotated[float | None, of_setting("guidance_stop"), RealNumber] = None
    preview_every: Annotated[int, of_setting("preview_every"), WholeNumber] = 0
    timeout: Timeout = None
    size: Size = None
    model: ModelName = None


class GenerateRequest(SamplingQuery):
    """Settings of GET and POST /generate."""

    class_: Annotated[ClassName, Field(alias="class")] = None
    format: Annotated[
        Literal["png", "jpeg", "webp", "json", "zip", "events"] | None,
        Field(description="default: by the Accept header, else png; `events` are server-sent events with previews"),
    ] = None


class EditQuery(SamplingQuery):
    """Settings of POST /edit, in the query string; the body is the image, or a form with image and mask."""

    class_: Annotated[ClassName | None, Field(alias="class", description="class to draw (default: none)")] = None
    strength: Strength = 0.6
    format: Annotated[
        Literal["png", "jpeg", "webp", "json", "zip", "events"] | None,
        Field(description="default: by the Accept header, else png; `events` are server-sent events with previews"),
    ] = None


class ImageQuery(Request):
    """Settings of POST /reconstruct and /decode, in the query string; the body is the image or the latents."""

    format: Annotated[Format | None, Field(description="default: by the Accept header, else png")] = None
    size: Size = None
    timeout: Timeout = None
    model: ModelName = None


class EncodeQuery(Request):
    """Settings of POST /encode, in the query string; the body is the image."""

    format: Annotated[
        Literal["npy", "safetensors", "json"] | None, Field(description="default: by the Accept header, else npy")
    ] = None
    timeout: Timeout = None
    model: ModelName = None


WalkLength = Annotated[
    int,
    Field(
        ge=2,
        le=MOST,
        description="number of images, both ends included (default: 8, or the server's limit if that is lower)",
    ),
    WholeNumber,
]


class WalkQuery(Request):
    """Settings of POST /interpolate between two images, in the query string; the body is a form with both."""

    n: WalkLength = 8
    format: Annotated[Format | None, Field(description="default: by the Accept header, else png")] = None
    size: Size = None
    timeout: Timeout = None
    model: ModelName = None


class End(Request):
    """One end of a walk: a class, and the seed and index of its noise."""

    class_: Annotated[ClassName, Field(alias="class")] = None
    seed: Seed = None
    index: Annotated[int, Field(ge=0, le=MAX_SEED), WholeNumber] = 0


OF_ENDS = "each end has its own"
NO_PREVIEWS = "a walk has no previews"


class InterpolateRequest(SamplingQuery):
    """Settings of POST /interpolate between two classes or seeds. A seed that is left out is that of the other end."""

    from_: Annotated[End, Field(alias="from")]
    to: End
    n: WalkLength = 8
    format: Annotated[Format | None, Field(description="default: by the Accept header, else png")] = None
    seed: Annotated[None, Field(description=OF_ENDS), BeforeValidator(left_out(OF_ENDS, None))] = None
    index: Annotated[int, Field(ge=0, le=0, description=OF_ENDS), BeforeValidator(left_out(OF_ENDS, 0))] = 0
    preview_every: Annotated[
        int, Field(ge=0, le=0, description=NO_PREVIEWS), BeforeValidator(left_out(NO_PREVIEWS, 0))
    ] = 0


class ModelQuery(Request):
    model: ModelName = None


class ReplaceRequest(Request):
    """Body of POST /admin/model."""

    model: Annotated[
        str, StringConstraints(min_length=1, max_length=1024), Field(description="directory, or hf:org/name")
    ]
    name: Annotated[ModelName, Field(description="name of the model to replace (default: the first)")] = None


class ClassesQuery(ModelQuery):
    q: Annotated[str, StringConstraints(max_length=200), Field(description="search words", examples=["retriever"])] = ""
    trained: Annotated[bool, Field(description="only classes that this model can draw")] = True
