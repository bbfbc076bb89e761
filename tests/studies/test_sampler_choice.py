"""A short sampler study on a real model; the long one is `make samplers`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dsd_serve.engines import load_engine
from dsd_serve.programs import generate, run
from studies import sampler_settings
from studies.sampler_choice import latent_psnr, main, program, split
from studies.sampler_rule import above, mean_and_error, recommend
from studies.sampler_settings import SEEDS, Setting, settings_of, shifted

SAMPLERS = ("euler", "heun", "dpmpp_2m")
DEFAULTS = {"sampler": "heun", "num_steps": 25, "guidance_scale": 3.0}


def test_samplers_are_compared_at_equal_cost():
    for evaluations in sampler_settings.EVALUATIONS:
        costs = {Setting(sampler, evaluations, 3.0).rows for sampler in SAMPLERS}
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
    parts = settings_of(DEFAULTS, SAMPLERS)
    assert parts["default"] == [Setting("heun", 49, 3.0)]
    keys = [setting.key for part in parts.values() for setting in part]
    assert len(set(keys)) == len({setting for part in parts.values() for setting in part})


def test_few_steps_are_measured_for_all_samplers_that_can_take_them():
    few = settings_of(DEFAULTS, SAMPLERS)["few"]
    counts = {s: sorted({x.evaluations for x in few if x.sampler == s}) for s in SAMPLERS}
    assert counts["euler"] == counts["dpmpp_2m"] == [1, 2, 3, 4, 5, 6, 8, 9]
    assert counts["heun"] == [3, 5, 9], "heun evaluates an odd number of times"
    assert {setting.guidance_scale for setting in few} == {1.0, 3.0}
    assert all(s.sampler == "euler" for s in settings_of(DEFAULTS, ["euler"])["few"]), "a model may have fewer samplers"


def test_a_model_that_has_learnt_its_guidance_is_studied_without_more_of_it():
    parts = settings_of({"sampler": "flow_map", "num_steps": 2, "guidance_scale": 1.0}, (*SAMPLERS, "flow_map"))
    assert parts["default"] == [Setting("flow_map", 2, 1.0)]
    assert {s.guidance_scale for part in ("few", "samplers", "shift") for s in parts[part]} == {1.0}
    assert {s.rows for s in parts["few"] if s.sampler == "flow_map"} == {1, 2, 3, 4, 5, 6, 8, 9}
    assert [s.rows for s in parts["guidance"]] == [2, 4, 4, 4]
    assert not parts["interval"]
    assert {(s.evaluations, s.shift) for s in parts["shift"]} == {(n, s) for n in (2, 3, 4) for s in (0.5, 1, 2)}


def test_a_setting_draws_what_generate_draws(tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    setting = Setting("dpmpp_2m", 5, 2.0, 0.1, 0.8)
    z, pixels = run(engine, program(engine.config, 207, 3, 0, setting))
    assert np.array_equal(pixels, run(engine, generate(engine.config, 207, setting.params(3))))
    assert z.shape == engine.config.latent_shape


def test_latent_psnr_of_a_known_error():
    z = np.ones((2, 3, 4))
    assert latent_psnr(z + 0.1, z) == pytest.approx(20)
    assert latent_psnr(z, z) == 120


def test_a_difference_counts_when_it_exceeds_two_standard_errors():
    seeds = [50.0, 60.0, 40.0, 55.0, 45.0]  # they differ more from each other than any two settings
    assert mean_and_error(seeds) == (50.0, pytest.approx(np.sqrt(250 / 4 / 5)))
    assert above([x + 1 for x in seeds], seeds), "the same difference for every seed"
    assert not above(seeds, seeds)
    assert not above(seeds, [x + 1 for x in seeds])
    noise = [2.0, -1.0, 1.0, -1.0, 0.5]  # mean 0.3, standard error 0.58
    assert not above([x + e for x, e in zip(seeds, noise, strict=True)], seeds)
    assert above([x + e + 1 for x, e in zip(seeds, noise, strict=True)], seeds)


def test_the_cheapest_good_setting_is_recommended():
    noise = (0.0, 2.0, -2.0, 1.0, -1.0)  # of the seeds, which all settings share

    def result(rows, distance, accuracy, *, shift=1.0, start=0.0, own=(0.0, 0.0, 0.0, 0.0, 0.0)):
        distances = [distance + a + b for a, b in zip(noise, own, strict=True)]
        accuracies = [accuracy + a / 100 for a in noise]
        return {
            "rows": rows,
            "frechet_lite0": float(np.mean(distances)),
            "top1_lite0": accuracy,
            "shift": shift,
            "guidance_start": start,
            "guidance_stop": 1.0,
            "of_seeds": {"frechet_lite0": distances, "top1_lite0": accuracies},
        }

    results = [
        result(100, 50.0, 0.80),  # the best
        result(20, 51.0, 0.80),
        result(12, 53.0, 0.80),  # too far: the limit is 52
        result(10, 50.5, 0.50),  # misses the class
        result(5, 60.0, 0.90),
        result(1, 40.0, 0.90, shift=2.0),  # no model directory can recommend it
    ]
    assert recommend(results, 10.0)["rows"] == 20
    assert recommend(results, 49.5)["rows"] == 100, "near the floor small differences count"
    uncertain = result(15, 53.0, 0.80, own=(3.0, -3.0, 2.0, -2.0, 0.0))
    assert recommend([*results, uncertain], 10.0)["rows"] == 15, "it may be as near as the limit"
    assert recommend([*results, result(2, 40.0, 0.90, start=0.2)], 10.0)["rows"] == 2, "guidance within an interval"
    assert recommend([result(8, 5.0, 0.8), result(4, 6.0, 0.8)], 10.0)["rows"] == 4, "below the floor all are good"


def test_real_images_are_split_into_disjoint_sets_of_all_classes():
    labels = np.repeat([1, 207, 950], 50)
    sets = split(labels, 30)
    assert len(sets) == len(SEEDS)
    assert len(np.unique(np.concatenate(sets))) == 150
    assert all(np.bincount(labels[one])[[1, 207, 950]].tolist() == [10, 10, 10] for one in sets)
    assert [len(one) for one in split(labels, 60)] == [60, 60], "there are no more"
    assert [len(one) for one in split(labels, 200)] == [150]


@pytest.fixture
def small_study(monkeypatch):
    for name, value in {"EVALUATIONS": (3, 25), "FEW": (2, 3), "SHIFTS": (2.0,), "GUIDANCE": (1.0,)}.items():
        monkeypatch.setattr(sampler_settings, name, value)
    monkeypatch.setattr(sampler_settings, "INTERVALS", ((0.0, 0.5),))
    monkeypatch.setattr(sampler_settings, "ENOUGH", 7)
    monkeypatch.setattr(sampler_settings, "REFERENCE_STEPS", 40)


@pytest.mark.slow
def test_a_stopped_study_resumes_and_writes_its_page(small_study, tiny_dir, image_folder, tmp_path):
    output, images = tmp_path / "docs", str(image_folder)
    common = [str(tiny_dir), "--real", images, "--reference", images, "-o", str(output)]
    common += ["--samples", "15", "--compared", "3", "--cache", str(tmp_path / "cache")]
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
    assert values["conditions"]["real"]["images"] == 3
    assert all(len(of) == 5 for result in values["results"].values() for of in result["of_seeds"].values())
    assert {path.name for path in output.iterdir()} == {"samplers.json", "samplers.md", "samplers.png"}
    assert Image.open(output / "samplers.png").size[0] > 800
    page = (output / "samplers.md").read_text()
    assert "## Recommended" in page
    assert "## Few steps" in page
    assert "Unfinished" not in page
    assert "±" in page
    assert page.count("| heun |") > 8
    with pytest.raises(SystemExit, match="settings are left"):
        main([*common, "--samples", "20", "--minutes", "0.001"])
    other = json.loads(file.read_text())
    assert other["conditions"]["samples"] == 20
    assert len(other["results"]) == 1, "other counts are another study"


@pytest.mark.slow
def test_what_the_model_recommends_may_change_within_a_study(small_study, tiny_dir, image_folder, tmp_path):
    output, images, model = tmp_path / "docs", str(image_folder), tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    common = [str(model), "--real", images, "--reference", images, "-o", str(output)]
    common += ["--samples", "15", "--compared", "3", "--cache", str(tmp_path / "cache")]
    main(common)
    before = json.loads((output / "samplers.json").read_text())
    config = json.loads((model / "config.json").read_text())
    config["sampling"]["num_steps"] = 3
    (model / "config.json").write_text(json.dumps(config))
    main(common)
    after = json.loads((output / "samplers.json").read_text())
    assert after["model"]["defaults"]["num_steps"] == 3
    assert {key: after["results"][key] for key in before["results"]} == before["results"], "nothing is drawn again"


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (["--samples", "12"], "--samples must be a multiple of 5 and at least 10, .*, got 12"),
        (["--samples", "5"], "--samples must be a multiple of 5 and at least 10, .*, got 5"),
        (["--samples", "20", "--compared", "5"], "--compared must be at most the samples of one seed, 4, got 5"),
    ],
)
def test_wrong_counts_get_a_sentence(counts, sentence, tiny_dir, image_folder, tmp_path):
    images = str(image_folder)
    with pytest.raises(SystemExit, match=sentence):
        main([str(tiny_dir), "--real", images, "--reference", images, "-o", str(tmp_path), *counts])


def test_a_class_without_images_gets_a_sentence(demo_dir, image_folder, tmp_path):
    images = str(image_folder)
    with pytest.raises(SystemExit, match="no images of class 107"):
        main([str(demo_dir), "--real", images, "--reference", images, "-o", str(tmp_path)])
