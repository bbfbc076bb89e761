"""Sources of an export: a training checkpoint, a model directory, or the random weights of a preset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsd_serve.checkpoint import ModelDir, read_weights
from dsd_serve.config import PRESETS, ModelConfig
from dsd_serve.errors import CheckpointError
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams
from dsd_serve.precision import PRECISIONS, REFERENCE
from export.card import write_card

State = dict[str, NDArray[np.float32]]
CARD = "card.md"


@dataclass(frozen=True)
class Network:
    """The contents of a model directory, except for the graphs.

    defaults: recommended sampling settings. state: the weights by name, rounded to the type they are stored in. store:
    that type, a precision that is `storable`. card: Markdown, without measurements. step: of the training, if known.
    """

    name: str
    config: ModelConfig
    defaults: SamplingParams
    state: State
    store: str
    card: str
    step: int | None = None


def random_values(preset: str) -> dict[str, Any]:
    """Values like those of a checkpoint, with random weights. adaLN is not left at zero, or blocks would do nothing."""
    torch.manual_seed(0)
    model = DSD(PRESETS[preset])
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.02)
    return {"step": 0, "network": model.config.to_dict(), "ema": model.state_dict(), "config": None}


def ema_weights(values: dict[str, Any], source: str | Path, store: str) -> tuple[ModelConfig, State]:
    """The EMA network of a checkpoint's values, its weights rounded to the type `store`. source: named in errors."""
    try:
        model = DSD(ModelConfig.from_dict(values["network"]))
        model.load_state_dict(values["ema"])
    except KeyError as error:
        raise CheckpointError(f"{source} is incomplete: it has no {error}") from None
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit its own network: {' '.join(str(error).split())[:300]}") from None
    state: State = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.numpy().astype(PRECISIONS[store].dtype).astype(np.float32)
        if not np.isfinite(state[name]).all():
            raise CheckpointError(f"{source} holds weights that are not finite in {store}")
    return model.config, state


def directory_network(directory: ModelDir) -> Network:
    """The network of a model directory, to be exported again."""
    from safetensors import safe_open

    state = read_weights(directory.path)
    with safe_open(directory.weights, "numpy") as file:
        stored = {file.get_slice(name).get_dtype() for name in state}
    store = next((row.name for row in PRECISIONS.values() if row.storable and stored == {row.safetensors}), REFERENCE)
    file_card = directory.path / CARD
    if file_card.exists():
        card = file_card.read_text(encoding="utf-8")
    else:
        size = sum(array.size for array in state.values())
        card = write_card(directory.name, directory.config, size, [], store, directory.defaults, "")
    return Network(directory.name, directory.config, directory.defaults, state, store, card, directory.step)
