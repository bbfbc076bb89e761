"""The manifest of a run: JSON next to its samples, with the model, the settings and the part of the set.

A run that goes on, or joins the shards of others, must have the same one.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import __version__ as PILLOW

from dsd_serve import __version__
from dsd_serve.checkpoint import read_text
from dsd_serve.errors import CheckpointError, InputError, shown
from dsd_serve.files import atomic
from dsd_serve.model import Model
from dsd_serve.params import to_api
from dsd_serve.shell.sample_set import SampleSet, Shard

FORMAT = "dsd-samples-1"
OF_A_SHARD = ("shard", "count", "complete")  # what differs between the shards of a run


def manifest_of(
    model: Model, samples: SampleSet, shard: Shard, numbers: range, size: int, per_tar: int | None
) -> dict[str, Any]:
    """The manifest of a shard that draws `numbers` of the samples; per_tar: of tar files."""
    info = model.info
    return {
        "format": FORMAT,
        "model": info.name,
        "fingerprint": info.fingerprint,
        **{name: info.described[name] for name in ("engine", "device", "precision") if name in info.described},
        "row_is_independent": info.invariance.dependent_rows == 0,
        "dsd_serve": __version__,
        "pillow": PILLOW,
        **to_api(samples.params),
        "size": size,
        "per_class": samples.per_class,
        "classes": [c.to_dict() for c in samples.classes if c],
        **({} if per_tar is None else {"per_tar": per_tar}),
        "images": len(samples),
        "shard": shard.number,
        "shards": shard.count,
        "count": len(numbers),
        "complete": False,
    }


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest; None if there is no file. Raises InputError for another file."""
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        raise InputError(f"{path} cannot be read as the manifest of a run: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of a run; give another -o")
    return values


def write_manifest(path: Path, values: Mapping[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def check_same(path: Path, begun: Mapping[str, Any], planned: Mapping[str, Any], apart: tuple[str, ...]) -> None:
    """Raises InputError if two runs differ in anything but `apart`. path: the manifest of the one that was begun."""
    for key in dict.fromkeys((*planned, *begun)):
        if key not in apart and begun.get(key) != planned.get(key):
            raise InputError(
                f"{path} belongs to a run with {key} {shown(begun.get(key))}, not {shown(planned.get(key))}: "
                "give the same model and settings to resume it, or another -o"
            )


@contextlib.contextmanager
def locked(manifest: Path) -> Iterator[None]:
    """Around the work on a manifest, for one process at a time. The system ends it with the process, in any way.

    Raises InputError while another process holds it. Systems without flock have no such protection.
    """
    path = manifest.with_name(f".{manifest.name}.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not taken(descriptor, path):
            raise InputError(f"another dsd-generate is writing {manifest}; wait for it to end")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def taken(descriptor: int, path: Path) -> bool:
    """Whether this process has the lock now, on the file that is still at `path`."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
