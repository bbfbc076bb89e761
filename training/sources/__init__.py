"""Sources of training images: encoded images by index, with labels of their own class table.

data.path is one of
  - a folder with a folder for each class, or a folder of images without classes;
  - a parquet file, or a folder of them, in the layout of Hugging Face `datasets`;
  - webdataset shards: a tar file, a folder of them, or a pattern like shards/{0000..0127}.tar;
  - a .csv or .tsv file with a column of files and one of classes;
  - `hf:NAME` or `hf:NAME:SPLIT`, a data set for the `datasets` package.
In a folder of parquet or tar files, names that begin with "val" or "test" are left out if there are others.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError
from training.classes import ClassNames, some
from training.run_config import DataSection
from training.sources.columns import HuggingFaceSource, ParquetSource
from training.sources.folder import FolderSource
from training.sources.listing import CsvSource
from training.sources.shards import TarSource, expand

LISTINGS = (".csv", ".tsv")


class Source(Protocol):
    """Encoded images by index. labels [N]: of `table`. remarks: sentences about what was left out."""

    table: ClassNames
    labels: NDArray[np.int64]
    remarks: list[str]

    def read(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image, and its name for sentences. Raises CheckpointError or OSError if there are none."""
        ...


def open_source(path: str, data: DataSection) -> Source:
    """The source at `path`, its labels by the rules of `data`. Raises CheckpointError if there is none."""
    if path.startswith("hf:"):
        return HuggingFaceSource(path.removeprefix("hf:"), data)
    if "{" in path and not Path(path).expanduser().exists():
        files = [Path(name).expanduser() for name in expand(path)]
        if missing := [file for file in files if not file.is_file()]:
            raise CheckpointError(f"data.path {path!r} names {missing[0]}, which does not exist")
        if not files:
            raise CheckpointError(f"data.path {path!r} names no files")
        return TarSource(files, data) if files[0].suffix == ".tar" else ParquetSource(files, data)
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise CheckpointError(
            f"data.path must be a folder, a parquet, tar or csv file or hf:NAME; there is no {path!r}"
        )
    if place.is_file():
        return open_file(place, data)
    for suffix, kind in ((".parquet", ParquetSource), (".tar", TarSource)):
        files = sorted(place.glob(f"*{suffix}"))
        training = [file for file in files if not file.name.lower().startswith(("val", "test"))]
        if files:
            source = kind(training or files, data)
            if training and (others := [file.name for file in files if file not in training]):
                source.remarks.append(f"left out: {some(others)}, whose names begin with val or test")
            return source
    return FolderSource(place, data)


def open_file(file: Path, data: DataSection) -> Source:
    suffix = file.suffix.lower()
    if suffix in LISTINGS:
        return CsvSource(file, data)
    if suffix == ".tar":
        return TarSource([file], data)
    if suffix in (".zip", ".gz", ".tgz", ".7z", ".rar"):
        raise CheckpointError(f"data.path {file} is an archive; unpack it, and give the folder")
    return ParquetSource([file], data)
