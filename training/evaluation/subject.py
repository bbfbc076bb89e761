"""What is evaluated: a model directory on an engine, or a running server by its URL. Both draw, encode and decode."""

import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dsd_serve.client import Client
from dsd_serve.errors import EngineUnavailableError, ServerError
from dsd_serve.imaging import codec
from dsd_serve.loading import load
from dsd_serve.model import Model
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate, Task
from dsd_serve.rows import Decode, Encode, Latents, Pixels

T = TypeVar("T")
AT_ONCE = 8  # requests that are under way at a server
BUSY = 429
PATIENCE = 60  # refusals of a busy server before we give up, each after a second


class Subject(Protocol):
    """One model. name, fingerprint: which. image_size S: of its images. classes: the labels that it was trained on.

    defaults: how it wants to be sampled. engine: what runs it, plain values.
    """

    name: str
    fingerprint: str
    image_size: int
    classes: tuple[int, ...]
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


def open_subject(
    place: str, engine: str = "onnx", device: str = "cpu", precision: str = "fp32", api_key: str = ""
) -> Subject:
    """The subject at a place: a URL of a server, else a model directory, which `engine` runs. DSDError where it fails.

    api_key: for a server that asks for one.
    """
    if place.startswith(("http://", "https://")):
        return ServerSubject(Client(place, api_key=api_key))
    return ModelSubject(load(place, engine, device=device, precision=precision))


class ModelSubject:
    """A model directory on an engine of this process."""

    def __init__(self, model: Model) -> None:
        self.model, info = model, model.info
        self.name, self.fingerprint, self.defaults = info.name, info.fingerprint, info.defaults
        self.image_size, self.classes = info.config.image_size, info.config.trained_classes
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


class ServerSubject:
    """A running server. Several requests are under way at a time; a busy server is asked again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        told = client.model()
        self.name, self.fingerprint = str(told["name"]), str(told["fingerprint"])
        self.image_size, self.classes = int(told["image_size"]), tuple(told["classes"])
        self.max_steps = int(told["limits"]["steps"])
        wanted = told["defaults"]
        self.defaults = SamplingParams(
            num_steps=wanted["steps"], sampler=wanted["sampler"], guidance_scale=wanted["guidance"]
        )
        self.engine = {"server": client.url, **told["engine"]}

    def draw(self, labels: Sequence[int], params: SamplingParams) -> NDArray[np.uint8]:
        if params.num_steps > self.max_steps:
            raise EngineUnavailableError(
                f"the server takes at most {self.max_steps} steps, and {params.num_steps} were asked for; start it "
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
            answer = self.client.generate_json(int(labels[number]), index=params.index + number, **settings)
            return codec.read_image(base64.b64decode(answer["images"][0]["base64"]))

        return np.stack(self.ask(one, range(len(labels)), "samples"))

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        def one(image: Pixels) -> Latents:
            return self.client.encode(codec.write_image(image))

        return np.stack(self.ask(one, pixels, "latents"))

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        def one(z: Latents) -> Pixels:
            return codec.read_image(self.client.decode(z, format="png"))

        return np.stack(self.ask(one, latents, "reconstructions"))

    def ask(self, one: Callable[[Any], T], inputs: Sequence[Any] | NDArray[Any], title: str) -> list[T]:
        """The answers for all inputs, in order."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = pool.map(lambda value: patiently(one, value), inputs)
            return list(tqdm(answers, total=len(inputs), desc=title, unit="image", leave=False))


def patiently(one: Callable[[Any], T], value: Any) -> T:
    """Ask, and ask again while the server is busy."""
    for _ in range(PATIENCE):
        try:
            return one(value)
        except ServerError as error:
            if error.status != BUSY:
                raise
            time.sleep(1)
    return one(value)
