"""What requests and answers look like. Unknown parameters are refused, so that a misspelling is no silent default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from dsd_serve.params import MAX_GUIDANCE, MAX_SEED

Format = Literal["png", "jpeg", "webp", "json"]
Size = Annotated[
    int | None,
    Field(
        ge=8, description="side of the pictures in pixels; the network's own size is scaled to it (default: not scaled)"
    ),
]


class GenerateRequest(BaseModel):
    """Settings of GET and POST /generate. What is left out is taken from the model's recommendation."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    class_: Annotated[
        str | int,
        Field(
            alias="class",
            description="ImageNet-1k index, wnid or name",
            examples=["207", "n02099601", "golden retriever"],
        ),
    ]
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="same seed, same picture (default: random)")] = (
        None
    )
    n: Annotated[int, Field(ge=1, description="number of pictures; image i is that of index + i")] = 1
    index: Annotated[int, Field(ge=0, le=MAX_SEED, description="number of the first picture of this seed")] = 0
    steps: Annotated[int | None, Field(ge=1, description="steps of the sampler")] = None
    sampler: Annotated[str | None, Field(description="euler, heun or dpmpp_2m")] = None
    guidance: Annotated[
        float | None, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False, description="guidance scale, 1 is off")
    ] = None
    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    size: Size = None


class ReconstructQuery(BaseModel):
    """Settings of POST /reconstruct, in the query string; the body is the picture."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[Format | None, Field(description="default: what Accept asks for, else png")] = None
    size: Size = None


class ClassesQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    q: Annotated[str, StringConstraints(max_length=200), Field(description="words to search for")] = ""
    trained: Annotated[bool, Field(description="only classes that this model can draw")] = True


class ImageClassAnswer(BaseModel):
    index: int
    wnid: str
    name: str


class ImageAnswer(BaseModel):
    """One picture of a JSON answer."""

    index: Annotated[int, Field(description="its number under the seed: the same seed and index give the same picture")]
    base64: Annotated[str, Field(description="a PNG")]


class GenerateAnswer(BaseModel):
    """`format=json`: the pictures and everything that is needed to draw them again."""

    class_: Annotated[ImageClassAnswer, Field(alias="class")]
    seed: int
    steps: int
    sampler: str
    guidance: float
    size: int
    images: list[ImageAnswer]


class ReconstructAnswer(BaseModel):
    size: int
    psnr: Annotated[float, Field(description="of the reconstruction, in dB, at the network's own size")]
    base64: Annotated[str, Field(description="a PNG")]


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
