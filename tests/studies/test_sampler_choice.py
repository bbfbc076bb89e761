"""A short sampler study on a real model; the long one is `make samplers`."""

import json

import numpy as np
import pytest
from PIL import Image

from dsd_serve.engines import load_engine
from dsd_serve.programs import generate, run
from studies import sampler_settings
from studies.sampler_choice import latent_psnr, main, program, recommend
from studies.sampler_settings import Setting, settings_of, shifted

DEFAULTS = {"sampler": "heun", "num_steps": 25, "guidance_scale": 3.0}


def test_samplers_are_compared_at_equal_cost():
    for evaluations in sampler_settings.EVALUATIONS:
        costs = {Setting(sampler, evaluations, 3.0).rows for sampler in ("euler", "heun", "dpmpp_2m")}
        assert costs == {2 * evaluations}
    assert Setting("heun", 19, 1.0).rows == 19
    assert Setting("euler", 4, 3.0, 0.5, 1.0).rows == 6, "a step without guidance costs one row"
    assert Setting("euler", 4, 3.0).reference.num_steps == 500


def test_the_shift_keeps_the_ends_and_moves_steps_towards_noise():
    assert [shifted(t, 1.0) for t in (0.0, 0.3, 1.0)] == [0.0, pytest.approx(0.3), 1.0]
    assert [shifted(t, 3.0) for t in (0.0, 1.0)] == [0.0, 1.0]
    noise = 3 * 0.5 / (1 + 2 * 0.5)  # of Stable Diffusion 3, for noise level 0.5
    assert 1 - shifted(0.5, 3.0) == pytest.approx(noise)


def test_the_study_has_the_default_and_measures_nothing_twice():
    parts = settings_of(DEFAULTS)
    assert parts["default"] == [Setting("heun", 49, 3.0)]
    keys = [setting.key for part in parts.values() for setting in part]
    assert len(set(keys)) == len({setting for part in parts.values() for setting in part})


def test_a_setting_draws_what_generate_draws(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    setting = Setting("dpmpp_2m", 5, 2.0, 0.1, 0.8)
    z, pixels = run(engine, program(engine.config, 207, 0, setting))
    assert np.array_equal(pixels, run(engine, generate(engine.config, 207, setting.params)))
    assert z.shape == engine.config.latent_shape


def test_latent_psnr_of_a_known_error():
    z = np.ones((2, 3, 4))
    assert latent_psnr(z + 0.1, z) == pytest.approx(20)
    assert latent_psnr(z, z) == 120


def test_the_cheapest_good_setting_is_recommended():
    def result(rows, distance, accuracy, shift=1.0):
        return {"rows": rows, "frechet_lite0": distance, "top1_lite0": accuracy, "shift": shift}

    results = {
        "best": result(100, 50.0, 0.80),
        "cheap": result(20, 51.0, 0.79),
        "misses the class": result(10, 50.5, 0.5),
        "far": result(5, 60.0, 0.9),
        "shifted": result(1, 40.0, 0.9, shift=2.0),
    }
    assert recommend(results, 500, 10.0)["rows"] == 20
    assert recommend(results, 500, 49.5)["rows"] == 100, "near the floor small differences count"


@pytest.fixture
def small_study(monkeypatch):
    for name, value in {"EVALUATIONS": (3, 25), "SHIFTS": (2.0,), "GUIDANCE": (1.0,)}.items():
        monkeypatch.setattr(sampler_settings, name, value)
    monkeypatch.setattr(sampler_settings, "INTERVALS", ((0.0, 0.5),))
    monkeypatch.setattr(sampler_settings, "MANY", 7)
    monkeypatch.setattr(sampler_settings, "REFERENCE_STEPS", 40)


@pytest.mark.slow
def test_a_stopped_study_resumes_and_writes_its_page(small_study, tiny_dir, image_folder, tmp_path):
    output, images = tmp_path / "docs", str(image_folder)
    common = [str(tiny_dir), "--real", images, "--reference", images, "-o", str(output)]
    common += ["--samples", "6", "--compared", "3", "--cache", str(tmp_path / "cache")]
    file = output / "samplers.json"
    with pytest.raises(SystemExit, match="settings are left"):
        main([*common, "--minutes", "0.01"])
    begun = json.loads(file.read_text())["results"]
    assert "**Unfinished**" in (output / "samplers.md").read_text()
    main(common)
    values = json.loads(file.read_text())
    assert len(values["results"]) > len(begun) > 0
    assert all(values["results"][key] == result for key, result in begun.items()), "what was there was kept"
    few, many = (values["results"][f"heun {n} shift 1 guidance 1 0-1"]["latent_psnr"] for n in (3, 25))
    assert many > few + 6, "more steps come nearer to the reference"
    assert values["conditions"]["real"]["pictures"] == 6
    assert {path.name for path in output.iterdir()} == {"samplers.json", "samplers.md", "samplers.png"}
    assert Image.open(output / "samplers.png").size[0] > 800
    page = (output / "samplers.md").read_text()
    assert "## Recommended" in page
    assert "Unfinished" not in page
    assert page.count("| heun |") > 8
    with pytest.raises(SystemExit, match="settings are left"):
        main([*common, "--samples", "7", "--minutes", "0.001"])
    other = json.loads(file.read_text())
    assert other["conditions"]["samples"] == 7
    assert len(other["results"]) == 1, "other counts are another study"


def test_wrong_counts_get_a_sentence(tiny_dir, image_folder, tmp_path):
    images = str(image_folder)
    common = [str(tiny_dir), "--real", images, "--reference", images, "-o", str(tmp_path)]
    with pytest.raises(SystemExit, match="--compared must be at most --samples, got 9 and 4"):
        main([*common, "--samples", "4", "--compared", "9"])


def test_a_class_without_images_gets_a_sentence(demo_dir, image_folder, tmp_path):
    images = str(image_folder)
    with pytest.raises(SystemExit, match="no images of class 107"):
        main([str(demo_dir), "--real", images, "--reference", images, "-o", str(tmp_path)])
