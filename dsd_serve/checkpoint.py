"""The two artefacts on disk: a training checkpoint (one .pt file) and a model directory.

A model directory is what everything passes around:

    config.json        the network, its name, its sampling defaults, and of each precision the sha256 of its files
    model.safetensors  the EMA weights, stored once: float32 or float16
    model.onnx         the graph; its weights are the bytes of model.safetensors
    model.ort.onnx     the same with ONNX Runtime's own attention operator: what the ONNX engine runs
    model.P.onnx, model.P.ort.onnx, model.P.safetensors  the same in precision P, where it was exported
    card.md            what it was trained on, what it can and cannot do

config.json is written last and taken away first, so a directory that has one is whole.

A .pt is read with `weights_only`, so that it can hold tensors and plain values but no code.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, DSDError
from dsd_serve.params import SamplingParams

FORMAT = "dsd-model-1"
CHECKPOINT_FORMAT = "dsd-checkpoint-1"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEFAULT_KEYS = ("num_steps", "sampler", "guidance_scale")


@dataclass(frozen=True)
class ModelDir:
    """A model directory that was found in order. `defaults`: how it is best sampled, where a caller is silent.

    artefacts: precision -> what dsd-export recorded of it: `files` (sha256 by name), `made_from`, `measured`; empty for
    a directory that was written before there was a record.
    """

    path: Path
    name: str
    config: ModelConfig
    defaults: SamplingParams = field(default_factory=SamplingParams)
    artefacts: Mapping[str, Any] = field(default_factory=dict)

    def graph(self, precision: str = "fp32") -> Path:
        """What ONNX Runtime runs: the graph with its own operators, or the plain one where that is missing.

        Raises CheckpointError when the directory has neither.
        """
        fused, plain = (self.path / name for name in graph_names(precision))
        if fused.exists():
            return fused
        if plain.exists():
            return plain
        if precision == "fp32":
            raise CheckpointError(f"{self.path} has no model.onnx; dsd-export {self.path} --onnx writes it")
        raise CheckpointError(
            f"{self.path} has no graph in {precision}, only in {', '.join(self.precisions) or 'none'}; "
            f"dsd-export {self.path} --precision {precision} makes it"
        )

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those of PRECISIONS that it has a graph of."""
        return tuple(
            precision for precision in PRECISIONS if any((self.path / name).exists() for name in graph_names(precision))
        )

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def files(self, precision: str = "fp32") -> list[Path]:
        """The graph that is run in a precision, and the weights that it reads."""
        own = self.path / f"model.{precision}.safetensors"
        return [self.graph(precision), own if own.exists() else self.weights]

    def check(self, files: Iterable[Path]) -> None:
        """Raises CheckpointError for a file that is not the one that config.json was written with."""
        recorded = {name: sha for artefact in self.artefacts.values() for name, sha in artefact["files"].items()}
        for file in files:
            if file.name in recorded and file.exists() and sha256(file) != recorded[file.name]:
                raise CheckpointError(
                    f"{file} is not the file that config.json was written with: it is damaged, or of another export; "
                    "copy the whole directory again, or export again with dsd-export --force"
                )

    def check_unchanged(self) -> None:
        """Raises CheckpointError when dsd-export has replaced the directory since it was read.

        Called after loading: what was checked before is what was loaded, if no export began in between.
        """
        if not (self.path / "config.json").exists() or read_model_dir(self.path) != self:
            raise CheckpointError(f"{self.path} was exported again while it was loaded; start again")

    def fingerprint(self, precision: str = "fp32") -> str:
        """sha256 over configuration, graph and weights, in hex."""
        digest = hashlib.sha256(config_json(self.name, self.config, self.defaults).encode())
        for file in self.files(precision):
            if file.exists():
                with file.open("rb") as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()


def graph_names(precision: str) -> tuple[str, str]:
    """The files of the graph with ONNX Runtime's own operators, and of the plain one."""
    stem = "model" if precision == "fp32" else f"model.{precision}"
    return f"{stem}.ort.onnx", f"{stem}.onnx"


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_model_dir(path: Path) -> ModelDir:
    """Read config.json of a model directory. Raises CheckpointError with what is wrong and what writes a right one."""
    file = path / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is no model directory: it has no config.json; dsd-export writes one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of format {FORMAT!r}; export the model again with dsd-export")
    try:
        config = ModelConfig.from_dict(values["network"])
        known = {item.name for item in fields(SamplingParams)}
        defaults = SamplingParams(**{key: value for key, value in values.get("sampling", {}).items() if key in known})
        artefacts = {
            str(name): {**entry, "files": dict(entry["files"])} for name, entry in values.get("artefacts", {}).items()
        }
        return ModelDir(path, str(values["name"]), config, defaults, artefacts)
    except (DSDError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None


def config_json(
    name: str, config: ModelConfig, defaults: SamplingParams, artefacts: Mapping[str, Any] | None = None
) -> str:
    """The text of config.json."""
    sampling = {key: getattr(defaults, key) for key in DEFAULT_KEYS}
    values = {"format": FORMAT, "name": name, "network": config.to_dict(), "sampling": sampling}
    if artefacts:
        values["artefacts"] = dict(artefacts)
    return json.dumps(values, indent=2) + "\n"


def read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """The weights of a model directory by name, as float32."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = path / "model.safetensors"
    try:
        return {name: array.astype(np.float32) for name, array in load_file(file).items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no model.safetensors; dsd-export writes one") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from None


def write_checkpoint(path: Path, values: Mapping[str, Any]) -> None:
    """Write a training checkpoint so that a crash leaves the old one or the new one, never half of one."""
    import torch

    with atomic(path) as temporary:
        torch.save({"format": CHECKPOINT_FORMAT, **values}, temporary)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint, tensors on the CPU. A pickle with code in it is refused; raises CheckpointError."""
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
    except Exception as error:  # torch raises anything on broken files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is no checkpoint: {reason}") from None
    if not isinstance(values, dict) or values.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of dsd-train")
    return values


class atomic:
    """`with atomic(path) as temporary`: write the temporary file; it takes the place of `path` if all went well."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())
        self.temporary.replace(self.path)
