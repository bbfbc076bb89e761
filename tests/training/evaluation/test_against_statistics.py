"""dsd-eval --statistics: one number for the same samples in every form, and notes on what spoils a comparison."""

import json

import numpy as np
import pytest

from dsd_serve.imaging import codec
from tests.support.data import CLASSES, sample_image
from tests.support.inception_double import InceptionDouble
from training.evaluation import against_statistics
from training.evaluation.distances import frechet, moments
from training.evaluation.main import main

COUNT = 90
PIXELS = np.stack([sample_image(CLASSES[i % 3], i) for i in range(COUNT)])
LABELS = np.array([CLASSES[i % 3] for i in range(COUNT)])


def nhwc(pixels):
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples as .npz file and as folder, a reference batch, and statistics of it as ADM and as JiT write them."""
    folder = tmp_path_factory.mktemp("fid")
    np.savez(folder / "samples.npz", arr_0=nhwc(PIXELS), arr_1=LABELS)
    for i in range(COUNT):
        file = folder / f"samples/{LABELS[i]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(codec.write_image(PIXELS[i]))
    real = np.stack([sample_image(CLASSES[i % 3], 1000 + i) for i in range(70)])
    np.savez(folder / "batch.npz", arr_0=nhwc(real))
    pool, spatial, _ = InceptionDouble(folder)(list(real))
    both = [moments(side) for side in (pool, spatial)]
    np.savez(folder / "jit.npz", mu=both[0].mean, sigma=both[0].covariance)
    spatial_arrays = {"mu_s": both[1].mean, "sigma_s": both[1].covariance}
    np.savez(folder / "adm.npz", arr_0=nhwc(real), mu=both[0].mean, sigma=both[0].covariance, **spatial_arrays)
    (folder / "weights.pth").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(against_statistics, "InceptionNetwork", InceptionDouble)


def sheet_of(folder, tmp_path, *arguments):
    places = [str(argument).format(folder=folder) for argument in arguments]
    main([*places, "--inception", str(folder / "weights.pth"), "--output", str(tmp_path / "sheet.json")])
    return json.loads((tmp_path / "sheet.json").read_text())


def test_samples_give_the_same_numbers_in_every_form(folder, tmp_path, capsys):
    sheets = [
        sheet_of(folder, tmp_path, "--samples", f"{{folder}}/{form}", "--statistics", "{folder}/adm.npz")
        for form in ("samples.npz", "samples")
    ]
    for key in ("fid", "sfid", "inception_score", "inception_score_std"):
        assert sheets[0][key] == sheets[1][key] > 0 or key == "inception_score_std"
    with np.load(folder / "adm.npz") as real:
        pool, _, _ = InceptionDouble(folder)(list(PIXELS))
        whole = frechet(moments(pool), type(moments(pool))(real["mu"], real["sigma"]))
    assert sheets[0]["fid"] == pytest.approx(whole, rel=1e-5)
    assert sheets[0]["samples"]["classes"] == {"classes": 3, "fewest": 30, "most": 30, "unlabelled": 0}
    assert sheets[1]["samples"]["formats"] == {"png": COUNT}
    shown = capsys.readouterr().out
    assert "FID " in shown and "sFID" in shown
    assert "90 samples of samples.npz, 24 x 24 pixels, 3 classes of 30 each" in shown


def test_statistics_are_those_of_a_batch_of_images(folder, tmp_path):
    sheets = {
        name: sheet_of(folder, tmp_path, "--samples", "{folder}/samples.npz", "--statistics", f"{{folder}}/{name}.npz")
        for name in ("adm", "jit", "batch")
    }
    assert sheets["adm"]["fid"] == sheets["jit"]["fid"] == pytest.approx(sheets["batch"]["fid"], rel=1e-5)
    assert sheets["jit"]["sfid"] is None
    assert sheets["adm"]["sfid"] == pytest.approx(sheets["batch"]["sfid"], rel=1e-5)
    assert sheets["batch"]["statistics"]["computed_here"] and not sheets["adm"]["statistics"]["computed_here"]


def test_samples_of_their_own_statistics_are_at_distance_zero(folder, tmp_path):
    same = sheet_of(folder, tmp_path, "--samples", "{folder}/samples.npz", "--statistics", "{folder}/samples.npz")
    assert same["fid"] == pytest.approx(0, abs=1e-5)


def test_samples_that_a_model_draws(folder, tmp_path, tiny_dir, capsys):
    arguments = [tiny_dir, "--samples", 20, "--steps", 2, "--statistics", "{folder}/jit.npz"]
    drawn = sheet_of(folder, tmp_path, *arguments)
    assert drawn["samples"]["classes"] == {"classes": 3, "fewest": 6, "most": 7, "unlabelled": 0}
    assert drawn["samples"]["sampling"]["num_steps"] == 2 and drawn["samples"]["fingerprint"]
    assert drawn["fid"] == sheet_of(folder, tmp_path, *arguments)["fid"]
    assert "20 samples of tiny" in capsys.readouterr().out


def notes(sheet):
    return " ".join(sheet["warnings"])


def test_what_spoils_a_comparison_is_noted(folder, tmp_path):
    good = sheet_of(folder, tmp_path, "--samples", "{folder}/samples", "--statistics", "{folder}/adm.npz")
    assert notes(good).startswith("90 samples: the FID of fewer than 50,000 is biased upwards")
    assert len(good["warnings"]) == 1
    mixed = tmp_path / "mixed"
    for number, (label, size) in enumerate(((1, 16), (1, 32), (207, 16), (207, 16), (1, 16))):
        (mixed / str(label)).mkdir(parents=True, exist_ok=True)
        (mixed / f"{label}/{number}.jpg").write_bytes(codec.write_image(sample_image(label, number, size), "jpeg"))
    arguments = ["--samples", mixed, "--statistics", "{folder}/adm.npz"]
    with pytest.raises(SystemExit, match="several sizes, as 16 x 16 and 32 x 32 pixels; --size S resizes them"):
        sheet_of(folder, tmp_path, *arguments)
    resized = sheet_of(folder, tmp_path, *arguments, "--size", 16)
    assert resized["samples"]["sizes"] == ["16 x 16", "32 x 32"]
    for words in (
        "full rank",
        "resized to 16 x 16 as ADM does, by Pillow",
        "JPEG or WebP",
        "not balanced: 2 to 3 samples each of 2",
    ):
        assert words in notes(resized)
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    small = sheet_of(folder, tmp_path, "--samples", tmp_path / "small.npz", "--statistics", "{folder}/adm.npz")
    assert "16 x 16 pixels, and the images of the statistics 24 x 24" in notes(small)
    assert "the classes of the samples are not known" in notes(small)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--samples", "{folder}/samples", "--statistics", "{folder}/none.npz"], "there is no file"),
        (["--samples", "{folder}/none", "--statistics", "{folder}/adm.npz"], "there is no "),
        (["--statistics", "{folder}/adm.npz"], "--statistics needs samples"),
        (
            ["dsd_serve/demo", "--samples", "{folder}/samples", "--statistics", "{folder}/adm.npz"],
            "needs samples: either",
        ),
        (["--samples", "{folder}/samples", "--statistics", "{folder}/adm.npz", "--real", "x"], "--real compares"),
        (["--samples", "{folder}/samples"], "samples from files need --statistics"),
        ([], "give real images by --real, or published statistics by --statistics"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence, folder, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        sheet_of(folder, tmp_path, *arguments)
