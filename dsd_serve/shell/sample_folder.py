"""Samples as PNG files in class folders: DIR/207/207-0-000003.png."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.imaging import codec
from dsd_serve.shell.sample_set import Sample, SampleSet, Shard, label_of

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last bytes of every PNG file


class SampleFolder:
    """A folder that all shards of a run may share."""

    unit = 1

    def __init__(self, target: Path, shard: Shard) -> None:
        self.target, self.manifest = target, target / f"manifest{shard.suffix}.json"

    def others(self) -> Sequence[Path]:
        """The manifests of the other shards."""
        return sorted(path for path in self.target.glob("manifest*.json") if path != self.manifest)

    def check_new(self, numbers: range) -> None:
        """Raises InputError if the folder holds anything but the samples of other shards."""
        for path in () if self.others() else self.target.iterdir():
            if not path.name.startswith("."):
                raise InputError(f"{self.target} holds {path.name}; give a new or an empty folder as -o")

    def begin(self, samples: SampleSet, numbers: range, size: int) -> Iterator[int]:
        """The numbers whose files are not there yet, or are not whole."""
        for target in samples.classes:
            (self.target / str(label_of(target))).mkdir(parents=True, exist_ok=True)
        return (number for number in numbers if not is_whole(self.path(samples.sample(number))))

    def path(self, sample: Sample) -> Path:
        return self.target / str(sample.label) / f"{sample.name}.png"

    def encode(self, sample: Sample, image: Image.Image) -> bytes:
        return codec.to_png(image)

    def write(self, sample: Sample, data: bytes) -> None:
        path = self.path(sample)
        part = path.with_name(f".{path.name}.part")  # only this shard makes it, so a part that is left is written again
        part.write_bytes(data)
        part.replace(path)

    def finish(self) -> Sequence[Path]:
        return [self.target]


def is_whole(path: Path) -> bool:
    """Whether a PNG file is there to its end."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:  # also of a file that is shorter
        return False
