"""A CSV or TSV file that lists images and their classes."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsd_serve.errors import CheckpointError, shown
from training.classes import NO_CLASSES, clean
from training.run_config import DataSection
from training.sources.columns import CLASS_COLUMNS, choose, named, unused
from training.sources.folder import read_file

FILE_COLUMNS = (
    "file",
    "filename",
    "file_name",
    "path",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "img",
    "photo",
    "picture",
)


class CsvSource:
    """The images of a CSV in its order. Paths are relative to its folder; the first line names the columns."""

    def __init__(self, file: Path, data: DataSection) -> None:
        header, rows = read_rows(file)
        files = choose(header, data.image_column, FILE_COLUMNS, "image_column", f"{file} of files")
        if files is None:
            raise CheckpointError(
                f"{file} needs a first line that names its columns, one of them file, as in file,class; it has "
                f"{shown(', '.join(header))}; data.image_column names another"
            )
        labels = choose(header, data.label_column, CLASS_COLUMNS, "label_column", f"{file} of classes")
        self.remarks = [] if data.labels == "none" else unused(header, (files, labels))
        if data.labels == "none":
            labels = None
        by_file: dict[str, str] = {}
        for number, row in rows:
            if len(row) != len(header):
                raise CheckpointError(f"{file}, line {number}: {len(header)} columns are named, got {len(row)}")
            name, label = row[header.index(files)].strip(), "" if labels is None else clean(row[header.index(labels)])
            if not name or "\0" in name:
                raise CheckpointError(f"{file}, line {number}: the column {files} must name a file, got {shown(name)}")
            if labels is not None and not label:
                raise CheckpointError(f"{file}, line {number}: the column {labels} must name a class, and is empty")
            if by_file.setdefault(name, label) != label:
                raise CheckpointError(
                    f"{file}, line {number}: {shown(name)[1:-1]} is in the classes {shown(by_file[name])} and "
                    f"{shown(label)}; an image has one class"
                )
        if not by_file:
            raise CheckpointError(f"{file} lists no images")
        self.files = [file.parent / Path(name).expanduser() for name in by_file]
        self.table, self.labels = NO_CLASSES, np.zeros(len(self.files), np.int64)
        if labels is not None:
            self.table, self.labels = named(list(by_file.values()), data.labels, str(file))

    def read(self, index: int) -> tuple[bytes, str]:
        return read_file(self.files[index]), str(self.files[index])


def read_rows(file: Path) -> tuple[list[str], list[tuple[int, Sequence[str]]]]:
    """The names of the columns, and the other lines with their numbers, without empty ones. Raises CheckpointError."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            tab = file.suffix.lower() == ".tsv" or ("\t" in first and "," not in first)
            mark = "\t" if tab else ";" if ";" in first and "," not in first else ","
            reader = csv.reader(text, delimiter=mark, strict=True)
            header = [name.strip() for name in next(reader, [])]
            return header, [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not text in UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise CheckpointError(f"{file} is not a readable CSV file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
