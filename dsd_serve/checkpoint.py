"""The two artefacts on disk: a training checkpoint (one .pt file) and a model directory.

A model directory is what everything passes around:

    config.json        the network, its name and its sampling defaults
    model.safetensors  the EMA weights, stored once: float32 or float16
    model.onnx         the graph; its weights are the bytes of model.safetensors
    model.ort.onnx     the same with ONNX Runtime's own attention operator: what the ONNX engine runs
    card.md            what it was trained on, what it can and cannot do

A .pt is read with `weights_only`, so that it can hold tensors and plain values but no code.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
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
DEFAULT_KEYS = ("num_steps", "sampler", "guidance_scale")


@dataclass(frozen=True)
class ModelDir:
    """A model directory that was found in order. `defaults`: how it is best sampled, where a caller is silent."""

    path: Path
    name: str
    config: ModelConfig
    defaults: SamplingParams = field(default_factory=SamplingParams)

    @property
    def graph(self) -> Path:
        """What ONNX Runtime runs: the graph with its own operators, or the plain one where that is missing."""
        fused = self.path / "model.ort.onnx"
        return fused if fused.exists() else self.path / "model.onnx"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def fingerprint(self) -> str:
        """sha256 over configuration, graph and weights, in hex."""
        digest = hashlib.sha256()
        for file in (self.path / "config.json", self.graph, self.weights):
            if file.exists():
                digest.update(file.read_bytes())
        return digest.hexdigest()


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
        return ModelDir(path, str(values["name"]), config, defaults)
    except (DSDError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None


def config_json(name: str, config: ModelConfig, defaults: SamplingParams) -> str:
    """The text of config.json."""
    sampling = {key: getattr(defaults, key) for key in DEFAULT_KEYS}
    return (
        json.dumps({"format": FORMAT, "name": name, "network": config.to_dict(), "sampling": sampling}, indent=2) + "\n"
    )


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
