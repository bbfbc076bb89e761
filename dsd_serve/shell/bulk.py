"""Many samples: drawing a shard of a set into a folder, an .npz or tar files, and resuming a stopped run."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Protocol

from PIL import Image

from dsd_serve.errors import InputError
from dsd_serve.model import Model
from dsd_serve.shell.manifest import (
    OF_A_SHARD,
    check_same,
    locked,
    manifest_of,
    read_manifest,
    write_manifest,
)
from dsd_serve.shell.progress import Progress
from dsd_serve.shell.sample_arrays import SampleArrays
from dsd_serve.shell.sample_folder import SampleFolder
from dsd_serve.shell.sample_set import Sample, SampleSet, Shard, ahead, draw
from dsd_serve.shell.sample_tars import SampleTars

ENCODED_AHEAD = 64  # images that are encoded at a time or wait to be written


class Output(Protocol):
    """Where the samples of a shard go. unit: samples that one shard must have together. manifest: its file."""

    target: Path
    unit: int
    manifest: Path

    def others(self) -> Sequence[Path]:
        """The manifests of other shards that share the place."""
        ...

    def check_new(self, numbers: range) -> None:
        """Raises InputError if a new run would meet files that are not its own; drops parts of earlier ones."""
        ...

    def begin(self, samples: SampleSet, numbers: range, size: int) -> Iterator[int]:
        """The numbers that are not written yet, in order."""
        ...

    def encode(self, sample: Sample, image: Image.Image) -> bytes:
        """The bytes of a sample; called from several threads."""
        ...

    def write(self, sample: Sample, data: bytes) -> None:
        """Called in the order of `begin`. What a kill leaves of it is known as unfinished to the next `begin`."""
        ...

    def finish(self) -> Sequence[Path]:
        """Put everything in its place; returns what was written."""
        ...


def output_of(text: str, shard: Shard, per_tar: int) -> Output:
    """The output that -o names: FILE.npz, out-%05d.tar or a folder. Raises InputError."""
    path = Path(text)
    if path.suffix == ".tar":
        return SampleTars(path, shard, per_tar)
    if path.suffix == ".npz" and not path.is_dir():
        return SampleArrays(path, shard)
    if path.is_file() or path.suffix in (".png", ".jpg", ".jpeg", ".webp", ".zip", ".npy", ".tgz", ".gz", ".json"):
        raise InputError(f"-o with --per-class must be a folder, FILE.npz or out-%05d.tar, got {text}")
    return SampleFolder(path, shard)


def generate_shard(
    model: Model, samples: SampleSet, shard: Shard, output: Output, size: int | None
) -> tuple[Sequence[Path], int]:
    """Draw the samples of a shard that are not there yet; returns what was written, and how many were drawn.

    Raises InputError if the output is of another run. A KeyboardInterrupt gets a sentence as its last argument.
    """
    numbers = shard.share(len(samples), output.unit)
    side = size or model.info.config.image_size
    plan = manifest_of(model, samples, shard, numbers, side, output.unit if isinstance(output, SampleTars) else None)
    output.manifest.parent.mkdir(parents=True, exist_ok=True)
    with locked(output.manifest):
        for other in output.others():
            check_same(other, read_manifest(other) or plan, plan, OF_A_SHARD)
        begun = read_manifest(output.manifest)
        if begun is None:
            output.check_new(numbers)
            write_manifest(output.manifest, plan)
        else:
            check_same(output.manifest, begun, plan, ("complete",))
        drawn = draw_missing(model, samples, numbers, output, side)
        written = output.finish()
        write_manifest(output.manifest, {**plan, "complete": True})
    return written, drawn


def draw_missing(model: Model, samples: SampleSet, numbers: range, output: Output, size: int) -> int:
    """Draw and write the samples that are not there yet; returns their number."""
    progress = Progress(len(numbers))
    missing = (samples.sample(number) for number in output.begin(samples, numbers, size))
    try:
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            closing(draw(model, missing, size)) as drawn,
        ):
            for (sample, _), data in ahead(pool, lambda one: output.encode(*one), drawn, ENCODED_AHEAD):
                output.write(sample, data)
                progress.step(sample.number - numbers.start + 1)  # all before it are written
    finally:
        progress.end()
    return progress.drawn
