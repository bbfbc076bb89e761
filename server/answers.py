"""The answers in JSON and the events: the server fills these models, and the OpenAPI document describes them.

Fields are in the order in which they are sent.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, create_model

from dsd_serve.params import API_NAMES, MAX_SEED, RECOMMENDED, SETTINGS, SHOWN_WITH_IMAGE
from server.schemas import SamplerName, Time, of_setting


class Answer(BaseModel):
    """A part of an answer. Only described fields are in it."""

    model_config = ConfigDict(extra="forbid")


class ImageClassAnswer(Answer):
    index: Annotated[int, Field(ge=0)]
    wnid: str = ""  # left out where there is none
    name: str


Base64 = Annotated[str, Field(description="a PNG", json_schema_extra={"contentEncoding": "base64"})]
Fingerprint = Annotated[
    str, Field(pattern="^[0-9a-f]{64}$", description="sha256 of the model's configuration, graph and weights")
]


class ClassAndSeed(Answer):
    """The class of an image (null: no class), and the seed and index of its noise."""

    class_: Annotated[ImageClassAnswer | None, Field(alias="class")]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    index: Annotated[int, Field(ge=0, le=MAX_SEED)]


def settings_model(name: str, about: str, settings: Sequence[str], base: type[Answer]) -> type[Answer]:
    """The model with these sampling settings, under the names of the HTTP API, in addition to the fields of `base`."""
    fields: dict[str, Any] = {}
    for field in settings:
        setting = SETTINGS[field]
        limits = Field(json_schema_extra={"enum": [*setting.choices]}) if setting.choices else of_setting(field)
        fields[API_NAMES[field]] = (Annotated[type(setting.default), limits], ...)
    return create_model(name, __base__=base, __doc__=about, **fields)


if TYPE_CHECKING:  # their fields are rows of dsd_serve/params.py

    class Recommended(Answer): ...

    class SamplingUsed(Recommended): ...

else:
    Recommended = settings_model("Recommended", "The settings that a model recommends.", RECOMMENDED, Answer)
    FURTHER = [name for name in SHOWN_WITH_IMAGE if name not in (*RECOMMENDED, *ClassAndSeed.model_fields)]
    SamplingUsed = settings_model("SamplingUsed", "The settings of the sampler.", FURTHER, Recommended)


class ModelUsed(Answer):
    model: str
    fingerprint: Fingerprint


class DrawnSettings(ModelUsed, SamplingUsed, ClassAndSeed):
    """The settings that draw an image again."""


class EditedSettings(DrawnSettings):
    """The settings that make an edit of the same image again."""

    strength: Annotated[float, Field(gt=0, le=1)]


class GeneratedImage(DrawnSettings):
    base64: Base64


class EditedImage(EditedSettings):
    base64: Base64


class DrawnAnswer(DrawnSettings):
    """`format=json` of /generate: the settings of the first image, and each image with its own."""

    size: Annotated[int, Field(ge=1, description="side of the images in pixels")]
    images: list[GeneratedImage]


class EditedAnswer(EditedSettings):
    """`format=json` of /edit: the settings of the first image, and each image with its own."""

    size: Annotated[int, Field(ge=1, description="side of the images in pixels")]
    images: list[EditedImage]


class EndUsed(Answer):
    """The class and seed of one end of a walk."""

    class_: Annotated[int | None, Field(alias="class")]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]


class Ends(Answer):
    from_: Annotated[EndUsed, Field(alias="from")]
    to: EndUsed


class WalkSettings(ModelUsed, SamplingUsed, Ends):
    """The settings of a walk; one between equal seeds keeps its noise."""


class WalkImage(WalkSettings):
    """An image of a walk between classes; `fraction` is its place, 0 is from and 1 is to."""

    fraction: Time
    base64: Base64


class WalkAnswer(WalkSettings):
    """`format=json` of /interpolate between classes or seeds."""

    size: Annotated[int, Field(ge=1)]
    images: list[WalkImage]


class LatentWalkImage(Answer):
    """An image of a walk between two images; `fraction` is its place, 0 is from and 1 is to."""

    model: str
    fraction: Time
    base64: Base64


class LatentWalkAnswer(Answer):
    """`format=json` of /interpolate between two images."""

    model: str
    size: Annotated[int, Field(ge=1)]
    images: list[LatentWalkImage]


class AnyWalkAnswer(RootModel[WalkAnswer | LatentWalkAnswer]):
    """Between classes and seeds, or between images."""


class DecodedImage(Answer):
    base64: Base64


class DecodedAnswer(Answer):
    """`format=json` of /decode."""

    size: Annotated[int, Field(ge=1)]
    model: str
    images: Annotated[list[DecodedImage], Field(min_length=1, max_length=1)]


class ReconstructedImage(Answer):
    psnr: float
    base64: Base64


class ReconstructedAnswer(Answer):
    """`format=json` of /reconstruct; psnr is that of the answer against the network's input, in dB."""

    size: Annotated[int, Field(ge=1)]
    psnr: float
    model: str
    images: Annotated[list[ReconstructedImage], Field(min_length=1, max_length=1)]


class ImageNumber(Answer):
    image: Annotated[int, Field(ge=0, description="number of the image in its request")]


class PreviewEvent(ImageNumber):
    """The network's estimate of image `image` after `step` of `steps`."""

    step: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    base64: Base64


class OfAnEdit(Answer):
    strength: Annotated[float, Field(gt=0, le=1, description="after /edit only")] = 1.0


class Encoded(Answer):
    base64: Base64


class ImageEvent(Encoded, OfAnEdit, DrawnSettings, ImageNumber):
    """Image `image` of the request is ready. Only /edit sets `strength`."""


class ImageCount(Answer):
    images: Annotated[int, Field(ge=1, description="how many were requested")]


class DoneEvent(OfAnEdit, DrawnSettings, ImageCount):
    """The last event, after an `image` or `error` event for every image. The settings are those of the first image."""


class LatentsAnswer(Answer):
    """Latents of one image: a row of channels for each token, in row-major order."""

    latents: list[list[float]]


class Defaults(Recommended):
    """The values for requests that do not give them: the model's recommendation, within the server's limits."""


class SelfTest(Answer):
    """The self-test at start: whether a row gives the same bits alone and in a batch, and so a seed the same bytes
    under any load. Always true on a CPU. On a GPU only the batch sizes in `row_counts` were tested."""

    batch_invariant: bool
    rows: Annotated[int, Field(ge=1)]
    row_counts: Annotated[list[int], Field(description="rows of the batches that were tried")]
    max_difference: float


class ClassImagesAnswer(Answer):
    """The grid of /classes.webp: square images, row by row. Each class has `per_class` of them, one after another, the
    most typical first; the classes are in the order of `classes`."""

    columns: Annotated[int, Field(ge=1, description="images in a row")]
    per_class: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="of the file")]


class ModelAnswer(Answer):
    """The model, and the engine that runs it."""

    name: str
    fingerprint: Fingerprint
    version: str
    image_size: Annotated[int, Field(ge=1, description="side of the network's images, in pixels")]
    latent_shape: Annotated[list[int], Field(min_length=2, max_length=2, description="tokens and channels")]
    num_classes: Annotated[int, Field(ge=0)]
    classes: Annotated[list[int], Field(description="labels of the training classes")]
    class_images: Annotated[ClassImagesAnswer | None, Field(description="null if dsd-export drew none")]
    parameters: Annotated[int, Field(ge=1, description="weights of the network")]
    defaults: Defaults
    samplers: list[SamplerName]
    engine: Annotated[dict[str, str], Field(description="the engine and its device")]
    row_budget: Annotated[int, Field(ge=1, description="rows of a forward pass, as measured until now")]
    self_test: SelfTest
    limits: Annotated[dict[str, int | float], Field(description="the largest values that this server accepts")]


class ModelReplaced(Answer):
    """A model that is served now, and what it replaces."""

    name: str
    fingerprint: Fingerprint
    replaced: Annotated[
        Fingerprint | None, Field(description="fingerprint of the model before; null if it was not loaded")
    ]
    seconds: Annotated[float, Field(ge=0, description="for loading and testing it")]


class CheckpointAnswer(Answer):
    """A checkpoint whose images /checkpoints/STEP returns."""

    step: Annotated[int, Field(ge=0)]
    fingerprint: Fingerprint
    created: Annotated[int, Field(ge=0, description="when they were drawn, in seconds since 1970")]


class CheckpointsAnswer(Answer):
    """The training run that this server follows. Every checkpoint draws each of the seeds of each of the classes."""

    run: str
    classes: Annotated[list[ImageClassAnswer], Field(description="empty for a model without classes")]
    seeds: list[int]
    checkpoints: list[CheckpointAnswer]


class Health(Answer):
    status: Literal["live", "ready"]


class Problem(BaseModel):
    """RFC 9457 problem document: `detail` says what is wrong and how to mend it."""

    type: Annotated[str, Field(json_schema_extra={"format": "uri-reference"})] = "about:blank"
    title: str
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str
    request_id: Annotated[str, Field(description="as in the header X-Request-ID and in the log")] = ""


class ErrorEvent(Problem, ImageNumber):
    """The error of image `image`; the other images are not affected."""


def fill(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON values of an answer. A value that the model does not describe is a bug, which raises."""
    return model.model_validate(values).model_dump(by_alias=True, exclude_unset=True)
