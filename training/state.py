"""The state of a run: networks and optimisers, new, from a model directory or from a checkpoint."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsd_serve.checkpoint import read_checkpoint, read_model_dir, read_weights, write_checkpoint
from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.network import DSD
from training.classes import IMAGENET, ClassNames, some
from training.loss import NetworkObjective, Objective
from training.muon import BatchedMuon
from training.run_config import OptimSection, RunConfig, TrainConfig
from training.teachers import Lpips, VisionModel
from training.transfer import fitted, known_classes

log = logging.getLogger(__name__)


@dataclass
class State:
    """Networks and optimisers after `step` optimiser steps; a checkpoint holds all but `vision`."""

    objective: NetworkObjective
    ema: DSD
    optimizer: torch.optim.Optimizer
    muon: torch.optim.Optimizer | None = None  # for the matrices of the blocks; the rest is AdamW's
    vision: VisionModel | None = None  # frozen, so it is not saved
    step: int = 0
    num_images: int = 0  # that the last step chose from; 0: a checkpoint of an earlier version does not say
    finite: Tensor | None = None  # bool []: all gradients of this process so far were finite

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.muon is None else [self.optimizer, self.muon]


def new_state(config: TrainConfig, device: torch.device) -> State:
    torch.manual_seed(config.run.seed)
    loss, network = config.loss, config.network_config()
    model = DSD(network).to(device)
    lpips = Lpips(Path(loss.lpips_file)).to(device) if loss.lpips_weight else None
    vision = VisionModel(Path(loss.vision_model), network.grid_size, device) if loss.vision_weight else None
    objective = Objective(model, loss, lpips, 0 if vision is None else vision.width).to(device)
    freeze(model, config.optim.frozen)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    return State(objective, ema, *new_optimizers(objective, config.optim), vision)


def freeze(model: DSD, frozen: Sequence[str]) -> None:
    """Keep the weights of some modules, like patch_embed or blocks.0. Raises ConfigError for unknown names."""
    modules = dict(model.named_modules())
    for name in frozen:
        if not name or name not in modules:
            known = [name for name, _ in model.named_children()]
            raise ConfigError(f"optim.frozen must be names of {', '.join(known)} or blocks.N, got {name!r}")
        modules[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("optim.frozen must leave a module to train")


def new_optimizers(
    objective: NetworkObjective, config: OptimSection
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """AdamW for everything; or Muon for the matrices of the blocks and AdamW for the rest."""
    blocks = objective.model.blocks.parameters() if config.name == "muon" else ()
    matrices = [p for p in blocks if p.ndim == 2 and p.requires_grad]
    of_muon = {id(p) for p in matrices}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in of_muon]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        fused=True,
    )
    if not matrices:
        return optimizer, None
    muon = BatchedMuon if matrices[0].is_cuda else torch.optim.Muon
    return optimizer, muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def start_from(state: State, path: Path) -> None:
    """Load the weights of a model directory into the network and its EMA copy. Its classes, image size and patch size
    may differ (training/transfer.py); raises CheckpointError for other differences."""
    directory = read_model_dir(path)
    directory.check([directory.weights])
    weights = {name: torch.from_numpy(array) for name, array in read_weights(path).items()}
    ours = state.ema.config
    weights = fitted(weights, directory.config, ours, path)
    state.objective.model.load_state_dict(weights)
    state.ema.load_state_dict(weights)
    if directory.config.num_classes and ours.num_classes:
        labels = ours.trained_classes
        known = {label for _, label in known_classes(directory.config, ours)}.intersection(labels)
        log.info("starts from the weights of %s, which has %d of the %d classes", path, len(known), len(labels))


def save(state: State, config: RunConfig, path: Path, **more: Any) -> None:
    """Write a checkpoint. more: plain values to keep beside the state."""
    write_checkpoint(
        path,
        {
            "step": state.step,
            "num_images": state.num_images,
            "config": config.to_dict(),
            "network": state.ema.config.to_dict(),
            "objective": state.objective.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            **({} if state.muon is None else {"muon": state.muon.state_dict()}),
            **more,
        },
    )


def restore(state: State, path: Path) -> None:
    """Load a checkpoint into a new state. Raises CheckpointError for another network or objective."""
    values = read_checkpoint(path)
    ours, stored = state.ema.config.to_dict(), values["network"]
    table, other = (class_table(network) for network in (ours, stored))
    if table != other:
        raise CheckpointError(f"{path} was trained {difference(other, table)}; use another run.dir or the same images")
    for key, value in ours.items():
        if stored.get(key) != value:
            raise CheckpointError(
                f"{path} has {key} = {stored.get(key)!r}, the configuration {value!r}; "
                "use another run.dir or the same network"
            )
    try:
        state.objective.load_state_dict(values["objective"])
        state.ema.load_state_dict(values["ema"])
        state.optimizer.load_state_dict(values["optimizer"])
        if state.muon is not None:
            state.muon.load_state_dict(values["muon"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not fit this configuration: {' '.join(str(error).split())[:300]}") from None
    state.step, state.num_images = values["step"], values.get("num_images", 0)


def class_table(network: Mapping[str, Any]) -> ClassNames:
    return ClassNames(network.get("num_classes", 0), tuple(network.get("class_names", ())))


def difference(stored: ClassNames, ours: ClassNames) -> str:
    """A part of a sentence: with which classes a checkpoint was trained, and with which the images come now."""
    if not (stored.names and ours.names):
        return f"{described(stored)}, the images come {described(ours)}"
    gone = [name for name in stored.names if name not in ours.names]
    new = [name for name in ours.names if name not in stored.names]
    changes = [f"without {some(gone)}"] * bool(gone) + [f"with {some(new)}"] * bool(new)
    change = " and ".join(changes) or "in another order"
    return f"{described(stored)}, the images now have {len(ours.names)}, {change}"


def described(classes: ClassNames) -> str:
    if classes == IMAGENET:
        return "with the classes of ImageNet-1k"
    if not classes.names:
        return "without classes"
    return f"with {len(classes.names)} classes of its own ({some(classes.names)})"
