import json

import numpy as np
import pytest
from PIL import Image

from dsd_serve.files import demo_model
from studies.nearest import feature_distances, main, nearest, pixel_distances


def test_distances():
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    distances = pixel_distances(images, images)
    assert np.abs(distances.diagonal()).max() < 0.1
    difference = images[0].astype(float) - images[1].astype(float)
    assert distances[0, 1] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    features = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], np.float32)
    assert feature_distances(features, features) == pytest.approx(
        np.array([[0, 1, 1 - 0.5**0.5], [1, 0, 1 - 0.5**0.5], [1 - 0.5**0.5, 1 - 0.5**0.5, 0]]), abs=1e-6
    )
    assert nearest(np.array([[3.0, 1.0, 2.0]], np.float32), 2).tolist() == [[1, 2]]


@pytest.mark.slow
def test_the_samples_of_the_demo(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([str(demo_model()), "--data", str(real_data / "tiny-imagenet-200"), "-o", str(tmp_path)])
    numbers = json.loads((tmp_path / "nearest.json").read_text())
    assert numbers["training_images"] == 5000
    assert numbers["samples_features_median"] > 0.9 * numbers["held_out_features_median"], "learnt by heart"
    assert len(numbers["shown"]) == 20
    for one in numbers["shown"]:
        assert [len(one[kind]) for kind in ("features", "pixels")] == [3, 3]
        assert one["features"][0]["distance"] >= numbers["samples_features_least"] - 1e-3
    assert Image.open(tmp_path / "runs/nearest.png").size[0] > 800
    assert Image.open(tmp_path / "nearest.webp").size == (640, 128)
    assert (tmp_path / "nearest.md").read_text().count("Golden Retriever |") == 2
