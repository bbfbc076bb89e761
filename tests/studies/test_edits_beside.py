"""The figure of edits by two models."""

import pytest
from PIL import Image

from dsd_serve.imaging import codec
from studies.edits_beside import main
from tests.support.data import sample_image


def test_the_figure_shows_both_models(flow_map_dir, tmp_path):
    photo, figure = tmp_path / "photo.png", tmp_path / "beside.png"
    codec.to_pil(sample_image(1, 0)).save(photo)
    models = [str(flow_map_dir)] * 2
    main([*models, str(photo), "--class", "0", "--walk", "0", "2", "-o", str(figure)])
    assert Image.open(figure).size[0] > 800


def test_a_model_that_is_not_there_is_named(tiny_dir, tmp_path):
    with pytest.raises(SystemExit, match=r"edits_beside: .*nowhere"):
        main([str(tiny_dir), str(tmp_path / "nowhere"), str(tmp_path / "photo.png")])
