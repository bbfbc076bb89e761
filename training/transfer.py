"""The weights of a trained model for a network of other classes or another image size.

Of two networks that differ in nothing else, all weights but three are the same:
  - the label table: a class that both know keeps its row, a new class begins with the mean of the trained rows;
  - the patch embedding and the pixel head, where the patch size differs: their filters are resized.
Position embeddings are a formula of the grid and need nothing.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError
from dsd_serve.files import demo_model
from dsd_serve.hub import model_dir
from dsd_serve.labels import ImageClass, spelled, table_of

DEMO = "demo"  # a value of run.start_from: the model that ships with the package
LABELS = "y_embed.embedding.weight"


def start_place(model: str) -> Path:
    """The model directory that run.start_from names."""
    return demo_model() if model == DEMO else model_dir(model)


def fitted(weights: dict[str, Tensor], theirs: ModelConfig, ours: ModelConfig, path: Path) -> dict[str, Tensor]:
    """The weights of a network of the shape `theirs`, from `path`, for one of the shape `ours`.

    A flow map has the same weights as a network without one, and at r = t it is such a network.

    Raises CheckpointError if the networks differ in more than their classes, image size and patch size.
    """
    freed = {
        name: getattr(ours, name)
        for name in ("image_size", "patch_size", "num_classes", "classes", "class_names", "class_wnids", "flow_map")
    }
    if (same := replace(theirs, **freed)) != ours:
        different = next(name for name in vars(ours) if getattr(same, name) != getattr(ours, name))
        raise CheckpointError(
            f"run.start_from {path} has {different} = {getattr(theirs, different)!r}, this configuration "
            f"{getattr(ours, different)!r}; only classes, image_size and patch_size may differ"
        )
    found = dict(weights)
    if (theirs.num_classes, theirs.class_names) != (ours.num_classes, ours.class_names):
        found[LABELS] = label_table(weights[LABELS], theirs, ours)
    if theirs.patch_size != ours.patch_size:
        resize_patches(found, theirs.patch_size, ours.patch_size)
    return found


def known_classes(theirs: ModelConfig, ours: ModelConfig) -> list[tuple[int, int]]:
    """(label of theirs, label of ours) of the classes that both have and theirs was trained on.

    Classes are the same if their wnids are, or if one has none and the names are, up to case, width and spaces.
    """
    trained, found = set(theirs.trained_classes), []
    by_wnid: dict[str, int] = {}
    by_name: dict[str, list[ImageClass]] = {}
    for c in table_of(theirs).classes:
        by_wnid[c.wnid] = c.index
        by_name.setdefault(spelled(c.name), []).append(c)
    for c in table_of(ours).classes:
        same = by_wnid.get(c.wnid) if c.wnid else None
        named = [other for other in by_name.get(spelled(c.name), ()) if not (c.wnid and other.wnid)]
        if same is None and len(named) == 1:
            same = named[0].index
        if same in trained:
            found.append((same, c.index))
    return found


def label_table(table: Tensor, theirs: ModelConfig, ours: ModelConfig) -> Tensor:
    """The rows [num_classes + 1, W] of our labels; the last, of no class, is kept."""
    start = table[list(theirs.trained_classes)].mean(0) if theirs.trained_classes else table[theirs.null_label]
    rows = start.repeat(ours.num_classes + 1, 1)
    rows[ours.null_label] = table[theirs.null_label]
    for their_label, our_label in known_classes(theirs, ours):
        rows[our_label] = table[their_label]
    return rows


def resize_patches(weights: dict[str, Tensor], from_size: int, to_size: int) -> None:
    """Resize the filters: the patch embedding sees a patch of the new size resized to the old one, the pixel head draws
    the old one resized to the new."""
    seen, drawn = resizing(to_size, from_size), resizing(from_size, to_size)

    def resized(filters: Tensor, along: Tensor) -> Tensor:  # [N, 3 P P], [P, Q] -> [N, 3 Q Q]
        images = filters.reshape(-1, 3, from_size, from_size)
        return torch.einsum("ncyx,yu,xv->ncuv", images, along, along).reshape(len(filters), -1)

    weights["patch_embed.proj.weight"] = resized(weights["patch_embed.proj.weight"], seen)
    weights["pixel_head.weight"] = resized(weights["pixel_head.weight"].T, drawn.T).T.contiguous()
    weights["pixel_head.bias"] = resized(weights["pixel_head.bias"][None], drawn.T)[0]


def resizing(size: int, to_size: int) -> Tensor:
    """The matrix [to_size, size] that resizes a row of a patch: linear, and means of the pixels where it shrinks.

    Beyond the outermost pixels it extrapolates, so that patches side by side meet without an edge.
    """
    if to_size < size or size == 1:
        return F.interpolate(torch.eye(size)[None, None], size=(size, to_size), mode="bilinear", antialias=True)[0, 0].T
    at = (torch.arange(to_size) + 0.5) * size / to_size - 0.5
    left = at.floor().clamp(0, size - 2)
    row = torch.arange(size)
    return (row == left[:, None]) * (left + 1 - at)[:, None] + (row == left[:, None] + 1) * (at - left)[:, None]
