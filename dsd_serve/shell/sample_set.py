"""The images of a run, and drawing them: class, seed and index of each, and the part of one shard."""

import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

from PIL import Image

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.labels import ImageClass
from dsd_serve.model import Model
from dsd_serve.params import MAX_SEED, SamplingParams
from dsd_serve.programs import Generate

T = TypeVar("T")
R = TypeVar("R")

MAX_SHARDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One image to draw. number: its place among all of the run. target: None for a model without classes."""

    number: int
    target: ImageClass | None
    params: SamplingParams

    @property
    def label(self) -> int:
        return label_of(self.target)

    @property
    def name(self) -> str:
        """Class, seed and index: the name of its file, without the ending."""
        return f"{self.label}-{self.params.seed}-{self.params.index:06}"

    @property
    def task(self) -> Generate:
        return Generate(self.label, self.params)


def label_of(target: ImageClass | None) -> int:
    """The label of a class; a model without classes has only the label 0."""
    return 0 if target is None else target.index


@dataclass(frozen=True)
class SampleSet:
    """`per_class` images of each class, drawn with the indices from `params.index` on of one seed.

    The image with index i is of class i mod the number of classes, in their order, and its noise is that of
    (seed, i). So each class has the same number, each image has noise of its own, every stretch of the set is balanced,
    and a larger set begins with the images of a smaller one.
    """

    classes: tuple[ImageClass | None, ...]
    per_class: int
    params: SamplingParams

    def __post_init__(self) -> None:
        if self.params.index > MAX_SEED - len(self):
            raise InputError(f"the index of the last image must be at most {MAX_SEED}: give a smaller --index")

    def __len__(self) -> int:
        return len(self.classes) * self.per_class

    def sample(self, number: int) -> Sample:
        params = replace(self.params, index=self.params.index + number)
        return Sample(number, self.classes[params.index % len(self.classes)], params)


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`3/8` -> the third of eight. Raises InputError."""
        found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count <= MAX_SHARDS:
            raise InputError(
                f"--shard must be I/N with I from 1 to N and N at most {MAX_SHARDS:,}, as 3/8, got {shown(text)}"
            )
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def suffix(self) -> str:
        """The part of file names that says which shard they are of: empty if it is the only one."""
        return "" if self.count == 1 else f"-{self.number}-of-{self.count}"

    def share(self, total: int, unit: int = 1) -> range:
        """The numbers of its images among `total`: the shares differ by at most `unit`, and begin at multiples of it.

        Raises InputError if there is not a unit for every shard.
        """
        units = -(-total // unit)
        if units < self.count:
            what = f"{total:,} images" if unit == 1 else f"{total:,} images, {units:,} tar files of {unit:,},"
            raise InputError(f"{what} are fewer than {self.count:,} shards: give fewer shards, or more images")
        first, last = (units * number // self.count * unit for number in (self.number - 1, self.number))
        return range(first, min(last, total))


def find_classes(model: Model, names: Sequence[str]) -> list[ImageClass | None]:
    """The classes that the command line names, in its order; `all` stands for all of the model. Raises InputError.

    A model without classes takes no names, and has None for a class.
    """
    if not names and model.info.config.num_classes:
        raise InputError(f"give at least one CLASS: {model.info.table.rule}; all stands for every class")
    if not names:
        return [None]
    found = [c for name in names for c in (model.classes if name == "all" else [model.info.find_class(name)])]
    return list(dict.fromkeys(found))


def draw(
    model: Model, samples: Iterable[Sample], size: int | None
) -> Generator[tuple[Sample, Image.Image], None, None]:
    """Samples with their images, in order, in constant memory; the engine always has enough for full batches.

    Closing it cancels those that are under way.
    """
    under_way: deque[Sample] = deque()

    def tasks() -> Iterator[Generate]:
        for sample in samples:
            under_way.append(sample)
            yield sample.task

    with closing(model.results(tasks())) as results:
        for pixels in results:
            sample = under_way.popleft()
            image = codec.resized(pixels, size)
            codec.attach_settings(image, model.info.settings_of(sample.target, sample.params))
            yield sample, image


def ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[tuple[T, R]]:
    """(item, function(item)) in order; the pool works on at most `most` items at a time."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= most:
            done, future = waiting.popleft()
            yield done, future.result()
    for done, future in waiting:
        yield done, future.result()
