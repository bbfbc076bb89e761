"""What requests and answers look like. Unknown parameters are refused, so that a misspelling is no silent default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from dsd_serve.params import MAX_GUIDANCE, MAX_SEED, MAX_STEPS

Format = Literal["png", "jpeg", "webp", "json", "zip"]
Size = Annotated[
    int | None,
    Field(
        ge=8, description="side of the pictures in pixels; the network's own size is scaled to it (default: not scaled)"
    ),
]
ClassName = Annotated[
    str | int,
    Field(
        description="ImageNet-1k index, wnid or name",
        examples=["207", "n02099601", "golden retriever"],
    ),
]
Seed = Annotated[int | None, Field(ge=0, le=MAX_SEED, description="same seed, same picture (default: random)")]
Time = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Timeout = Annotated[
    float | None,
    Field(
        gt=0,
        allow_inf_nan=False,
        description="seconds after which the answer is of no use: refused at once when it cannot be expected in time",
    ),
]
Strength = Annotated[
    float, Field(gt=0, le=1, allow_inf_nan=False, description="how much noise: 1 keeps nothing of the picture")
]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class SamplingQuery(Request):
    """Settings of all that is drawn. What is left out is taken from the model's recommendation."""

    seed: Seed = None
    n: Annotated[int, Field(ge=1, description="number of pictures; image i is that of index + i")] = 1
    index: Annotated[int, Field(ge=0, le=MAX_SEED, description="number of the first picture of this seed")] = 0
    steps: Annotated[int | None, Field(ge=1, description="steps of the sampler")] = None
    sampler: Annotated[str | None, Field(description="euler, heun or dpmpp_2m")] = None
    guidance: Annotated[
        float | None, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, description="guidance scale, 1 is off")
    ] = None
    guidance_start: Annotated[Time, Field(description="time from which guidance is on; 0 is noise, 1 is data")] = 0.0
    guidance_stop: Annotated[Time, Field(description="time until which guidance is on; outside a step costs half")] = (
        1.0
    )
    preview_every: Annotated[
        int, Field(ge=0, le=MAX_STEPS, description="with events: a preview every that many steps, 0 is none")
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


class WalkQuery(Request):
    """Settings of POST /interpolate between two pictures, in the query string; the body is a form with both."""

    n: Annotated[int, Field(ge=2, description="number of pictures, both ends included")] = 8
    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    size: Size = None
    timeout: Timeout = None


class End(Request):
    """One end of a walk: a class, and the seed and index of its noise."""

    class_: Annotated[ClassName, Field(alias="class")]
    seed: Seed = None
    index: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0


class InterpolateRequest(SamplingQuery):
    """Settings of POST /interpolate between two classes or seeds. A seed that is left out is that of the other end."""

    from_: Annotated[End, Field(alias="from")]
    to: End
    n: Annotated[int, Field(ge=2, description="number of pictures, both ends included")] = 8
    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    seed: Annotated[None, Field(description="each end has its own")] = None
    index: Annotated[Literal[0], Field(description="each end has its own")] = 0
    preview_every: Literal[0] = 0


class ClassesQuery(Request):
    q: Annotated[str, StringConstraints(max_length=200), Field(description="words to search for")] = ""
    trained: Annotated[bool, Field(description="only classes that this model can draw")] = True


class ImageClassAnswer(BaseModel):
    index: int
    wnid: str
    name: str


class ImageAnswer(BaseModel):
    """One picture of a JSON answer, with the settings that draw it again."""

    model_config = ConfigDict(extra="allow")

    base64: Annotated[str, Field(description="a PNG")]


class PicturesAnswer(BaseModel):
    """`format=json`: the pictures and everything that is needed to draw them again."""

    model_config = ConfigDict(extra="allow")

    images: list[ImageAnswer]


class LatentsAnswer(BaseModel):
    shape: list[int]
    latents: list[list[float]]


class ModelAnswer(BaseModel):
    """What is served, and what runs it."""

    name: str
    fingerprint: Annotated[str, Field(description="sha256 of configuration, graph and weights")]
    version: str
    image_size: int
    latent_shape: list[int]
    num_classes: int
    classes: Annotated[list[int], Field(description="labels that it was trained on")]
    defaults: dict[str, str | int | float]
    samplers: list[str]
    engine: dict[str, str]
    row_budget: int
    self_test: Annotated[dict[str, Any], Field(description="whether a row depends on its neighbours, tried at start")]
    limits: dict[str, int | float]


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457 problem document: `detail` says what was wrong and what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: Annotated[str, Field(description="as in the header X-Request-ID and in the log")] = ""
