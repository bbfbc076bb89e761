"""classes.webp: what dsd-export draws, keeps and leaves out, and that a damaged one is refused."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

import dsd_serve
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError
from export.draw_classes import MOST_CANDIDATES, SIZE, draw_classes
from export.main import main


@pytest.fixture
def copied(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "copied")


def tile(sheet, grid, number):
    row, column = divmod(number, grid.columns)
    return sheet.crop((column * SIZE, row * SIZE, (column + 1) * SIZE, (row + 1) * SIZE))


def test_the_grid_holds_images_that_the_model_draws(tiny_dir):
    directory = read_model_dir(tiny_dir)
    grid, sheet = directory.class_images, Image.open(tiny_dir / "classes.webp").convert("RGB")
    assert (grid.columns, grid.per_class) == (4, 4)
    assert sheet.size == (4 * SIZE, 3 * SIZE)
    directory.check([tiny_dir / "classes.webp"])
    with dsd_serve.load(tiny_dir) as model:
        for position, one in enumerate(model.classes):
            drawn = model.generate(one.index, n=MOST_CANDIDATES, seed=0)
            for number in range(grid.per_class):
                pixels = np.asarray(tile(sheet, grid, position * grid.per_class + number), np.int64)
                errors = [np.abs(np.asarray(image.resize((SIZE, SIZE)), np.int64) - pixels).mean() for image in drawn]
                assert min(errors) < 8  # WebP


def test_the_same_weights_give_the_same_file(tiny_dir, tmp_path):
    assert draw_classes(tiny_dir, tmp_path / "again.webp", True) == (4, 4)
    assert (tmp_path / "again.webp").read_bytes() == (tiny_dir / "classes.webp").read_bytes()


def test_it_is_kept_until_weights_or_settings_change(copied):
    file = copied / "classes.webp"
    before, bytes_before = file.stat().st_mtime_ns, file.read_bytes()
    main([str(copied), "--precision", "fp32"])
    assert file.stat().st_mtime_ns == before
    main([str(copied), "--guidance", "5"])
    assert file.read_bytes() != bytes_before
    assert read_model_dir(copied).class_images.made_from["sampling"]["guidance_scale"] == 5
    main([str(copied), "--class-images", "off"])
    assert not file.exists()
    assert read_model_dir(copied).class_images is None


def test_it_is_left_out_where_it_would_take_long(copied, monkeypatch, tmp_path):
    monkeypatch.setattr("export.draw_classes.MOST_SECONDS", 0.0)
    assert draw_classes(copied, tmp_path / "unasked.webp", False) is None
    assert not (tmp_path / "unasked.webp").exists()
    assert draw_classes(copied, tmp_path / "asked.webp", True)


def test_a_damaged_file_is_refused(copied):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "WEBP")
    (copied / "classes.webp").write_bytes(data.getvalue())
    with pytest.raises(CheckpointError, match="is not the file that config"):
        dsd_serve.load(copied)


def test_a_model_without_classes_has_none(plain_dir):
    assert read_model_dir(plain_dir).class_images is None
    assert not (plain_dir / "classes.webp").exists()
