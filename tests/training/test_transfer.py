from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dsd_serve.checkpoint import read_model_dir, read_weights
from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.files import demo_model
from dsd_serve.network import DSD
from training.state import new_state, start_from
from training.train import train
from training.transfer import LABELS, fitted, known_classes

DEMO = demo_model()
SHAPE = read_model_dir(DEMO).config
GOLDFISH, RETRIEVER = 1, 207


@pytest.fixture(scope="module")
def weights():
    return {name: torch.from_numpy(array) for name, array in read_weights(DEMO).items()}


def network(weights, config):
    model = DSD(config).eval()
    model.load_state_dict(fitted(weights, SHAPE, config, Path("demo")))
    return model


def test_the_same_network_takes_the_same_weights(weights):
    other = replace(SHAPE, classes=(5, 6))
    assert all(torch.equal(value, weights[name]) for name, value in fitted(weights, SHAPE, other, DEMO).items())


def test_a_run_may_start_from_a_flow_map(weights):
    """The demo model is one, and a run trains a network that is not."""
    theirs, ours = replace(SHAPE, flow_map=True), replace(SHAPE, flow_map=False)
    DSD(ours).load_state_dict(fitted(weights, theirs, ours, DEMO))


def test_known_classes_keep_their_rows(weights):
    ours = replace(
        SHAPE,
        num_classes=4,
        classes=(),
        class_names=("My cat", "golden  RETRIEVER", "a fish", "tench"),  # the demo was not trained on tenches
        class_wnids=("", "", "n01443537", ""),
    )
    assert known_classes(SHAPE, ours) == [(RETRIEVER, 1), (GOLDFISH, 2)]
    table, theirs = fitted(weights, SHAPE, ours, DEMO)[LABELS], weights[LABELS]
    assert table.shape == (5, SHAPE.hidden_size)
    assert torch.equal(table[1], theirs[RETRIEVER])
    assert torch.equal(table[2], theirs[GOLDFISH])
    assert torch.equal(table[4], theirs[SHAPE.null_label])
    assert torch.equal(table[0], theirs[list(SHAPE.classes)].mean(0))
    assert torch.equal(table[3], table[0])


def test_other_wnids_are_other_classes_of_the_same_name():
    ours = replace(SHAPE, num_classes=1, classes=(), class_names=("goldfish",), class_wnids=("n00000001",))
    assert known_classes(SHAPE, ours) == []


def test_a_model_without_classes_keeps_the_row_of_no_class(weights):
    ours = replace(SHAPE, num_classes=0, classes=())
    assert torch.equal(fitted(weights, SHAPE, ours, DEMO)[LABELS], weights[LABELS][-1:])


@pytest.mark.parametrize(("image_size", "patch_size"), [(64, 16), (16, 4)])
def test_patches_of_another_size_see_and_draw_the_same_image(weights, image_size, patch_size):
    photo = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    photo = F.interpolate(photo, size=(64, 64), mode="bicubic").clamp(-1, 1)
    small, large = (
        F.interpolate(photo, size=(size, size), mode="bilinear", antialias=True) for size in (32, image_size)
    )
    before, after = (
        network(weights, SHAPE),
        network(weights, replace(SHAPE, image_size=image_size, patch_size=patch_size)),
    )
    with torch.no_grad():
        z, z_other = before.encode(small), after.encode(large)
        assert F.cosine_similarity(z.flatten(1), z_other.flatten(1)).min() > 0.95
        drawn, drawn_other = before.decode(z), after.decode(z)
        drawn = F.interpolate(drawn, size=(image_size, image_size), mode="bilinear", antialias=True)
        assert (drawn - drawn_other).square().mean().sqrt() < 0.05


def test_positions_follow_a_larger_grid(weights):
    model = network(weights, replace(SHAPE, image_size=64))
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 64, SHAPE.latent_dim)


@pytest.mark.parametrize("change", [{"depth": 5}, {"latent_dim": 8}, {"num_heads": 3}, {"prediction": "velocity"}])
def test_other_differences_are_refused(weights, change):
    name = next(iter(change))
    with pytest.raises(CheckpointError, match=f"{name} = .*; only classes, image_size and patch_size may differ"):
        fitted(weights, SHAPE, replace(SHAPE, **change), DEMO)


def test_frozen_modules_keep_their_weights(tiny_dir, train_config, tmp_path):
    names = "pixel_head", "blocks.0"
    config = train_config(
        "optim.steps=2", f"run.dir={tmp_path}", f"run.start_from={tiny_dir}", f"optim.frozen={list(names)}"
    )
    state, weights = train(config), read_weights(tiny_dir)
    for model in (state.objective.model, state.ema):
        for name, value in model.state_dict().items():
            kept = np.allclose(value, weights[name], atol=0)
            assert kept == name.startswith(("pixel_head.", "blocks.0.")), name


@pytest.mark.parametrize("name", ["pixels", "", "blocks.9"])
def test_unknown_modules_cannot_be_frozen(train_config, name):
    with pytest.raises(ConfigError, match=r"optim\.frozen must be names of patch_embed, .* or blocks\.N, got"):
        new_state(train_config(f"optim.frozen=['{name}']"), torch.device("cpu"))


def test_everything_cannot_be_frozen(train_config):
    names = [name for name, _ in DSD(SHAPE).named_children()]
    with pytest.raises(ConfigError, match="must leave a module to train"):
        new_state(train_config(f"optim.frozen={names}"), torch.device("cpu"))


def test_a_run_says_how_many_classes_it_knows(tiny_dir, train_config, caplog):
    config = train_config("data.classes=[1,2]")
    with caplog.at_level("INFO"):
        start_from(new_state(config, torch.device("cpu")), tiny_dir)
    assert f"starts from the weights of {tiny_dir}, which has 1 of the 2 classes" in caplog.text
