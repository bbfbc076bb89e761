"""Images of any data set: odd files and layouts, broken images, held-out images, classes."""

import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch

from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.imaging.codec import write_image
from tests.support.data import CLASSES, ROOT, TINY, sample_image, train_arguments
from tests.support.odd_images import (
    FILES,
    GOOD,
    LAYOUTS,
    ROWS,
    cats_and_dogs,
    class_label,
    fill,
    write_parquet,
    write_tar,
)
from training.classes import IMAGENET, NO_CLASSES, ClassNames
from training.dataset import Images, hold_out_of_classes, load_images, split
from training.order import Order, micro_batches
from training.run_config import DataSection, load_config
from training.sources import columns

DEMO = ROOT / "training/configs/demo.toml"


def loaded(path, *overrides):
    """(training, held-out) images at 16 pixels."""
    places = [f"data.path={path}", "data.validation=", "data.classes=[]"]
    return load_images(load_config(DEMO, [*TINY, *places, *overrides]))


def one_sentence(error):
    text = str(error.value)
    assert text.isprintable() and len(text) < 900, text
    assert "Error(" not in text and "Traceback" not in text and not error.value.__cause__
    return text


def test_the_corpus_is_large():
    assert len(FILES) + len(LAYOUTS) >= 90


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_an_image_or_is_skipped_with_a_reason(tmp_path, what):
    name, data, expected = FILES[what]
    fill(tmp_path, 8)
    (tmp_path / name).write_bytes(data)
    images = Images(str(tmp_path), 16, data=DataSection(broken_share=0.2))
    assert len(images) == 9
    images.hold()
    if expected is True:
        assert not images.broken
        return
    (broken,) = images.broken.values()
    assert broken.name == str(tmp_path / name) and expected in broken.reason
    assert broken.reason.isprintable() and len(broken.reason) < 300
    assert len(images.readable()) == 8


@pytest.mark.parametrize("what", LAYOUTS)
@pytest.mark.timeout(20)
def test_a_layout_has_classes_or_gets_one_sentence(tmp_path, what):
    make, expected = LAYOUTS[what]
    path = make(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(CheckpointError) as error:
            loaded(path)
        assert expected in one_sentence(error)
        return
    training, held = loaded(path)
    assert training.table == (NO_CLASSES if expected is None else ClassNames(len(expected), expected))
    assert len(held) >= 2 and len(training) >= 2
    assert set(training.labels.tolist()) == set(range(len(expected or "1")))


def test_a_folder_is_read_the_same_through_links_and_once(tmp_path):
    make, _ = LAYOUTS["a link to the parent"]
    images = Images(str(make(tmp_path)), 16)
    assert len(images) == 12, "no image is met again through a link"
    assert [image.parent.name for image in images.source.files] == ["cat"] * 6 + ["dog"] * 6


def test_a_link_that_leads_nowhere_is_a_broken_image(tmp_path):
    (fill(tmp_path, 8) / "gone.png").symlink_to("/nowhere/at/all.png")
    images = Images(str(tmp_path), 16, data=DataSection(broken_share=0.2))
    images.hold()
    assert [one.reason for one in images.broken.values()] == ["No such file or directory"]


def test_a_folder_that_may_not_be_read_gets_a_sentence(tmp_path):
    cats_and_dogs(tmp_path)
    (tmp_path / "cat").chmod(0)
    try:
        if list(tmp_path.glob("cat/*")):
            pytest.skip("this user may read everything")
        with pytest.raises(CheckpointError, match="cat cannot be read: Permission denied"):
            Images(str(tmp_path), 16)
    finally:
        (tmp_path / "cat").chmod(0o755)


def test_what_was_left_out_is_said(tmp_path):
    cats_and_dogs(tmp_path)
    (tmp_path / "bird").mkdir()
    for name in ("cat/a.gif", "cat/b.gif", "dog/c.HEIC"):
        (tmp_path / name).write_bytes(b"x")
    assert Images(str(tmp_path), 16).source.remarks == [
        "left out: 2 .gif, 1 .heic, formats that are not read",
        "left out: a folder without images (bird)",
    ]


# Classes.


def test_folders_named_by_wnid_or_label_are_classes_of_imagenet(image_folder, tmp_path):
    images = Images(str(image_folder), 16)
    assert images.table == IMAGENET and sorted({*images.labels.tolist()}) == [*CLASSES]
    own = Images(str(image_folder), 16, data=DataSection(labels="own"))
    assert own.table.names == ("1", "950", "n02099601")
    assert Images(str(image_folder), 16, data=DataSection(labels="none")).table == NO_CLASSES
    cats_and_dogs(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be named by a wnid .* got 'cat'; data.labels=own takes"):
        Images(str(tmp_path), 16, data=DataSection(labels="imagenet"))


def test_the_names_of_imagenet_in_order_are_imagenet(tmp_path):
    from dsd_serve.labels import all_classes

    names = [f"{c.name}, Latin name" for c in all_classes()]
    write_parquet(tmp_path, metadata=class_label(*names), image=[GOOD] * 4, label=[0, 207, 999, 1])
    images = Images(str(tmp_path), 16)
    assert images.table == IMAGENET and images.labels.tolist() == [0, 207, 999, 1]
    wnids = [c.wnid for c in all_classes()][5:9]
    write_parquet(tmp_path, metadata=class_label(*wnids), image=[GOOD] * 4, label=[0, 1, 2, 3])
    assert Images(str(tmp_path), 16).labels.tolist() == [5, 6, 7, 8], "as Tiny-ImageNet has them"


def test_classes_are_kept_by_name_wnid_or_label(tmp_path, image_folder):
    cats_and_dogs(tmp_path, "Café", "cat", "dog")
    for classes in (["cat", "café"], [1, 0], ["1", unicodedata.normalize("NFD", "Café")]):
        images = Images(str(tmp_path), 16, classes)
        assert (len(images), sorted(images.classes), images.table.num_classes) == (12, [0, 1], 3)
    assert Images(str(image_folder), 16, ["goldfish", "n02099601"]).classes == (1, 207)
    with pytest.raises(ConfigError, match=r"data.classes: there is no class 'bird'; the classes are Café, cat, dog"):
        Images(str(tmp_path), 16, ["bird"])
    with pytest.raises(ConfigError, match=r"data.classes: the labels are 0 to 2, got 3"):
        Images(str(tmp_path), 16, [3])
    both = ClassNames(2, ("Cat", "cat"))
    assert both.find("cat", "data.classes") == 1
    with pytest.raises(ConfigError, match="'CAT' may mean the labels 0, 1; give the number"):
        both.find("CAT", "data.classes")
    with pytest.raises(CheckpointError, match=r"no images of class 5 "):
        Images(str(image_folder), 16, [5])
    with pytest.raises(ConfigError, match="these images have no classes"):
        Images(str(tmp_path / "cat"), 16, ["cat"])


def test_classes_of_other_images_are_found_by_name(tmp_path):
    training = cats_and_dogs(tmp_path / "a", "Café", "cat", "dog")
    other = cats_and_dogs(tmp_path / "b", "CAT", unicodedata.normalize("NFD", "Café"))
    table = Images(str(training), 16).table
    assert sorted({*Images(str(other), 16, table=table).labels.tolist()}) == [0, 1]
    cats_and_dogs(other, "bird")
    with pytest.raises(CheckpointError, match="of classes that are not known: bird; the classes are Café, cat, dog"):
        Images(str(other), 16, table=table)
    with pytest.raises(CheckpointError, match="has images without classes; the classes are Café"):
        Images(str(training / "cat"), 16, table=table)
    assert Images(str(other), 16, table=NO_CLASSES).labels.tolist() == [0] * len(Images(str(other), 16))
    retrievers = cats_and_dogs(tmp_path / "c", "golden retriever", "goldfish")
    assert sorted({*Images(str(retrievers), 16, table=IMAGENET).labels.tolist()}) == [1, 207]


def test_the_names_in_a_configuration_fix_the_labels(tmp_path):
    cats_and_dogs(tmp_path)
    training, _ = loaded(tmp_path, "model.class_names=['dog', 'bird', 'cat']")
    assert sorted({*training.labels.tolist()}) == [0, 2]
    with pytest.raises(CheckpointError, match="not known: cat, dog; the classes are bird"):
        loaded(tmp_path, "model.class_names=['bird']")


@pytest.mark.parametrize("rule", ["auto", "own", "none"])
def test_shards_are_read_once_whatever_their_classes(tmp_path, rule):
    write_tar(tmp_path, *[(f"{n}.{kind}", GOOD if kind == "png" else "7") for n in range(4) for kind in ("png", "cls")])
    data = DataSection(labels=rule)
    for _ in range(2):  # the second time from the index
        images = Images(str(tmp_path), 16, data=data)
        assert images.table == {"auto": IMAGENET, "own": ClassNames(1, ("7",)), "none": NO_CLASSES}[rule]
        assert set(images.labels.tolist()) == {7 if rule == "auto" else 0}


def test_a_key_of_json_and_a_column_may_be_chosen(tmp_path):
    members = [("0.png", GOOD), ("0.json", '{"species": "cat", "label": 3}'), ("0.cls", "9")]
    write_tar(tmp_path, *members)
    assert Images(str(tmp_path), 16, data=DataSection(label_column="species")).table.names == ("cat",)
    assert Images(str(tmp_path), 16).labels.tolist() == [9]
    (tmp_path / "a.csv").write_text("id,photo,breed,label\n1,x.png,pug,9\n")
    data = DataSection(image_column="photo", label_column="breed")
    assert Images(str(tmp_path / "a.csv"), 16, data=data).table.names == ("pug",)
    with pytest.raises(CheckpointError, match="has no column 'bred'; it has 'id, photo, breed, label'"):
        Images(str(tmp_path / "a.csv"), 16, data=DataSection(image_column="photo", label_column="bred"))


def test_columns_that_may_hold_classes_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("photo,breed,age\nx.png,pug,3\n")
    images = Images(str(tmp_path / "a.csv"), 16)
    assert images.table == NO_CLASSES
    assert images.source.remarks == [
        "no column is known to hold classes; data.label_column takes one of breed, age",
    ]
    assert Images(str(tmp_path / "a.csv"), 16, data=DataSection(labels="none")).source.remarks == []


# Broken images.


@pytest.fixture
def some_broken(tmp_path):
    """Forty images of each of two classes, three of them broken: two in a row, and the last of its class."""
    cats_and_dogs(tmp_path, count=40)
    for name in ("cat/10.png", "cat/11.png", "dog/9.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_broken_image_is_replaced_by_the_next_of_its_class_wherever_images_are_decoded(some_broken):
    """So that the order of training does not depend on where and when they are decoded."""
    held, streamed = (Images(str(some_broken), 16) for _ in range(2))
    held.hold()
    assert len(held.broken) == 3
    for workers in (0, 1):
        batches = list(micro_batches(streamed, Order(80, 16, 0), 0, 10, 8, 0, 1, workers))
        assert len(streamed.broken) == 3
        for one, other in zip(batches, micro_batches(held, Order(80, 16, 0), 0, 10, 8, 0, 1, 0), strict=True):
            assert torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])
    names = [file.name for file in held.source.files]
    last = max(place for place, file in enumerate(held.source.files) if file.parent.name == "dog")
    assert names[last] == "9.png"
    first = names.index("0.png", 40)
    assert np.array_equal(held.pixels[last], held.pixels[first]), "after the last comes the first"


@pytest.mark.parametrize("held", [True, False])
def test_too_many_broken_images_are_refused(some_broken, held):
    images = Images(str(some_broken), 16, data=DataSection(broken_share=0.02))
    with pytest.raises(CheckpointError, match=r"3 of 80 images cannot be read, more than data.broken_share=0.02"):
        if held:
            images.hold()
        else:
            list(micro_batches(images, Order(80, 16, 0), 0, 10, 8, 0, 1, 0))


def test_a_class_of_broken_images_is_refused_by_name(tmp_path):
    cats_and_dogs(tmp_path, "cat", count=60)
    fill(tmp_path / "dog", 2)
    for number in range(2):
        (tmp_path / f"dog/{number}.png").write_bytes(b"x")
    images = Images(str(tmp_path), 16)
    with pytest.raises(CheckpointError, match=r"no image of class dog can be read: .*dog/0.png: the bytes are not"):
        images.hold()
    with pytest.raises(CheckpointError, match="no image of class dog can be read"):
        Images(str(tmp_path), 16)[60]


def test_a_set_that_is_not_held_is_looked_at_first(tmp_path):
    fill(tmp_path, 40)
    for number in range(0, 40, 2):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"of 36 checked images cannot be read, far more than data"):
        loaded(tmp_path, "data.memory_gb=0")


# Held-out images.


def test_a_share_is_held_out_of_each_class(tmp_path):
    cats_and_dogs(tmp_path, "cat", count=30)
    fill(tmp_path / "dog", 10)
    fill(tmp_path / "rare", 1)
    training, held = hold_out_of_classes(Images(str(tmp_path), 16), 0.2)
    assert np.bincount(held.labels).tolist() == [6, 2]
    assert np.bincount(training.labels).tolist() == [24, 8, 1]
    assert not {*training.indices} & {*held.indices}
    training, held = hold_out_of_classes(Images(str(tmp_path), 16), 1.0)
    assert np.bincount(training.labels).tolist() == [1, 1, 1]


def test_the_default_share_depends_on_the_size(tmp_path, image_folder):
    fill(tmp_path, 150)
    assert len(split(Images(str(tmp_path), 16))[1]) == 15
    (imagenet,) = {len(split(Images(str(image_folder), 16))[1])}
    assert imagenet == 3, "of fewer than a hundred there is no hundredth"
    both = split(Images(str(tmp_path), 16, data=DataSection(validation_share=0.5)))
    assert [len(part) for part in both] == [75, 75]


def test_labelled_by_imagenet_every_hundredth_image_is_held_out(tmp_path):
    fill(tmp_path / "207", 250)
    _, held = split(Images(str(tmp_path), 16))
    assert held.indices.tolist() == [99, 199], "as runs of earlier versions did, which resume"


def test_held_out_images_without_broken_ones(some_broken, tmp_path):
    _, held = loaded(some_broken, f"data.validation={some_broken}")
    assert len(held) == 77 and not {*held.indices.tolist()} & {*held.broken}
    fill(tmp_path / "one/cat", 1)
    with pytest.raises(CheckpointError, match="must have 2 images or more that can be read, got 1"):
        loaded(some_broken, f"data.validation={tmp_path}/one")


# As a user sees it.


def test_a_refusal_is_one_line_on_the_command_line(tmp_path):
    arguments = train_arguments(tmp_path, "data.classes=[]", f"run.dir={tmp_path}/run", "optim.steps=1")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.gif").write_bytes(b"GIF89a")
    command = [sys.executable, "-m", "training", str(DEMO), *arguments, f"data.path={tmp_path}/images"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("dsd-train: ") and line.endswith("of other formats there are 1 .gif")


def test_a_parquet_that_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """ImageNet's parquet files would be 140 GB in each of eight processes."""
    write_parquet(tmp_path, metadata=class_label("cat", "dog"), image=ROWS * 50, label=[0, 1, 1, 0] * 50)
    needed = columns.image_bytes(tmp_path / "train.parquet", "image")
    assert needed > 0
    monkeypatch.setattr(columns, "available_bytes", lambda: 7 * needed)
    assert len(Images(str(tmp_path), 16)) == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(CheckpointError, match=r"in each of 8 processes, .* free: give data.path=hf:/.*, whose") as told:
        Images(str(tmp_path), 16)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (path,) = re.findall("data.path=(.*), whose", str(told.value))
    assert len(Images(path, 16)) == 200, "the fix works"


def test_pixels_of_a_parquet_are_those_of_the_file(tmp_path):
    pixels = [sample_image(label, 0) for label in range(4)]
    write_parquet(tmp_path, image=[write_image(one) for one in pixels], label=["b", "a", "b", "a"])
    images = Images(str(tmp_path), 24)
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert all(np.array_equal(images[i][0].numpy(), pixels[i]) for i in range(4))
