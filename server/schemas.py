"""What requests and answers look like. Unknown parameters are refused, so that a misspelling is no silent default."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    RootModel,
    StringConstraints,
    model_validator,
)

from dsd_serve.labels import MAX_TEXT
from dsd_serve.params import MAX_GUIDANCE, MAX_SEED, MAX_STEPS, SAMPLER_NAMES

CLASS_FORMAT = "imagenet-class"  # in the OpenAPI document, of strings that name a class
MOST = 2**31 - 1  # of a number whose limit is the server's: sizes, steps, images
MAX_DIGITS = 40
WHOLE = re.compile(r"-?[0-9]+(\.0*)?", re.ASCII)
REAL = re.compile(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.ASCII | re.IGNORECASE)


def whole(value: Any) -> Any:
    """Refuse text that Python reads as a whole number and nobody means as one, such as 1_000 or +7."""
    if isinstance(value, str) and not WHOLE.fullmatch(short(value)):
        raise ValueError("a valid integer in plain digits, such as 25")
    return value


def whole_or_text(value: Any) -> Any:
    """The same for a number that JSON may hold as text too, because JavaScript rounds what is above 2^53."""
    value = whole(value)
    return int(value.partition(".")[0]) if isinstance(value, str) else value


def real(value: Any) -> Any:
    """Refuse text that Python reads as a number and nobody means as one, and whole numbers beyond any float."""
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


def class_text(value: Any) -> str | int:
    """Text or a number that may name a class; whether it does is for the model to say."""
    if isinstance(value, bool) or not isinstance(value, str | int) or (isinstance(value, int) and abs(value) > MOST):
        raise ValueError("an index, a wnid like n02099601 or a name")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"at most {MAX_TEXT} characters long")
    return value


def known_sampler(value: str | None) -> str | None:
    if value not in (None, *SAMPLER_NAMES):
        raise ValueError(f"one of {', '.join(SAMPLER_NAMES)}")
    return value


def left_out(why: str, *same: Any) -> Callable[[Any], Any]:
    """Refuse a parameter that has no meaning here, but for the values that say so."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or value not in same:
            raise ValueError(f"left out: {why}")
        return value

    return check


WholeNumber = BeforeValidator(whole)
RealNumber = BeforeValidator(real)

Format = Literal["png", "jpeg", "webp", "json", "zip"]
Size = Annotated[
    int | None,
    Field(
        ge=8,
        le=MOST,
        description="side of the pictures in pixels; the network's own size is scaled to it (default: not scaled)",
    ),
    WholeNumber,
]
ClassName = Annotated[
    str | int,
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
SamplerChoice = Annotated[str | None, AfterValidator(known_sampler)]
Seed = Annotated[
    int | None,
    Field(
        ge=0,
        le=MAX_SEED,
        description="same seed, same picture (default: random). JavaScript rounds JSON numbers above 2^53: send a "
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
        description="seconds after which the answer is of no use: refused at once when it cannot be expected in time",
    ),
    RealNumber,
]
Strength = Annotated[
    float,
    Field(ge=0.001, le=1, allow_inf_nan=False, description="how much noise: 1 keeps nothing of the picture"),
    RealNumber,
]


class Answer(BaseModel):
    """A part of an answer; nothing is in it that is not described."""

    model_config = ConfigDict(extra="forbid")


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
    """Settings of all that is drawn. What is left out is taken from the model's recommendation."""

    seed: Seed = None
    n: Annotated[
        int, Field(ge=1, le=MOST, description="number of pictures; image i is that of index + i"), WholeNumber
    ] = 1
    index: Annotated[
        int, Field(ge=0, le=MAX_SEED, description="number of the first picture of this seed"), WholeNumber
    ] = 0
    steps: Annotated[
        int | None, Field(ge=1, le=MOST, description="steps of the sampler", examples=[8]), WholeNumber
    ] = None
    sampler: Annotated[
        SamplerChoice,
        Field(
            description="euler, heun or dpmpp_2m; heun evaluates the network twice a step",
            json_schema_extra={"enum": [*SAMPLER_NAMES, None]},
        ),
    ] = None
    guidance: Annotated[
        float | None,
        Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, description="guidance scale, 1 is off"),
        RealNumber,
    ] = None
    guidance_start: Annotated[Time, Field(description="time from which guidance is on; 0 is noise, 1 is data")] = 0.0
    guidance_stop: Annotated[Time, Field(description="time until which guidance is on; outside a step costs half")] = (
        1.0
    )
    preview_every: Annotated[
        int,
        Field(ge=0, le=MAX_STEPS, description="with events: a preview every that many steps, 0 is none"),
        WholeNumber,
    ] = 0
    timeout: Timeout = None
    size: Size = None


class GenerateRequest(SamplingQuery):
    """Settings of GET and POST /generate."""

    class_: Annotated[ClassName, Field(alias="class")]
    format: Annotated[
        Literal["png", "jpeg", "webp", "json", "zip", "events"] | None,
        Field(description="default: what Accept asks for, else png; events are server-sent events with previews"),
    ] = None


class EditQuery(SamplingQuery):
    """Settings of POST /edit, in the query string; the body is the picture, or a form with image and mask."""

    class_: Annotated[ClassName | None, Field(alias="class", description="what to draw (default: no class)")] = None
    strength: Strength = 0.6
    format: Annotated[
        Literal["png", "jpeg", "webp", "json", "zip", "events"] | None,
        Field(description="default: what Accept asks for, else png; events are server-sent events with previews"),
    ] = None


class PictureQuery(Request):
    """Settings of POST /reconstruct and /decode, in the query string; the body is the picture or the latents."""

    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    size: Size = None
    timeout: Timeout = None


class EncodeQuery(Request):
    """Settings of POST /encode, in the query string; the body is the picture."""

    format: Annotated[
        Literal["npy", "safetensors", "json"] | None, Field(description="default: what Accept asks for, else npy")
    ] = None
    timeout: Timeout = None


WalkLength = Annotated[
    int,
    Field(
        ge=2,
        le=MOST,
        description="number of pictures, both ends included; 8 or what the server's limit leaves of it",
    ),
    WholeNumber,
]


class WalkQuery(Request):
    """Settings of POST /interpolate between two pictures, in the query string; the body is a form with both."""

    n: WalkLength = 8
    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    size: Size = None
    timeout: Timeout = None


class End(Request):
    """One end of a walk: a class, and the seed and index of its noise."""

    class_: Annotated[ClassName, Field(alias="class")]
    seed: Seed = None
    index: Annotated[int, Field(ge=0, le=MAX_SEED), WholeNumber] = 0


OF_ENDS = "each end has its own"
NO_PREVIEWS = "a walk has no previews"


class InterpolateRequest(SamplingQuery):
    """Settings of POST /interpolate between two classes or seeds. A seed that is left out is that of the other end."""

    from_: Annotated[End, Field(alias="from")]
    to: End
    n: WalkLength = 8
    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    seed: Annotated[None, Field(description=OF_ENDS), BeforeValidator(left_out(OF_ENDS, None))] = None
    index: Annotated[int, Field(ge=0, le=0, description=OF_ENDS), BeforeValidator(left_out(OF_ENDS, 0))] = 0
    preview_every: Annotated[
        int, Field(ge=0, le=0, description=NO_PREVIEWS), BeforeValidator(left_out(NO_PREVIEWS, 0))
    ] = 0


class ClassesQuery(Request):
    q: Annotated[
        str, StringConstraints(max_length=200), Field(description="words to search for", examples=["retriever"])
    ] = ""
    trained: Annotated[bool, Field(description="only classes that this model can draw")] = True


class ImageClassAnswer(Answer):
    index: Annotated[int, Field(ge=0, le=999, examples=[207])]
    wnid: Annotated[str, Field(pattern="^n[0-9]{8}$", examples=["n02099601"])]
    name: Annotated[str, Field(examples=["Golden Retriever"])]


Base64 = Annotated[str, Field(description="a PNG", json_schema_extra={"contentEncoding": "base64"})]
Fingerprint = Annotated[
    str, Field(pattern="^[0-9a-f]{64}$", description="sha256 of the model's configuration, graph and weights")
]


class SamplingUsed(Answer):
    """The settings that sampling used."""

    steps: Annotated[int, Field(ge=1)]
    sampler: SamplerName
    guidance: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
    guidance_start: Time
    guidance_stop: Time
    model: str
    fingerprint: Fingerprint


class DrawnSettings(SamplingUsed):
    """The settings that draw a picture again."""

    class_: Annotated[ImageClassAnswer | None, Field(alias="class")]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    index: Annotated[int, Field(ge=0, le=MAX_SEED)]


class EditedSettings(DrawnSettings):
    """The settings that make an edit again, of the same picture."""

    strength: Annotated[float, Field(gt=0, le=1)]


class DrawnPicture(DrawnSettings):
    base64: Base64


class EditedPicture(EditedSettings):
    base64: Base64


class DrawnAnswer(DrawnSettings):
    """`format=json` of /generate: the settings of the first picture, and each picture with its own."""

    size: Annotated[int, Field(ge=1, description="side of the pictures in pixels")]
    images: list[DrawnPicture]


class EditedAnswer(EditedSettings):
    """`format=json` of /edit: the settings of the first picture, and each picture with its own."""

    size: Annotated[int, Field(ge=1, description="side of the pictures in pixels")]
    images: list[EditedPicture]


class EndUsed(Answer):
    """The class and seed of one end of a walk."""

    class_: Annotated[int, Field(alias="class")]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]


class WalkSettings(SamplingUsed):
    """The settings of a walk; that between equal seeds keeps its noise."""

    from_: Annotated[EndUsed, Field(alias="from")]
    to: EndUsed


class WalkPicture(WalkSettings):
    """A picture of a walk between classes; `fraction` is its place, 0 is from and 1 is to."""

    fraction: Time
    base64: Base64


class WalkAnswer(WalkSettings):
    """`format=json` of /interpolate between classes or seeds."""

    size: Annotated[int, Field(ge=1)]
    images: list[WalkPicture]


class LatentWalkPicture(Answer):
    """A picture of a walk between two pictures; `fraction` is its place, 0 is from and 1 is to."""

    model: str
    fraction: Time
    base64: Base64


class LatentWalkAnswer(Answer):
    """`format=json` of /interpolate between two pictures."""

    model: str
    size: Annotated[int, Field(ge=1)]
    images: list[LatentWalkPicture]


class AnyWalkAnswer(RootModel[WalkAnswer | LatentWalkAnswer]):
    """By what was walked between: classes and seeds, or pictures."""


class DecodedPicture(Answer):
    base64: Base64


class DecodedAnswer(Answer):
    """`format=json` of /decode."""

    model: str
    size: Annotated[int, Field(ge=1)]
    images: Annotated[list[DecodedPicture], Field(min_length=1, max_length=1)]


class ReconstructedPicture(Answer):
    psnr: float
    base64: Base64


class ReconstructedAnswer(Answer):
    """`format=json` of /reconstruct; psnr is that of the answer against the picture, in dB."""

    model: str
    size: Annotated[int, Field(ge=1)]
    psnr: float
    images: Annotated[list[ReconstructedPicture], Field(min_length=1, max_length=1)]


class PreviewEvent(Answer):
    """What the network expects of picture `image` after `step` of `steps`."""

    image: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    base64: Base64


class ImageEvent(DrawnPicture):
    """Picture `image` of the request is drawn. `strength` is there after /edit."""

    image: Annotated[int, Field(ge=0)]
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0


class DoneEvent(DrawnSettings):
    """All pictures have been told of; the settings are those of the first."""

    images: Annotated[int, Field(ge=1, description="how many were asked for")]
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0


class LatentsAnswer(Answer):
    """Latents of one picture: a row of channels for each token, in row-major order of the picture."""

    latents: list[list[float]]


class Defaults(Answer):
    """What is used where a request does not say: the model's recommendation, within the server's limits."""

    steps: Annotated[int, Field(ge=1)]
    sampler: SamplerName
    guidance: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]


class SelfTest(Answer):
    """Whether a row's result depends on the rows beside it, tried at start."""

    batch_invariant: bool
    rows: Annotated[int, Field(ge=1)]
    max_difference: float


class ModelAnswer(Answer):
    """What is served, and what runs it."""

    name: str
    fingerprint: Fingerprint
    version: str
    image_size: Annotated[int, Field(ge=1, description="side of the network's pictures, in pixels")]
    latent_shape: Annotated[list[int], Field(min_length=2, max_length=2, description="tokens and channels")]
    num_classes: Annotated[int, Field(ge=1)]
    classes: Annotated[list[int], Field(description="labels that it was trained on")]
    defaults: Defaults
    samplers: list[SamplerName]
    engine: Annotated[dict[str, str], Field(description="what runs the network, and on what")]
    row_budget: Annotated[int, Field(ge=1, description="rows that go through the network at a time")]
    self_test: SelfTest
    limits: Annotated[dict[str, int | float], Field(description="the largest values that this server takes")]


class Health(Answer):
    status: Literal["live", "ready"]


class Problem(BaseModel):
    """RFC 9457 problem document: `detail` says what was wrong and what to do."""

    type: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})] = "about:blank"
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    request_id: Annotated[str, Field(description="as in the header X-Request-ID and in the log")] = ""


class ErrorEvent(Problem):
    """Why picture `image` was not drawn; the others go on."""

    image: Annotated[int, Field(ge=0)]
