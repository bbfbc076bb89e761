"""Training images uint8 [3, S, S] and labels, from the sources that a configuration may name.

A source is one of
  - a parquet file, or a folder of them, with the columns of Hugging Face `datasets`: `image` {bytes, path} and `label`;
    in a folder, names that begin with "val" or "test" are left out if there are others;
  - webdataset shards: a tar file, a folder of them (names as above), or a pattern like shards/{0000..0127}.tar;
  - a folder with one folder per class, named by wnid (n02099601) or by label (207);
  - `hf:NAME` or `hf:NAME:SPLIT`, a data set for the `datasets` package.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dsd_serve.errors import CheckpointError, InputError
from dsd_serve.imaging import codec
from dsd_serve.labels import all_classes
from training.run_config import TrainConfig
from training.shards import TarSource, expand

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_PIXELS = 200_000_000  # ImageNet holds a few very large images


class Source(Protocol):
    """Encoded images by index."""

    labels: NDArray[np.int64]

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image, and a name for error messages."""
        ...


class ParquetSource:
    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise CheckpointError("parquet files need pyarrow: pip install 'dsd-serve[train]'") from None
        tables = []
        for file in files:
            try:
                tables.append(pq.read_table(file, columns=["image", "label"]))
            except (pa.ArrowException, OSError) as error:
                raise CheckpointError(f"{file} is not a parquet file with columns image and label: {error}") from None
        table = pa.concat_tables(tables)
        self.labels = table.column("label").to_numpy().astype(np.int64)
        self.column = table.column("image").combine_chunks() if len(files) == 1 else table.column("image")

    def read(self, index: int) -> tuple[bytes, str]:
        cell = self.column[index].as_py()
        return cell["bytes"], cell["path"] or f"row {index}"


class FolderSource:
    def __init__(self, folder: Path) -> None:
        self.files: list[Path] = []
        labels = []
        wnids = {c.wnid: c.index for c in all_classes()}
        for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
            label = wnids.get(sub.name, int(sub.name) if sub.name.isdecimal() else None)
            if label is None:
                raise CheckpointError(f"{sub} must be named by a wnid like n02099601 or by a label like 207")
            found = sorted(path for path in sub.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            self.files += found
            labels += [label] * len(found)
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> tuple[bytes, str]:
        return self.files[index].read_bytes(), str(self.files[index])


class HuggingFaceSource:
    def __init__(self, name: str) -> None:
        try:
            import datasets
        except ImportError:
            raise CheckpointError(f"hf:{name} needs the datasets package: pip install datasets") from None
        name, _, split = name.partition(":")
        try:
            self.rows: Any = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # its own errors, and those of the hub, the file system and the network
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"hf:{name} cannot be loaded ({type(error).__name__}): {reason}") from None
        if missing := {"image", "label"} - set(self.rows.column_names):
            raise CheckpointError(f"hf:{name} has no column {sorted(missing)[0]!r}")
        self.labels = np.array(self.rows["label"], np.int64)
        self.rows = self.rows.cast_column("image", datasets.Image(decode=False))

    def read(self, index: int) -> tuple[bytes, str]:
        cell = self.rows[int(index)]["image"]
        return cell["bytes"] or Path(cell["path"]).read_bytes(), cell["path"] or f"row {index}"


def open_source(path: str) -> Source:
    """The source at `path`. Raises CheckpointError if there is none."""
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"))
    if "{" in path:
        files = [Path(name).expanduser() for name in expand(path)]
        if missing := [file for file in files if not file.is_file()]:
            raise CheckpointError(f"data.path {path!r} names {missing[0]}, which does not exist")
        return TarSource(files) if files[0].suffix == ".tar" else ParquetSource(files)
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise CheckpointError(f"data.path must be a folder, a parquet or tar file or hf:NAME; there is no {path!r}")
    if place.is_file():
        return TarSource([place]) if place.suffix == ".tar" else ParquetSource([place])
    for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
        files = sorted(place.glob(f"*{suffix}"))
        training = [file for file in files if not file.name.lower().startswith(("val", "test"))]
        if files:
            return kind(training or files)
    source = FolderSource(place)
    if not source.files:
        raise CheckpointError(f"{path} holds neither parquet nor tar files nor folders of images named by class")
    return source


class Images(Dataset[tuple[Tensor, int]]):
    """The images of some classes of a source, cropped to squares of `size` pixels.

    Index i gives (uint8 [3, S, S], label). `hold()` decodes all of them into memory. resize: "fit" or "adm".
    """

    def __init__(
        self, path: str, size: int, classes: Sequence[int] = (), num_classes: int = 1000, resize: str = "fit"
    ) -> None:
        self.source, self.size, self.path = open_source(path), size, path
        self.crop = codec.fit_as_adm if resize == "adm" else codec.fit
        labels = self.source.labels
        keep = np.isin(labels, classes) if classes else np.ones(len(labels), bool)
        self.indices = np.flatnonzero(keep)
        self.labels = labels[self.indices]
        self.pixels: NDArray[np.uint8] | None = None
        if missing := sorted(set(classes) - set(self.labels.tolist())):
            raise CheckpointError(f"{path} has no images of class {missing[0]}")
        if not len(self.indices):
            raise CheckpointError(f"{path} has no images")
        if self.labels.min() < 0 or self.labels.max() >= num_classes:
            raise CheckpointError(
                f"{path} has labels from {labels.min()} to {labels.max()}; 0 to {num_classes - 1} are known"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.decode(index) if self.pixels is None else self.pixels[index]
        return torch.from_numpy(pixels), int(self.labels[index])

    def decode(self, index: int) -> NDArray[np.uint8]:
        data, name = self.source.read(int(self.indices[index]))
        try:
            return self.crop(codec.read_image(data, MAX_PIXELS), self.size)
        except InputError as error:
            raise CheckpointError(f"{self.path}: image {name}: {error}") from None

    def shards(self) -> NDArray[np.int64]:
        """The number of the tar shard of each image, int64 [N]; all 0 for other sources."""
        whole = getattr(self.source, "shards", None)
        return np.zeros(len(self), np.int64) if whole is None else whole[self.indices]

    def num_bytes(self) -> int:
        """Bytes of all images when decoded."""
        return len(self) * 3 * self.size**2

    def hold(self) -> None:
        """Decode all images into memory."""
        held = np.empty((len(self), 3, self.size, self.size), np.uint8)

        def fill(index: int) -> None:
            held[index] = self.decode(index)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        self.pixels = held

    def subset(self, keep: NDArray[np.int64]) -> "Images":
        """The images at these indices, from the same source."""
        part = object.__new__(Images)
        part.__dict__ = {**self.__dict__, "indices": self.indices[keep], "labels": self.labels[keep]}
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


def load_images(config: TrainConfig) -> tuple[Images, Images]:
    """(training, held-out) images. The held-out ones are in memory, the others if they fit."""
    training, held = open_images(config)
    held.hold()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process of the machine would hold its own
    if training.num_bytes() * here <= config.data.memory_gb * 1e9:
        training.hold()
    return training, held


def open_images(config: TrainConfig) -> tuple[Images, Images]:
    """(training, held-out) images, not yet decoded."""
    network, data = config.network_config(), config.data
    shape = network.image_size, data.classes, network.num_classes, data.resize
    training = Images(data.path, *shape)
    if data.validation:
        held = Images(data.validation, *shape)
    else:
        training, held = hold_out(training)
    generator = np.random.Generator(np.random.Philox(key=[config.run.seed, 0]))
    return training, held.subset(np.sort(generator.permutation(len(held))[: config.run.eval_images]))
