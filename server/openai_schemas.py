"""Requests and answers of the OpenAI-compatible routes.

A null, or an empty text for an optional field, counts as absent.

OpenAI's parameters without an effect here are accepted; those that request unsupported features are rejected, as are
unknown ones.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dsd_serve.params import MAX_STEPS
from server.schemas import MOST, REAL, RealNumber, Request, SamplerChoice, Seed, Strength, WholeNumber, of_setting

MAX_IMAGES = 10
NUMBERS = (bool, int, int | None, float, float | None)
MAX_IGNORED = 1000  # characters of a text that changes nothing
MAX_INTERVAL = 100
SMALLEST = 8
INTERVAL = "two times from 0 to 1 in this order, as [0.2, 0.8] or 0.2,0.8"


def parse_size(value: str) -> str:
    if value != "auto" and side_of(value) < SMALLEST:
        raise ValueError(f"auto or a square like 256x256, at least {SMALLEST}x{SMALLEST}")
    return value


def side_of(size: str) -> int:
    """The side of a size: 256 for 256x256, and 0 for anything that is not a square."""
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    return int(found[1]) if found and int(found[1]) == int(found[2]) else 0


def parse_interval(value: Any) -> tuple[float, float]:
    if isinstance(value, str):
        if len(value) > MAX_INTERVAL:
            raise ValueError(INTERVAL)
        value = [float(text) if REAL.fullmatch(text) else text for text in map(str.strip, value.split(",", 2))]
    if not isinstance(value, list) or [type(number) in (int, float) for number in value[:3]] != [True, True]:
        raise ValueError(INTERVAL)
    start, stop = value
    if not 0 <= start <= stop <= 1:
        raise ValueError(INTERVAL)
    return start, stop


def only(value: str, allowed: tuple[str, ...], why: str) -> str:
    if value not in allowed:
        raise ValueError(f"{' or '.join(allowed)}: {why}")
    return value


Ignored = Annotated[str | None, Field(max_length=MAX_IGNORED, description="ignored")]


ANNOTATIONS = ("title", "description", "default", "examples")


def nullable(schema: dict[str, Any]) -> None:
    """Document that optional fields may be null."""
    for name, field in schema["properties"].items():
        kind = {key: field.pop(key) for key in list(field) if key not in ANNOTATIONS}
        kinds = kind.get("anyOf", [kind])
        if name not in schema.get("required", ()) and {"type": "null"} not in kinds:
            kinds = [*kinds, {"type": "null"}]
        field |= {"anyOf": kinds} if len(kinds) > 1 else kind


class Options(Request):
    """Parameters of all three routes. Defaults are the model's recommendation."""

    model_config = ConfigDict(json_schema_extra=nullable)

    model: Annotated[
        str | None, Field(max_length=MAX_IGNORED, description="name from /v1/models (default: the served model)")
    ] = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="number of images"), WholeNumber] = 1
    size: Annotated[str, AfterValidator(parse_size), Field(description="auto, or a square as 256x256")] = "auto"
    response_format: Annotated[
        str,
        AfterValidator(
            lambda value: only(value, ("b64_json",), "images are in the answer, because none are stored to link to")
        ),
    ] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of jpeg and webp; for png only 100"), WholeNumber
    ] = None
    user: Ignored = None
    # Not OpenAI's; they are named as in other image servers.
    seed: Seed = None
    num_inference_steps: Annotated[int | None, of_setting("num_steps", le=MOST), WholeNumber] = None
    sampler: Annotated[SamplerChoice, of_setting("sampler")] = None

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, values: Any) -> Any:
        """Many clients send all their fields, with null or an empty text for those without a value."""
        if not isinstance(values, dict):
            return values
        texts = {name for name, field in cls.model_fields.items() if field.annotation not in NUMBERS}
        optional = {name for name in texts if not cls.model_fields[name].is_required()}
        return {name: v for name, v in values.items() if v is not None and (v != "" or name not in optional)}

    @field_validator("output_compression")
    @classmethod
    def compresses(cls, value: int, info: ValidationInfo) -> int:
        if value != 100 and info.data.get("output_format") == "png":
            raise ValueError("100 for png, which loses nothing; ask for output_format jpeg or webp")
        return value

    @property
    def side(self) -> int | None:
        """Side of the images in pixels; None stands for the network's own."""
        return side_of(self.size) or None

    def sampling_values(self) -> dict[str, Any]:
        """The fields, with the sampling settings under the names of OpenAI and diffusers."""
        return dict(self)


class GenerationRequest(Options):
    """POST /v1/images/generations."""

    prompt: Annotated[
        str,
        Field(
            max_length=1000,
            description="names a class: ImageNet-1k index, wnid or name",
            examples=["golden retriever", "n02099601", "207", "class:207"],
        ),
    ]
    stream: Annotated[bool, Field(description="answer with server-sent events")] = False
    partial_images: Annotated[
        int | None,
        Field(
            ge=0,
            le=3,
            description="with stream: the most previews, at equal distances of whole steps; few steps give fewer: "
            "with 4 steps, 2 previews become one, after step 2",
        ),
        WholeNumber,
    ] = None
    background: Annotated[
        str, AfterValidator(lambda value: only(value, ("auto", "opaque"), "images are always opaque"))
    ] = "auto"
    quality: Ignored = None
    style: Ignored = None
    moderation: Ignored = None
    safety_identifier: Ignored = None
    # Not OpenAI's.
    class_id: Annotated[
        int | None, Field(ge=0, le=MOST, description="ImageNet-1k index, instead of the prompt"), WholeNumber
    ] = None
    guidance_scale: Annotated[float | None, of_setting("guidance_scale"), RealNumber] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        BeforeValidator(parse_interval, json_schema_input_type=list[float] | str | None),
        Field(description="times from and to which guidance is on; 0 is noise, 1 is data"),
    ] = None
    preview_every: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, description="with stream: steps between previews, at most partial_images of them"),
        WholeNumber,
    ] = None

    def sampling_values(self) -> dict[str, Any]:
        start, stop = self.guidance_interval or (None, None)
        return {**dict(self), "guidance_start": start, "guidance_stop": stop, "preview_every": None}

    @field_validator("partial_images", "preview_every")
    @classmethod
    def streams(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("stream"):
            raise ValueError("left out where stream is not true")
        return value


class VariationForm(Options):
    """POST /v1/images/variations: the text fields, in addition to `image`."""

    strength: Strength = 0.6


class EditForm(GenerationRequest):
    """POST /v1/images/edits: the text fields, in addition to `image` and `mask`."""

    strength: Strength = 0.6
    input_fidelity: Annotated[str | None, Field(max_length=MAX_IGNORED, description="ignored; see strength")] = None


class DrawnImage(BaseModel):
    b64_json: str
    seed: Annotated[int, Field(description="with the index: draws the same image again")]
    index: int


class TokenCounts(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens are the network's: latent tokens of images that were encoded, and of those drawn. Text has none."""

    input_tokens: int
    input_tokens_details: TokenCounts
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    created: int
    data: list[DrawnImage]
    output_format: str
    size: str
    background: str
    usage: Usage


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dsd"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail
