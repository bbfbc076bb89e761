"""The two artefacts on disk: a training checkpoint (one .pt file) and a model directory.

A model directory is what dsd-export writes and the engines, the server and Triton read:

    config.json        the network, its name, its sampling defaults, and of each precision the sha256 of its files
    model.safetensors  the EMA weights, stored once: float32 or float16
    model.onnx         the graph; its weights are the bytes of model.safetensors
    model.ort.onnx     the same with ONNX Runtime's own attention operator: what the ONNX engine runs
    model.P.onnx, model.P.ort.onnx, model.P.safetensors  the same in precision P, where it was exported
    card.md            the model card: training, classes, licence of the data
    classes.webp       images of each class, where dsd-export drew them; config.json has their grid and sha256

config.json is written last and removed first, so a directory that has one is complete.

A .pt file is read with `weights_only`: tensors and plain values, no code.
"""

import errno
import hashlib
import json
import logging
import pickle
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.class_images import FILE as CLASS_IMAGES
from dsd_serve.class_images import Grid
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, DSDError, shown
from dsd_serve.files import atomic
from dsd_serve.params import SamplingParams, check_sampler, to_config, with_values
from dsd_serve.precision import PRECISIONS, REFERENCE, find_precision

log = logging.getLogger(__name__)

FORMAT = "dsd-model-1"
CHECKPOINT_FORMAT = "dsd-checkpoint-1"
MAX_TEXT = 10_000_000  # bytes of config.json, of a manifest, of card.md
MAX_NAME = 200  # characters of a model's name


@dataclass(frozen=True)
class ModelDir:
    """A validated model directory.

    defaults: the recommended sampling settings. artefacts: precision -> the record of dsd-export: `files` (sha256 by
    name), `made_from`, `measured`; empty for directories of versions that wrote none. step: of the
    training, where it is known. class_images: the grid of classes.webp, if there is one.
    """

    path: Path
    name: str
    config: ModelConfig
    defaults: SamplingParams = field(default_factory=SamplingParams)
    artefacts: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    class_images: Grid | None = None

    def graph(self, precision: str = "fp32") -> Path:
        """The graph for ONNX Runtime: the one with its own operators, or the plain one if that is missing.

        Raises CheckpointError when the directory has neither.
        """
        row = find_precision(precision)
        fused, plain = self.path / row.fused, self.path / row.plain
        if fused.exists():
            return fused
        if plain.exists():
            return plain
        if precision == REFERENCE:
            raise CheckpointError(f"{self.path} has no model.onnx; dsd-export {self.path} --onnx writes it")
        raise CheckpointError(
            f"{self.path} has no graph in {precision}, only in {', '.join(self.precisions) or 'none'}; "
            f"dsd-export {self.path} --precision {precision} makes it"
        )

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which it has a graph."""
        return tuple(
            name
            for name, row in PRECISIONS.items()
            if (self.path / row.fused).exists() or (self.path / row.plain).exists()
        )

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def files(self, precision: str = "fp32") -> list[Path]:
        """The graph that is run in a precision, and the weights that it reads."""
        own = self.path / find_precision(precision).weights
        return [self.graph(precision), own if own.exists() else self.weights]

    def check(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError if a file is not regular, or differs from the sha256 in config.json."""
        recorded = {name: sha for artefact in self.artefacts.values() for name, sha in artefact["files"].items()}
        if self.class_images:
            recorded[CLASS_IMAGES] = self.class_images.sha256
        for file in files:
            try:
                check_regular(file)
            except FileNotFoundError:
                continue  # the loader reports it
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
            if file.name in recorded and sha256(file) != recorded[file.name]:
                raise CheckpointError(
                    f"{file} is not the file that config.json was written with: it is damaged, or of another export; "
                    "copy the whole directory again, or export again with dsd-export --force"
                )

    def check_unchanged(self) -> None:
        """Raises CheckpointError when dsd-export has replaced the directory since it was read.

        Called after loading: without an export in between, the files that were loaded are those that were checked.
        """
        if not (self.path / "config.json").exists() or read_model_dir(self.path) != self:
            raise CheckpointError(f"{self.path} was exported again while it was loaded; start again")

    def fingerprint(self, precision: str = "fp32") -> str:
        """sha256 over configuration, graph and weights, in hex."""
        digest = hashlib.sha256(config_json(self.name, self.config, self.defaults).encode())
        for file in self.files(precision):
            if file.exists():
                for block in blocks(file):
                    digest.update(block)
        return digest.hexdigest()


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    for block in blocks(file):
        digest.update(block)
    return digest.hexdigest()


def blocks(file: Path) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. Raises CheckpointError."""
    try:
        check_regular(file)
        with file.open("rb") as data:
            while block := data.read(1 << 20):
                yield block
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None


def check_regular(file: Path) -> None:
    """Raises OSError unless it is a regular file: reading a pipe or a device may never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises OSError; CheckpointError for another encoding or more than MAX_TEXT bytes."""
    check_regular(file)
    with file.open("rb") as opened:
        data = opened.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise CheckpointError(f"{file} cannot be read: it is larger than {MAX_TEXT // 1_000_000} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} cannot be read: it is not UTF-8") from None


def read_model_dir(path: Path) -> ModelDir:
    """Read config.json of a model directory. Raises CheckpointError, which names the fault and how to fix it."""
    file = path / "config.json"
    try:
        values = json.loads(read_text(file))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} is not a model directory: it has no config.json; dsd-export writes one"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise CheckpointError(f"{file} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of format {FORMAT!r}; export the model again with dsd-export")
    try:
        return model_dir_of(path, values)
    except DSDError as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None


def model_dir_of(path: Path, values: Mapping[str, Any]) -> ModelDir:
    """The model directory that a config.json describes. Raises DSDError."""
    name, network, sampling = (values.get(key) for key in ("name", "network", "sampling"))
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(f"name must be a text of 1 to {MAX_NAME} printable characters, got {shown(name)}")
    if not isinstance(network, dict):
        raise CheckpointError(f"network must be an object, got {shown(network)}")
    if not isinstance(sampling, dict | None):
        raise CheckpointError(f"sampling must be an object, got {shown(sampling)}")
    config, defaults = ModelConfig.from_dict(network), with_values(SamplingParams(), sampling or {})
    check_sampling(config, defaults)
    artefacts = values.get("artefacts", {})
    if not isinstance(artefacts, dict):
        raise CheckpointError(f"artefacts must be an object, got {shown(artefacts)}")
    for precision, entry in artefacts.items():
        files = entry.get("files") if isinstance(entry, dict) else None
        if not isinstance(files, dict) or not all(isinstance(sha, str) for sha in files.values()):
            raise CheckpointError(
                f"artefacts must hold for each precision an object with the sha256 of its files, got {shown(entry)} "
                f"for {shown(precision)}"
            )
    step = values.get("step")
    if step is not None and (type(step) is not int or not 0 <= step < 2**53):
        raise CheckpointError(f"step must be an integer from 0, got {shown(step)}")
    grid = Grid.from_dict(values["class_images"]) if "class_images" in values else None
    return ModelDir(path, name, config, defaults, artefacts, step, grid)


def check_sampling(config: ModelConfig, defaults: SamplingParams) -> None:
    """Raises InputError or CheckpointError for recommended settings that the model would refuse in every request."""
    check_sampler(defaults.sampler, config.flow_map)
    if not config.num_classes and defaults.guidance_scale != 1:
        raise CheckpointError(
            "the recommended guidance scale of a model without classes must be 1, which is off, got "
            f"{defaults.guidance_scale:g}"
        )


def config_json(
    name: str,
    config: ModelConfig,
    defaults: SamplingParams,
    artefacts: Mapping[str, Any] | None = None,
    step: int | None = None,
    grid: Grid | None = None,
) -> str:
    """The text of config.json."""
    values: dict[str, Any] = {"format": FORMAT, "name": name, "network": config.to_dict()}
    values["sampling"] = to_config(defaults)
    if step is not None:
        values["step"] = step
    if artefacts:
        values["artefacts"] = dict(artefacts)
    if grid:
        values["class_images"] = asdict(grid)
    return json.dumps(values, indent=2) + "\n"


def read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """The weights of a model directory by name, as float32."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = path / "model.safetensors"
    try:
        check_regular(file)
        return {name: array.astype(np.float32) for name, array in load_file(file).items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no model.safetensors; dsd-export writes one") from None
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{file} is not a readable safetensors file: {reason}") from None


def write_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """Write a training checkpoint atomically: a crash leaves the old one or the new one."""
    import torch

    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT, **values}, file)
    except RuntimeError as error:  # torch ends the file even if the disk is full, and fails in its own words then
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, tensors on the CPU. Raises CheckpointError, also for a pickle with code in it."""
    import torch

    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint.pt in it, or a model directory") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is damaged, or holds something other than tensors and plain values, which could "
            "run code when it is loaded"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch raises anything on broken files, in words for its developers
        log.debug("%s: %s", path, error)
        raise CheckpointError(f"{path} is not a checkpoint of dsd-train, or it is cut off or damaged") from None
    if not isinstance(values, dict) or values.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of dsd-train")
    return values
