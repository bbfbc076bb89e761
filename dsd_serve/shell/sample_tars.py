"""Samples as webdataset shards: tar files whose members KEY.cls, KEY.json and KEY.png are label, settings and image.

A tar file grows next to its final name, which it gets when it is full. A stopped run goes on after the last whole
sample in it. The headers hold no dates or owners: the same samples are the same bytes.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import IO

from PIL import Image

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging import codec
from dsd_serve.imaging.provenance import TEXT_KEY
from dsd_serve.shell.sample_set import Sample, SampleSet, Shard

MEMBERS = 3  # of a sample
PLACE = re.compile(r"%0?[0-9]?d")


class SampleTars:
    """Tar files out-%05d.tar of `unit` samples each; a shard has whole files, so all shards may share a folder."""

    def __init__(self, pattern: Path, shard: Shard, unit: int) -> None:
        if len(PLACE.findall(pattern.name)) != 1 or pattern.name.count("%") != 1:
            raise InputError(
                f"-o of tar files must have one place for their number, as out-%05d.tar, got {shown(str(pattern))}"
            )
        self.target, self.unit = pattern, unit
        self.manifest = pattern.with_name(f"{PLACE.sub('manifest', pattern.stem)}{shard.suffix}.json")
        self.file: IO[bytes] | None = None  # the tar file that grows

    def others(self) -> Sequence[Path]:
        """The manifests of the other shards."""
        name = escape(PLACE.sub("manifest", self.target.stem)) + "*.json"
        return sorted(path for path in self.target.parent.glob(name) if path != self.manifest)

    def path(self, tar: int) -> Path:
        return self.target.with_name(self.target.name % tar)

    def part(self, tar: int) -> Path:
        return self.target.with_name(f".{self.path(tar).name}.part")

    def tars(self, numbers: range) -> range:
        return range(numbers.start // self.unit, (numbers.stop - 1) // self.unit + 1)

    def check_new(self, numbers: range) -> None:
        """Raises InputError if there is a file that is not of this run."""
        for tar in self.tars(numbers):
            if self.path(tar).exists():
                raise InputError(f"{self.path(tar)} already exists; give another -o, or delete it")
            self.part(tar).unlink(missing_ok=True)

    def begin(self, samples: SampleSet, numbers: range, size: int) -> Iterator[int]:
        """The numbers that are in no tar file yet."""
        self.numbers = numbers
        begun: dict[int, int] = {}
        for tar in self.tars(numbers):
            if self.part(tar).exists():
                begun[tar], end = whole_samples(self.part(tar))
                with self.part(tar).open("rb+") as file:
                    file.truncate(end)
                    if begun[tar] == len(self.numbers_of(tar)):  # it was stopped before it got its name
                        self.close_tar(tar, file)
        return (
            number
            for tar in self.tars(numbers)
            if not self.path(tar).exists()
            for number in self.numbers_of(tar)[begun.get(tar, 0) :]
        )

    def numbers_of(self, tar: int) -> range:
        """The numbers of the samples of a tar file."""
        return range(tar * self.unit, min((tar + 1) * self.unit, self.numbers.stop))

    def encode(self, sample: Sample, image: Image.Image) -> bytes:
        """The blocks of a sample's members."""
        files = {
            "cls": str(sample.label).encode(),
            "json": image.info[TEXT_KEY].encode(),
            "png": codec.to_png(image),
        }
        blocks = []
        for kind, data in files.items():
            info = tarfile.TarInfo(f"{sample.name}.{kind}")
            info.size = len(data)
            blocks += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        return b"".join(blocks)

    def write(self, sample: Sample, data: bytes) -> None:
        tar = sample.number // self.unit
        if self.file is None:
            self.file = self.part(tar).open("ab")
        self.file.write(data)
        self.file.flush()
        if sample.number == self.numbers_of(tar)[-1]:
            self.close_tar(tar, self.file)
            self.file = None

    def close_tar(self, tar: int, file: IO[bytes]) -> None:
        """Put a tar file with all its samples in its place."""
        length = file.seek(0, 2) + 2 * tarfile.BLOCKSIZE
        file.write(bytes(2 * tarfile.BLOCKSIZE + -length % tarfile.RECORDSIZE))
        file.close()
        self.part(tar).replace(self.path(tar))

    def finish(self) -> Sequence[Path]:
        return [self.path(tar) for tar in self.tars(self.numbers)]


def whole_samples(path: Path) -> tuple[int, int]:
    """(number, end in bytes) of the samples that are whole in a tar file that may end anywhere."""
    members = position = end = 0
    if not path.exists():
        return 0, 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while True:
            file.seek(position)
            try:
                info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
            except tarfile.HeaderError:
                break
            position += tarfile.BLOCKSIZE + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if position > size:
                break
            members += 1
            if members % MEMBERS == 0:
                end = position
    return members // MEMBERS, end
