"""Runs on classes of their own and on none: from the folder to the exported directory, and back into the run."""

import json

import numpy as np
import pytest
import torch

from dsd_serve.checkpoint import read_checkpoint, read_model_dir
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError
from dsd_serve.network import DSD
from export.main import main as dsd_export
from tests.support.data import ROOT, train_arguments
from tests.support.odd_images import cats_and_dogs, fill
from tests.support.runs import assert_same, train_until
from training.loss import Draws, Objective
from training.run_config import LossSection, load_config
from training.train import train

NAMES = ("Café", "Ёж", "金毛犬")


def configured(images, folder, *overrides):
    places = [f"run.dir={folder}", "data.validation=", "data.classes=[]", "optim.steps=6"]
    arguments = train_arguments(images, *places, "run.eval_every=3", *overrides)
    return load_config(ROOT / "training/configs/demo.toml", arguments)


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    return cats_and_dogs(tmp_path_factory.mktemp("animals"), *NAMES, count=10)


@pytest.fixture(scope="module")
def run_of_animals(animals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "animals"
    train(configured(animals, folder))
    return folder


def test_the_names_of_folders_reach_the_exported_directory(run_of_animals, tmp_path):
    stored = read_checkpoint(run_of_animals / "checkpoint.pt")
    assert tuple(stored["network"]["class_names"]) == NAMES and stored["network"]["num_classes"] == 3
    assert tuple(stored["config"]["model"]["class_names"]) == NAMES
    assert stored["ema"]["y_embed.embedding.weight"].shape[0] == 4
    assert stored["objective"]["classifier.weight"].shape[0] == 3
    dsd_export([str(run_of_animals / "checkpoint.pt"), "-o", str(tmp_path / "animals")])
    config = read_model_dir(tmp_path / "animals").config
    assert config.class_names == NAMES and config.trained_classes == (0, 1, 2)
    assert json.loads((tmp_path / "animals/config.json").read_text())["network"]["class_names"] == [*NAMES]


def test_images_without_classes_train_a_model_without_them(tmp_path):
    state = train(configured(fill(tmp_path / "images", 20), tmp_path / "run"))
    assert state.ema.config.num_classes == 0 and state.objective.classifier is None
    assert (tmp_path / "run/samples-0000006.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all("classification" not in line for line in lines) and np.isfinite(lines[-1]["psnr"])
    dsd_export([str(tmp_path / "run/checkpoint.pt"), "-o", str(tmp_path / "model")])
    assert read_model_dir(tmp_path / "model").config.null_label == 0
    train_until(configured(tmp_path / "images", tmp_path / "run", "optim.steps=9"), 8)


def test_a_run_says_that_images_were_added_or_removed_once(tmp_path, caplog):
    fill(tmp_path / "images", 20)

    def resumed(steps, *overrides):
        caplog.clear()
        with caplog.at_level("WARNING"):
            train(configured(tmp_path / "images", tmp_path / "run", f"optim.steps={steps}", *overrides))
        return [line for line in caplog.messages if "order" in line]

    assert resumed(1) == resumed(2) == []
    fill(tmp_path / "images", 30)
    number, rest = resumed(3)[0].split(" images to train on, ")
    assert 20 < int(number) < 30
    assert rest.startswith("1") and rest.endswith(
        "when the checkpoint was saved: from here on they come in another order, and other images are held out"
    )
    assert resumed(4) == []
    for image in range(25, 30):
        (tmp_path / f"images/{image}.png").unlink()
    assert resumed(5, f"data.validation={tmp_path / 'images'}")[0].endswith("in another order")


def test_a_run_resumes_with_the_same_folders_only(run_of_animals, animals, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((run_of_animals / "checkpoint.pt").read_bytes())
    assert train(configured(animals, tmp_path, "optim.steps=7")).step == 7
    for names, named in (
        (
            (*NAMES, "bird"),
            "was trained with 3 classes of its own (Café, Ёж, 金毛犬), the images now have 4, with bird",
        ),
        (NAMES[:2], "the images now have 2, without 金毛犬"),
        (("Café", "bird", "Ёж"), "the images now have 3, without 金毛犬 and with bird"),
        (("1", "2"), "the images come with the classes of ImageNet-1k"),
    ):
        other = cats_and_dogs(tmp_path / "-".join(names), *names)
        with pytest.raises(CheckpointError) as error:
            train(configured(other, tmp_path, "optim.steps=9"))
        assert named in str(error.value) and str(error.value).endswith("use another run.dir or the same images")
    with pytest.raises(CheckpointError, match="the images come without classes"):
        train(configured(animals / "Café", tmp_path, "optim.steps=9"))
    shuffled = "model.class_names=['金毛犬', 'Café', 'Ёж']"
    with pytest.raises(CheckpointError, match="the images now have 3, in another order"):
        train(configured(animals, tmp_path, "optim.steps=9", shuffled))


def test_some_of_the_classes(animals, tmp_path):
    state = train(configured(animals, tmp_path, "data.classes=['金毛犬', 0]", "optim.steps=1"))
    assert state.ema.config.trained_classes == (0, 2) and state.ema.config.class_names == NAMES


@pytest.mark.parametrize("memory", [8, 0])
def test_a_run_with_augmentation_resumes_exactly(animals, tmp_path, memory):
    options = ["data.crop=0.6", "data.colour=0.3", "run.save_every=2", f"data.memory_gb={memory}", "run.precision=fp32"]
    whole = train(configured(animals, tmp_path / "whole", *options))
    for last in (3, 6):
        train_until(configured(animals, tmp_path / "part", *options), last)
    assert_same(tmp_path / "whole/checkpoint.pt", tmp_path / "part/checkpoint.pt")
    plain = train(configured(animals, tmp_path / "plain", *options[2:]))
    assert not torch.equal(whole.ema.pixel_head.weight, plain.ema.pixel_head.weight)


@pytest.mark.parametrize("memory", [8, 0])
def test_a_run_with_one_percent_of_broken_images_ends_and_lists_them(tmp_path, memory, caplog):
    images = cats_and_dogs(tmp_path / "images", count=100)
    for name in ("cat/17.png", "dog/3.png"):
        (images / name).write_bytes(b"x")
    config = configured(images, tmp_path / "run", "optim.steps=30", f"data.memory_gb={memory}", "run.eval_every=30")
    assert train(config).step == 30
    listed = (tmp_path / "run/broken.tsv").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [f"{images}/cat/17.png", f"{images}/dog/3.png"]
    assert all("not a readable image" in line for line in listed)
    assert "2 images skipped, because they cannot be read" in caplog.text and "skipped: " in caplog.text
    assert train(configured(images, tmp_path / "run", "optim.steps=31", f"data.memory_gb={memory}")).step == 31
    assert len((tmp_path / "run/broken.tsv").read_text().splitlines()) == 2, "a run that resumes keeps the list"


def test_at_its_start_a_run_says_what_its_images_are(tmp_path, caplog):
    caplog.set_level("INFO")
    cats_and_dogs(tmp_path / "images", "cat", count=30)
    fill(tmp_path / "images/dog", 5)
    (tmp_path / "images/bird").mkdir()
    (tmp_path / "images/cat/a.gif").write_bytes(b"x")
    cats_and_dogs(tmp_path / "held", "cat", count=3)
    train(configured(tmp_path / "images", tmp_path / "run", f"data.validation={tmp_path}/held", "optim.steps=1"))
    for said in (
        "35 images to train on, 3 held out",
        "2 classes (cat, dog), 5 to 30 images each, median 17.5; fewest: dog 5, cat 30; data.balance=true draws all",
        "no held-out images of 1 class: dog",
        "left out: 1 .gif, formats",
        "left out: a folder without images (bird)",
    ):
        assert said in caplog.text


def test_one_class_has_no_classification_loss():
    sizes = {"image_size": 16, "patch_size": 8, "latent_dim": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    config = ModelConfig(**sizes, num_classes=1, class_names=("a",))
    model, loss = DSD(config), LossSection()
    draws = Draws.make(loss, 2, config.latent_shape, torch.Generator().manual_seed(1))
    _, parts = Objective(model, loss)(model, torch.zeros(2, 3, 16, 16), torch.tensor([0, 0]), draws)
    assert "classification" not in parts
