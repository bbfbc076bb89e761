"""dsd-train init: what it writes for images of several kinds, that a run starts from it, and what it refuses."""

import argparse
import shlex
import tomllib

import pytest

from dsd_serve.config import PRESETS
from tests.support.odd_images import LAYOUTS, cats_and_dogs, fill
from training.dataset import Images
from training.first_config import (
    augmentation_for,
    configuration,
    length_for,
    main,
    name_of,
    shape_for,
    shape_like,
    shorter_side,
)
from training.run_config import TrainConfig, load_config
from training.train import main as dsd_train

OPTIONS = argparse.Namespace(validation="", labels="auto", start_from="")


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """The folder in which `dsd-train init animals` ran, and what it printed. Its images are of 24 pixels."""
    monkeypatch.chdir(tmp_path)
    cats_and_dogs(tmp_path / "animals", "金毛犬", "Café", count=12)
    dsd_train(["init", "animals"])
    return tmp_path, capsys.readouterr().out


def test_a_run_starts_from_what_it_writes_with_the_command_that_it_prints(written):
    folder, printed = written
    assert "24 images, the shorter side of most about 24 pixels" in printed
    assert "2 classes (Café, 金毛犬), 12 images each" in printed and " on cpu, " in printed
    command = shlex.split(printed.splitlines()[-1].removeprefix("next: "))
    assert command == ["dsd-train", "animals.toml"]
    config = load_config(folder / "animals.toml")
    assert (config.model.image_size, config.data.crop, config.data.colour) == (32, 0.7, 0.1)
    assert config.data.path == str(folder / "animals") and config.run.dir == "runs/animals"
    few = ["optim.steps=2", "run.eval_every=2", "run.samples_per_class=1", "run.sample_steps=1", "run.compile=off"]
    dsd_train(["animals.toml", *few])
    assert (folder / "runs/animals/checkpoint.pt").exists()


def test_fine_tuning_takes_the_network_of_the_model(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    cats_and_dogs(tmp_path / "animals", "golden retriever", "Café", count=12)
    main(["animals", "--start-from", "demo"])
    assert load_config(tmp_path / "animals.toml").run.start_from == "demo"
    few = ["optim.steps=1", "run.eval_every=2", "run.samples_per_class=0", "run.compile=off"]
    with caplog.at_level("INFO"):
        dsd_train(["animals.toml", *few])
    assert "which has 1 of the 2 classes" in caplog.text


@pytest.mark.parametrize(("side", "image_size", "patch_size"), [(1, 32, 8), (63, 32, 8), (64, 64, 16), (500, 256, 64)])
def test_a_model_is_fine_tuned_with_as_many_tokens(side, image_size, patch_size):
    shape = shape_like(PRESETS["demo"], side)
    assert (shape.image_size, shape.patch_size, shape.hidden_size) == (image_size, patch_size, 192)


def test_a_model_that_is_not_there_gets_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "images", 8)
    with pytest.raises(SystemExit, match=r"dsd-train init: .*nowhere"):
        main(["images", "--start-from", "nowhere"])


def test_a_file_is_replaced_only_on_demand(written, capsys):
    folder, _ = written
    before = (folder / "animals.toml").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["animals"])
    assert str(stopped.value) == ("dsd-train init: animals.toml exists; --force replaces it, -o FILE writes another")
    (folder / "animals.toml").write_text("mine")
    main(["animals", "--force", "--labels", "none", "--validation", "animals"])
    after = load_config(folder / "animals.toml")
    assert after.data.labels == "none" and after.data.validation == str(folder / "animals")
    assert after.run.sample_guidance == 1.0
    assert before != (folder / "animals.toml").read_text()


@pytest.mark.parametrize("what", [name for name, (_, expected) in LAYOUTS.items() if isinstance(expected, str)])
def test_what_cannot_be_trained_on_gets_a_sentence_and_no_file(tmp_path, monkeypatch, what):
    if what.startswith("one image"):
        pytest.skip("a run refuses it, when it holds images out")
    monkeypatch.chdir(tmp_path)
    make, expected = LAYOUTS[what]
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(make(tmp_path / "images")), "-o", "out.toml"])
    assert str(stopped.value).startswith("dsd-train init: ") and "\n" not in str(stopped.value)
    assert expected in str(stopped.value) or "checked images cannot be read" in str(stopped.value)
    assert not (tmp_path / "out.toml").exists()


def test_an_output_that_cannot_be_written_gets_a_sentence(tmp_path):
    fill(tmp_path / "images", 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"dsd-train init: .* cannot be written: "):
        main([str(tmp_path / "images"), "-o", str(tmp_path / "file/out.toml")])


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("side", [1, 32, 63, 64, 200, 5000])
@pytest.mark.parametrize("count", [2, 44, 1000, 30_000, 100_000, 1_300_000])
def test_every_size_of_image_and_set_gets_a_possible_configuration(tmp_path, cuda, side, count):
    fill(tmp_path, 4)
    images = Images(str(tmp_path), 32)
    images.indices, images.labels = images.indices.repeat(count)[:count], images.labels.repeat(count)[:count]
    shape = shape_for(side, count, cuda)
    assert shape.image_size <= max(side, 32) and shape.image_size % shape.patch_size == 0
    text = configuration(images, OPTIONS, shape, cuda, micro=0)
    config = TrainConfig.from_dict(tomllib.loads(text))
    assert config.network_config().grid_size in ((4,) if not cuda else (4, 8, 16))
    seen = config.optim.steps * config.optim.batch_size
    assert seen >= min(50, 1_000_000 / count) * 0.2 * count and config.optim.warmup_steps < config.optim.steps
    assert config.optim.batch_size <= max(2, count)


def test_fewer_images_are_varied_more_and_larger_sets_get_larger_networks():
    assert augmentation_for(100) < augmentation_for(5000) < augmentation_for(50_000) == (1.0, 0.0)
    sizes = [shape_for(256, count, True) for count in (100, 10_000, 100_000, 1_000_000)]
    assert [shape.hidden_size * shape.depth for shape in sizes] == sorted(s.hidden_size * s.depth for s in sizes)
    assert length_for(100, False).steps * 64 >= 50_000 - 64


def test_the_size_of_images_is_that_of_the_shorter_side(tmp_path, real_data):
    assert 300 < shorter_side(Images(str(real_data / "photos"), 32)) < 500


@pytest.mark.parametrize(
    ("path", "name"), [("a/My cats!/", "My-cats"), ("hf:org/pets", "pets"), ("x/{a..b}.tar", "a..b"), ("/", "images")]
)
def test_the_name_comes_from_the_place(path, name):
    assert name_of(path) == name
