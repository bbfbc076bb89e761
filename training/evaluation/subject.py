"""Models under evaluation: a model directory on an engine, or a running server by its URL."""

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dsd_serve.client import Client
from dsd_serve.errors import EngineUnavailableError, ServerError
from dsd_serve.imaging import codec
from dsd_serve.labels import ImageClass, all_classes
from dsd_serve.loading import load
from dsd_serve.model import Model
from dsd_serve.params import SamplingParams, from_api
from dsd_serve.programs import Generate, Task
from dsd_serve.rows import Decode, Encode, Latents, Pixels
from training.classes import IMAGENET, NO_CLASSES, ClassNames

T = TypeVar("T")
CONCURRENCY = 8  # requests in flight at a server
BUSY = 429
RETRIES = 60  # of a request that a busy server refused, a second apart


class Subject(Protocol):
    """A model that draws, encodes and decodes. image_size: S in pixels. classes: the labels it draws, with their
    classes; None is the class of the null label, the only one of a model without classes.

    defaults: its recommended sampling settings. engine: a description of what runs it, plain values.
    """

    name: str
    fingerprint: str
    image_size: int
    classes: dict[int, ImageClass | None]
    defaults: SamplingParams
    engine: dict[str, Any]

    def draw(self, labels: Sequence[int], params: SamplingParams) -> NDArray[np.uint8]:
        """An image of each label, image i from index i of the seed: uint8 [N, 3, S, S]."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images uint8 [N, 3, S, S] -> latents float32 [N, L, C]."""
        ...

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Latents float32 [N, L, C] -> images uint8 [N, 3, S, S]."""
        ...


def names_of(subject: Subject) -> ClassNames:
    """The names of a subject's labels, by which the classes of images are found."""
    known = all_classes()
    classes = [c for c in subject.classes.values() if c is not None]
    if not classes:
        return NO_CLASSES
    if all(c.index < len(known) and c.wnid == known[c.index].wnid for c in classes):
        return IMAGENET
    names = {c.index: c.name for c in classes}
    last = max(names)  # a server names only the classes that it draws
    return ClassNames(last + 1, tuple(names.get(label, f"({label})") for label in range(last + 1)))


def open_subject(
    place: str, engine: str = "onnx", device: str = "cpu", precision: str = "fp32", api_key: str = ""
) -> Subject:
    """The subject at a URL of a server, or else in a model directory, which `engine` runs. Raises DSDError.

    api_key: for a server that needs one.
    """
    if place.startswith(("http://", "https://")):
        return ServerSubject(Client(place, api_key=api_key))
    return ModelSubject(load(place, engine, device=device, precision=precision))


class ModelSubject:
    """A model directory on an engine of this process."""

    def __init__(self, model: Model) -> None:
        self.model, info = model, model.info
        self.name, self.fingerprint, self.defaults = info.name, info.fingerprint, info.defaults
        self.image_size = info.config.image_size
        self.classes: dict[int, ImageClass | None] = {c.index: c for c in info.table.trained}
        self.classes = self.classes or {info.config.null_label: None}
        self.engine = dict(info.described)

    def draw(self, labels: Sequence[int], params: SamplingParams) -> NDArray[np.uint8]:
        tasks = [Generate(int(label), replace(params, index=params.index + i)) for i, label in enumerate(labels)]
        return np.stack(self.run(tasks, "samples"))

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack(self.run([Encode(one) for one in pixels], "latents"))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.stack(self.run([Decode(z) for z in latents], "reconstructions"))

    def run(self, tasks: Sequence[Task], title: str) -> list[Any]:
        """The results of tasks, in order."""
        return list(tqdm(self.model.results(tasks), total=len(tasks), desc=title, unit="image", leave=False))


@dataclass(frozen=True)
class DrawnSamples:
    """Samples that a model draws on demand: its classes in turn, sample i from index i of the seed."""

    subject: Subject
    params: SamplingParams
    count: int

    def batches(self, rows: int) -> Iterator[list[NDArray[np.uint8]]]:
        """Images uint8 [3, S, S] in lists of `rows`; the last list is shorter."""
        classes = list(self.subject.classes)
        for begin in range(0, self.count, rows):
            labels = [classes[i % len(classes)] for i in range(begin, min(begin + rows, self.count))]
            yield list(self.subject.draw(labels, replace(self.params, index=self.params.index + begin)))

    def describe(self) -> dict[str, Any]:
        """The samples in plain values, for the report."""
        classes = len(self.subject.classes)
        return {
            "name": f"{self.subject.name} ({self.subject.fingerprint[:8]})",
            "fingerprint": self.subject.fingerprint,
            "engine": self.subject.engine,
            "sampling": described_sampling(self.params),
            "classes": {
                "classes": min(classes, self.count),
                "fewest": max(self.count // classes, 1),
                "most": -(-self.count // classes),
                "unlabelled": 0,
            },
        }


def described_sampling(params: SamplingParams) -> dict[str, Any]:
    """The sampling settings in plain values, for the report."""
    names = ("seed", "num_steps", "sampler", "guidance_scale", "guidance_start", "guidance_stop")
    return {name: getattr(params, name) for name in names}


class ServerSubject:
    """A running server. Requests run concurrently and are repeated while the server is busy."""

    def __init__(self, client: Client) -> None:
        self.client = client
        info = client.model()
        self.name, self.fingerprint = str(info["name"]), str(info["fingerprint"])
        self.image_size, self.num_classes = int(info["image_size"]), int(info["num_classes"])
        found = (ImageClass(one["index"], one.get("wnid", ""), one["name"]) for one in client.classes())
        self.classes: dict[int, ImageClass | None] = {c.index: c for c in found} or {self.num_classes: None}
        self.max_steps = int(info["limits"]["steps"])
        self.defaults = from_api(info["defaults"], SamplingParams())
        self.engine = {"server": client.url, **info["engine"]}

    def draw(self, labels: Sequence[int], params: SamplingParams) -> NDArray[np.uint8]:
        if params.num_steps > self.max_steps:
            raise EngineUnavailableError(
                f"the server takes at most {self.max_steps} steps, got {params.num_steps}; start it "
                f"with --max-steps {params.num_steps}"
            )
        settings = {
            "seed": params.seed,
            "steps": params.num_steps,
            "sampler": params.sampler,
            "guidance": params.guidance_scale,
            "guidance_start": params.guidance_start,
            "guidance_stop": params.guidance_stop,
        }

        def one(number: int) -> Pixels:
            label = int(labels[number]) if self.num_classes else None
            answer = self.client.generate_json(label, index=params.index + number, **settings)
            return codec.read_image(base64.b64decode(answer["images"][0]["base64"]))

        return np.stack(self.request_all(one, range(len(labels)), "samples"))

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        def one(image: Pixels) -> Latents:
            return self.client.encode(codec.write_image(image))

        return np.stack(self.request_all(one, pixels, "latents"))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        def one(z: Latents) -> Pixels:
            return codec.read_image(self.client.decode(z, format="png"))

        return np.stack(self.request_all(one, latents, "reconstructions"))

    def request_all(self, one: Callable[[Any], T], inputs: Sequence[Any] | NDArray[Any], title: str) -> list[T]:
        """The answers for all inputs, in order."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = pool.map(lambda value: with_retries(one, value), inputs)
            return list(tqdm(answers, total=len(inputs), desc=title, unit="image", leave=False))


def with_retries(one: Callable[[Any], T], value: Any) -> T:
    """Call `one`, and repeat it while the server is busy."""
    for _ in range(RETRIES):
        try:
            return one(value)
        except ServerError as error:
            if error.status != BUSY:
                raise
            time.sleep(1)
    return one(value)
