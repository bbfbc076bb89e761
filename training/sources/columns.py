"""Tables with a column of images and one of classes: parquet files, and data sets of Hugging Face."""

import contextlib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.errors import CheckpointError, shown
from training.classes import IMAGENET, NO_CLASSES, ClassNames, clean, table_of
from training.run_config import DataSection
from training.sources.folder import read_file

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
CLASS_COLUMNS = ("label", "labels", "class", "cls", "class_name", "category", "target", "fine_label")


def choose(columns: Sequence[str], wanted: str, usual: Collection[str], key: str, what: str) -> str | None:
    """The column `wanted`, or else the only one with a usual name, in any case; None if there is none.

    key: of [data], which names a column. what: for sentences. Raises CheckpointError.
    """
    if wanted:
        if wanted not in columns:
            raise CheckpointError(f"data.{key}: {what} has no column {wanted!r}; it has {shown(', '.join(columns))}")
        return wanted
    found = [name for name in columns if name.lower() in usual]
    if len(found) > 1:
        raise CheckpointError(f"{what} may be in the columns {' or '.join(found)}; name one with data.{key}")
    return found[0] if found else None


def unused(columns: Sequence[str], used: Sequence[str | None]) -> list[str]:
    """A remark about the other columns of a table without a column of classes."""
    others = [name for name in columns if name not in used]
    if None not in used or not others:
        return []
    return [f"no column is known to hold classes; data.label_column takes one of {shown(', '.join(others))[1:-1]}"]


def numbered(
    labels: NDArray[np.int64], names: Sequence[str] | None, rule: str, place: str
) -> tuple[ClassNames, NDArray[np.int64]]:
    """The table of numeric labels [N], and those labels in it. names: of each number; None: they are ImageNet-1k's,
    or for data.labels=own the numbers themselves."""
    if rule == "none":
        return NO_CLASSES, np.zeros(len(labels), np.int64)
    if not len(labels):
        return NO_CLASSES, labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise CheckpointError(f"{place} has images of the label {low}, which means that their class is not known")
    if names is None:
        if rule == "own":
            kinds, positions = np.unique(labels, return_inverse=True)
            return ClassNames(len(kinds), tuple(map(str, kinds.tolist()))), positions.astype(np.int64)
        if high >= IMAGENET.num_classes:
            raise CheckpointError(
                f"{place} has labels from {low} to {high} without names; 0 to {IMAGENET.num_classes - 1} are those of "
                "ImageNet-1k; data.labels=own takes the numbers as names"
            )
        return IMAGENET, labels
    if high >= len(names):
        raise CheckpointError(f"{place} has labels up to {high}, but names only {len(names)} classes")
    table, mapped = table_of(names, rule, place)
    return table, mapped[labels]


def named(texts: Sequence[str | None], rule: str, place: str) -> tuple[ClassNames, NDArray[np.int64]]:
    """The table of the classes of images, sorted, and the labels [N] of the images in it."""
    if None in texts:
        raise CheckpointError(f"{place}: image {texts.index(None)} has no class")
    cleaned = [clean(text or "") for text in texts]
    names = sorted(set(cleaned))
    table, mapped = table_of(names, rule, place)
    label = dict(zip(names, mapped.tolist(), strict=True))
    return table, np.array([label[name] for name in cleaned], np.int64)


class ParquetSource:
    """The rows of parquet files, held in memory."""

    def __init__(self, files: Sequence[Path], data: DataSection) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise CheckpointError("parquet files need pyarrow: pip install '.[train]'") from None
        place = str(files[0] if len(files) == 1 else files[0].parent)
        try:
            schema = pq.read_schema(files[0])
        except (pa.ArrowException, OSError) as error:
            raise CheckpointError(
                f"{files[0]} is not a parquet file with columns of images and classes: {first_line(error)}"
            ) from None
        features = features_of(schema.metadata)
        image = self.image_column(schema, data, place)
        label = choose(schema.names, data.label_column, CLASS_COLUMNS, "label_column", f"{place}: the class")
        check_fits(files, image, place)
        tables = []
        for file in files:
            try:
                tables.append(pq.read_table(file, columns=[image] if label is None else [image, label]))
            except (pa.ArrowException, OSError) as error:
                raise CheckpointError(
                    f"{file} is not a parquet file like {files[0].name}: {first_line(error)}"
                ) from None
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise CheckpointError(f"the files of {place} have different columns: {first_line(error)}") from None
        self.column = table.column(image).combine_chunks() if len(files) == 1 else table.column(image)
        self.table, self.labels = NO_CLASSES, np.zeros(len(table), np.int64)
        self.remarks = [] if data.labels == "none" else unused(schema.names, (image, label))
        if label is not None and data.labels != "none":
            names = class_names(features.get(label))
            self.table, self.labels = self.read_labels(table.column(label), names, data.labels, f"{place}, {label}")

    def image_column(self, schema: Any, data: DataSection, place: str) -> str:
        """The column of images: the one named so, or else the only one whose type can hold them."""
        import pyarrow.types as kinds

        found = choose(schema.names, data.image_column, IMAGE_COLUMNS, "image_column", f"{place}: the image")
        able = [
            name
            for name, kind in zip(schema.names, schema.types, strict=True)
            if kinds.is_binary(kind)
            or kinds.is_large_binary(kind)
            or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        ]
        if found is None and len(able) == 1:
            found = able[0]
        if found is None or found not in able:
            raise CheckpointError(
                f"{place} needs a column image with the bytes of PNG, JPEG or WebP files; it has "
                f"{shown(', '.join(f'{n} ({k})' for n, k in zip(schema.names, schema.types, strict=True)))}"
                "; data.image_column names another"
            )
        return str(found)

    def read_labels(
        self, column: Any, names: Sequence[str] | None, rule: str, place: str
    ) -> tuple[ClassNames, NDArray[np.int64]]:
        import pyarrow as pa

        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            raise CheckpointError(f"{place}: {column.null_count} images have no class")
        if pa.types.is_integer(column.type):
            return numbered(column.to_numpy().astype(np.int64), names, rule, place)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return named(column.to_pylist(), rule, place)
        raise CheckpointError(f"{place}: a class must be a whole number or a text, got {column.type}")

    def read(self, index: int) -> tuple[bytes, str]:
        cell = self.column[index].as_py()
        name, data = f"row {index}", cell
        if isinstance(cell, dict):
            name, data = cell.get("path") or name, cell["bytes"]
        if data is None:
            raise CheckpointError(f"row {index} has no bytes")
        return data, str(name)


def check_fits(files: Sequence[Path], image: str, place: str) -> None:
    """Raises CheckpointError if the images of parquet files do not fit into memory, once for each process of this
    machine; found out before they are read."""
    needed = sum(image_bytes(file, image) for file in files)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if (free := available_bytes()) < needed * processes:
        each = f" in each of {processes} processes" if processes > 1 else ""
        folder = files[0].parent.resolve()
        raise CheckpointError(
            f"{place} holds {needed / 1e9:.1f} GB of images, which would be in memory{each}, and {free / 1e9:.1f} GB "
            f"are free: give data.path=hf:{folder}, whose images stay in a file that all processes map, or tar shards"
        )


def image_bytes(file: Path, image: str) -> int:
    """Bytes of the column of images of a parquet file in memory; 0 for a file that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError):
        return 0  # the sentence about it comes when it is read
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == image)


def available_bytes() -> float:
    """Memory that this machine can still give; unlimited where the system does not say."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)
    return math.inf


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def features_of(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features by column that Hugging Face `datasets` writes into a schema; none if they are not readable."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel; None for another feature."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if isinstance(names, dict):  # {"0": "cat", "1": "dog"}, as in dataset cards
        names = [names.get(str(number)) for number in range(len(names))]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


class HuggingFaceSource:
    """A data set that the `datasets` package loads."""

    def __init__(self, name: str, data: DataSection) -> None:
        try:
            import datasets
        except ImportError:
            raise CheckpointError(f"hf:{name} needs the datasets package: pip install datasets") from None
        name, _, split = name.partition(":")
        try:
            rows: Any = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # its own errors, and those of the hub, the file system and the network
            raise CheckpointError(
                f"hf:{name} cannot be loaded ({type(error).__name__}): {' '.join(str(error).split())[:300]}"
            ) from None
        columns, place = rows.column_names, f"hf:{name}"
        self.column = choose(columns, data.image_column, IMAGE_COLUMNS, "image_column", f"{place}: the image")
        if self.column is None:
            raise CheckpointError(f"{place} has no column 'image'; it has {shown(', '.join(columns))}")
        label = choose(columns, data.label_column, CLASS_COLUMNS, "label_column", f"{place}: the class")
        self.table, self.labels = NO_CLASSES, np.zeros(len(rows), np.int64)
        self.remarks = [] if data.labels == "none" else unused(columns, (self.column, label))
        if label is not None and data.labels != "none":
            values = rows[label][:]
            if all(isinstance(value, int) for value in values):
                names = getattr(rows.features[label], "names", None)
                self.table, self.labels = numbered(np.array(values, np.int64), names, data.labels, place)
            elif all(isinstance(value, str) for value in values):
                self.table, self.labels = named(values, data.labels, place)
            else:
                raise CheckpointError(f"{place}, {label}: a class must be a whole number or a text")
        self.rows = rows.cast_column(self.column, datasets.Image(decode=False))

    def read(self, index: int) -> tuple[bytes, str]:
        cell = self.rows[int(index)][self.column]
        return cell["bytes"] or read_file(Path(cell["path"])), cell["path"] or f"row {index}"
