"""Training images uint8 [3, S, S] and labels: decoded, held in memory where they fit, some held out."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dsd_serve.errors import CheckpointError, DSDError
from dsd_serve.imaging import codec
from training.classes import IMAGENET, NO_CLASSES, ClassNames, some
from training.run_config import DataSection, TrainConfig
from training.sources import open_source

MAX_PIXELS = 200_000_000  # ImageNet holds a few very large images
LOOKED_AT = 200  # images that are decoded before a run whose images are not held
LEAST_HELD = 2  # held-out images: metrics compare them
HELD_OUT = 200  # images that are held out of a set with classes of its own, roughly
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read: its index in the source, its name, and the reason."""

    index: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Images(Dataset[tuple[Tensor, int]]):
    """The images of some classes of a source, cropped to squares of `size` pixels.

    Index i gives (uint8 [3, S, S], label). `hold()` decodes all of them into memory. classes: names, wnids or labels;
    empty: all. data: how they are read. table: that of a model, to which the source's classes are mapped by name;
    None: the source's own. common: leave out images of classes that the table lacks, instead of refusing them.

    Where an image cannot be read, the next of its class that can be stands in for it, so the order of training does not
    depend on when that is found out.
    """

    def __init__(
        self,
        path: str,
        size: int,
        classes: Sequence[int | str] = (),
        data: DataSection = DataSection(),  # noqa: B008  # it is frozen
        table: ClassNames | None = None,
        common: bool = False,
    ) -> None:
        self.source, self.size, self.path = open_source(path, data), size, path
        self.data, self.broken = data, dict[int, Broken]()
        self.crop = codec.fit_as_adm if data.resize == "adm" else codec.fit
        if not len(self.source.labels):
            raise CheckpointError(f"{path} has no images")
        self.table = self.source.table if table is None else table
        labels = self.mapped(self.source.table.onto(self.table), common)
        self.classes = tuple(self.table.find(item, "data.classes") for item in classes)
        keep = np.isin(labels, self.classes) if classes else labels >= 0
        self.indices = np.flatnonzero(keep)
        self.labels = labels[self.indices]
        self.pixels: Pixels | None = None
        if missing := sorted(set(self.classes) - set(self.labels.tolist())):
            raise CheckpointError(f"{path} has no images of class {self.table.name(missing[0])}")

    def mapped(self, label: NDArray[np.int64], common: bool) -> NDArray[np.int64]:
        """The labels of the source in the table of this set, -1 for classes that it lacks.

        Raises CheckpointError for these, or with `common` if there are no others.
        """
        source, mapped = self.source.table, label[self.source.labels]
        if source == NO_CLASSES and self.table != NO_CLASSES:
            raise CheckpointError(f"{self.path} has images without classes; {self.table.summary()}")
        if (mapped < 0).all() or (not common and (mapped < 0).any()):
            unknown = [source.name(one) for one in np.unique(self.source.labels[mapped < 0]).tolist()]
            raise CheckpointError(
                f"{self.path} has images of classes that are not known: {some(unknown)}; {self.table.summary()}"
            )
        return mapped

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label, _ = self.read(index)
        return torch.from_numpy(pixels), label

    def read(self, index: int) -> tuple[Pixels, int, list[Broken]]:
        """(pixels, label, images that cannot be read) of an image, or of the next of its class that can be read."""
        label = int(self.labels[index])
        if self.pixels is not None:
            return self.pixels[index], label, []
        pixels, broken = self.decode(index), list[Broken]()
        if not isinstance(pixels, Broken):
            return pixels, label, broken
        broken.append(pixels)
        for place in self.others(index):
            pixels = self.decode(place)
            if not isinstance(pixels, Broken):
                return pixels, label, broken
            broken.append(pixels)
        raise self.none_of_class(label, broken)

    def others(self, index: int) -> list[int]:
        """The other images of the class of an image, from it on; no more than may be broken."""
        members = np.flatnonzero(self.labels == self.labels[index])
        after = np.roll(members, -int(np.searchsorted(members, index)) - 1)[:-1]
        return after[: self.allowed() + 1].tolist()

    def none_of_class(self, label: int, broken: Sequence[Broken]) -> CheckpointError:
        of_class = f" of class {self.table.name(label)}" if self.table != NO_CLASSES else ""
        return CheckpointError(f"{self.path}: no image{of_class} can be read: {broken[0]}")

    def decode(self, index: int) -> Pixels | Broken:
        number, name = int(self.indices[index]), f"image {index}"
        try:
            data, name = self.source.read(number)
            return self.crop(codec.read_image(data, MAX_PIXELS), self.size)
        except OSError as error:
            name, reason = str(error.filename or name), error.strerror or type(error).__name__
        except DSDError as error:
            reason = str(error)
        return Broken(number, name if name.isprintable() else repr(name)[1:-1], reason)

    def allowed(self) -> int:
        """The number of images that may be broken, a share of the whole source."""
        return math.ceil(self.data.broken_share * len(self.source.labels))

    def note(self, broken: Sequence[Broken]) -> None:
        """Count images that cannot be read; raises CheckpointError if there are too many."""
        self.broken.update({one.index: one for one in broken})
        if len(self.broken) > self.allowed():
            raise self.too_many([*self.broken.values()])

    def too_many(self, broken: Sequence[Broken]) -> CheckpointError:
        named = "; ".join(str(one) for one in broken[:3])
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        return CheckpointError(
            f"{self.path}: {len(broken)} of {len(self.source.labels)} images cannot be read, more than "
            f"data.broken_share={self.data.broken_share:g} allows: {named}{more}"
        )

    def shards(self) -> NDArray[np.int64]:
        """The number of the tar shard of each image, int64 [N]; all 0 for other sources."""
        whole = getattr(self.source, "shards", None)
        return np.zeros(len(self), np.int64) if whole is None else whole[self.indices]

    def num_bytes(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * 3 * self.size**2

    def hold(self) -> None:
        """Decode all images into memory."""
        held, bad = np.empty((len(self), 3, self.size, self.size), np.uint8), dict[int, Broken]()

        def fill(index: int) -> None:
            pixels = self.decode(index)
            if isinstance(pixels, Broken):
                bad[index] = pixels
                if len(bad) > self.allowed():
                    raise self.too_many([bad[place] for place in sorted(bad)])
            else:
                held[index] = pixels

        with ThreadPoolExecutor() as pool:
            try:
                for _ in pool.map(fill, range(len(self))):
                    pass
            except CheckpointError:
                pool.shutdown(cancel_futures=True)
                raise
        for index in sorted(bad):
            place = next((place for place in self.others(index) if place not in bad), None)
            if place is None:
                raise self.none_of_class(int(self.labels[index]), [bad[index]])
            held[index] = held[place]
        self.note([bad[index] for index in sorted(bad)])
        self.pixels = held

    def look(self) -> None:
        """Decode a few images of a set that is not held, so that a set of other files is refused at once."""
        some = self.subset(np.unique(np.arange(LOOKED_AT) * len(self) // LOOKED_AT))
        with ThreadPoolExecutor() as pool:
            broken = [one for one in pool.map(some.decode, range(len(some))) if isinstance(one, Broken)]
        if len(broken) > 2 * math.ceil(self.data.broken_share * len(some)):  # twice: they are few
            named = "; ".join(str(one) for one in broken[:3])
            raise CheckpointError(
                f"{self.path}: {len(broken)} of {len(some)} checked images cannot be read, far more than "
                f"data.broken_share={self.data.broken_share:g}: {named}"
            )

    def readable(self) -> "Images":
        """Without the images that cannot be read, of a set that is held."""
        if not self.broken:
            return self
        return self.subset(np.flatnonzero(~np.isin(self.indices, [*self.broken])))

    def subset(self, keep: NDArray[np.int64]) -> "Images":
        """The images at these indices, from the same source."""
        part = object.__new__(Images)
        part.__dict__ = {**self.__dict__, "indices": self.indices[keep], "labels": self.labels[keep]}
        part.broken = (
            {i: one for i, one in self.broken.items() if i in set(part.indices.tolist())} if self.broken else {}
        )
        part.pixels = None if self.pixels is None else self.pixels[keep]
        return part


def hold_out(images: Images, share: float = 0.01) -> tuple[Images, Images]:
    """Split off every 1/share-th image: (the rest, the held out)."""
    every = round(1 / share)
    index = np.arange(len(images))
    held = index % every == every - 1
    if not held.any():
        raise CheckpointError(f"{images.path} has only {len(images)} images; give data.validation a folder of its own")
    return images.subset(index[~held]), images.subset(index[held])


def hold_out_of_classes(images: Images, share: float) -> tuple[Images, Images]:
    """Split off a share of the images of each class, evenly spaced: (the rest, the held out).

    At least one image of each class stays, and at least LEAST_HELD in all are held out, of the largest classes.
    """
    held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        count = min(round(share * len(members)), len(members) - 1)
        held[members[(2 * np.arange(count) + 1) * len(members) // max(1, 2 * count)]] = True
    while held.sum() < LEAST_HELD:
        members = np.flatnonzero((images.labels == np.bincount(images.labels[~held]).argmax()) & ~held)
        if len(members) < 2:
            raise CheckpointError(
                f"{images.path} has too few images to hold {LEAST_HELD} out, {len(images)}; add images, or give others "
                "with data.validation"
            )
        held[members[-1]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


def split(images: Images) -> tuple[Images, Images]:
    """(training, held-out) images of one set.

    By data.validation_share of each class. Without it: 1 % of ImageNet's, every hundredth image; of another set about
    HELD_OUT images, from 1 to 10 % of each class.
    """
    if share := images.data.validation_share:
        return hold_out_of_classes(images, share)
    if images.table == IMAGENET and len(images) >= 100:
        return hold_out(images)
    return hold_out_of_classes(images, min(0.1, max(0.01, HELD_OUT / len(images))))


def load_images(config: TrainConfig) -> tuple[Images, Images]:
    """(training, held-out) images. The held-out ones are in memory, the others if they fit."""
    training, held = open_images(config)
    held.hold()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process of the machine would hold its own
    if training.num_bytes() * here <= config.data.memory_gb * 1e9:
        training.hold()
    else:
        training.look()
    held = held.readable()
    if config.data.validation and len(held) < LEAST_HELD:
        raise CheckpointError(
            f"data.validation {config.data.validation} must have {LEAST_HELD} images or more that can be read, "
            f"got {len(held)}"
        )
    return training, held


def table_in(config: TrainConfig) -> ClassNames | None:
    """The class table that a configuration fixes; None: that of its data counts."""
    names, number = config.model.class_names, config.model.num_classes
    if not names and number is None:
        return None
    network = config.network_config()
    return ClassNames(network.num_classes, network.class_names)


def open_images(config: TrainConfig) -> tuple[Images, Images]:
    """(training, held-out) images, not yet decoded."""
    network, data = config.network_config(), config.data
    training = Images(data.path, network.image_size, data.classes, data, table_in(config))
    if data.validation:
        held = Images(data.validation, network.image_size, training.classes, data, training.table)
    else:
        training, held = split(training)
    generator = np.random.Generator(np.random.Philox(key=[config.run.seed, 0]))
    return training, held.subset(np.sort(generator.permutation(len(held))[: config.run.eval_images]))


def sample_of(images: Images, count: int) -> Images:
    """`count` of the images, evenly spaced, in memory: those on which training is compared with held-out images."""
    count = min(count, len(images))
    some = images.subset(np.arange(count) * len(images) // count)
    if some.pixels is None:
        some.hold()
    return some
