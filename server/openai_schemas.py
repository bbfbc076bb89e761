"""What requests and answers of the OpenAI-compatible routes look like. A null is what is left out.

Their parameters that change nothing here are accepted; those that ask for what this server does not do are refused,
and so are unknown ones.
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

from dsd_serve.params import MAX_GUIDANCE, MAX_STEPS
from server.schemas import Seed, Strength

MAX_IMAGES = 10
SMALLEST = 8
INTERVAL = "two times from 0 to 1 in this order, as [0.2, 0.8] or 0.2,0.8"


def parse_size(value: str) -> str:
    if value != "auto" and side_of(value) < SMALLEST:
        raise ValueError(f"auto or a square like 256x256, at least {SMALLEST}x{SMALLEST}")
    return value


def side_of(size: str) -> int:
    """256 of 256x256; 0 of what is no square."""
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    return int(found[1]) if found and int(found[1]) == int(found[2]) else 0


def parse_interval(value: Any) -> tuple[float, float]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        start, stop = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(INTERVAL) from None
    if not 0 <= start <= stop <= 1:
        raise ValueError(INTERVAL)
    return start, stop


def only(value: str, allowed: tuple[str, ...], why: str) -> str:
    if value not in allowed:
        raise ValueError(f"{' or '.join(allowed)}: {why}")
    return value


class Options(BaseModel):
    """What all three routes take; what is left out is taken from the model's recommendation."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str | None, Field(description="see /v1/models (default: the one that is served)")] = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="number of pictures")] = 1
    size: Annotated[str, AfterValidator(parse_size), Field(description="auto, or a square as 256x256")] = "auto"
    response_format: Annotated[
        str,
        AfterValidator(
            lambda value: only(value, ("b64_json",), "pictures are in the answer, none are kept to be linked to")
        ),
    ] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of jpeg and webp; png has none but 100")
    ] = None
    user: Annotated[str | None, Field(description="ignored")] = None
    # Not of OpenAI; their names are those of other image servers.
    seed: Seed = None
    num_inference_steps: Annotated[int | None, Field(ge=1, description="steps of the sampler")] = None
    sampler: Annotated[str | None, Field(description="euler, heun or dpmpp_2m")] = None

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @field_validator("output_compression")
    @classmethod
    def compresses(cls, value: int, info: ValidationInfo) -> int:
        if value != 100 and info.data.get("output_format") == "png":
            raise ValueError("100 for png, which loses nothing; ask for output_format jpeg or webp")
        return value

    @property
    def side(self) -> int | None:
        """Of the pictures in pixels; None is the network's own."""
        return side_of(self.size) or None


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
        int | None, Field(ge=0, le=3, description="with stream: previews on the way, evenly over the steps")
    ] = None
    background: Annotated[
        str, AfterValidator(lambda value: only(value, ("auto", "opaque"), "the network draws nothing transparent"))
    ] = "auto"
    quality: Annotated[str | None, Field(description="ignored")] = None
    style: Annotated[str | None, Field(description="ignored")] = None
    moderation: Annotated[str | None, Field(description="ignored")] = None
    safety_identifier: Annotated[str | None, Field(description="ignored")] = None
    # Not of OpenAI.
    class_id: Annotated[int | None, Field(description="ImageNet-1k index, instead of what the prompt says")] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, description="1 is off")
    ] = None
    guidance_interval: Annotated[
        tuple[float, float],
        BeforeValidator(parse_interval, json_schema_input_type=list[float] | str),
        Field(description="times from and to which guidance is on; 0 is noise, 1 is data"),
    ] = (0.0, 1.0)
    preview_every: Annotated[
        int | None,
        Field(ge=1, le=MAX_STEPS, description="with stream: steps between previews, at most partial_images of them"),
    ] = None

    @field_validator("partial_images", "preview_every")
    @classmethod
    def streams(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("stream"):
            raise ValueError("left out where stream is not true")
        return value


class VariationForm(Options):
    """POST /v1/images/variations: the text fields beside `image`."""

    strength: Strength = 0.6


class EditForm(GenerationRequest):
    """POST /v1/images/edits: the text fields beside `image` and `mask`."""

    strength: Strength = 0.6
    input_fidelity: Annotated[str | None, Field(description="ignored; see strength")] = None


class DrawnImage(BaseModel):
    b64_json: str
    seed: Annotated[int, Field(description="with the index: what draws the picture again")]
    index: int


class TokenCounts(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens are the network's: latent tokens of pictures that were encoded, and of those drawn. Text has none."""

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
