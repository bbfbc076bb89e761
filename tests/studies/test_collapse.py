"""A short collapse study, and the committed results; the long one is `make study`."""

import json

import pytest
from PIL import Image

from studies.collapse import CONFIG, main
from tests.support.data import ROOT, train_arguments
from training.run_config import load_config


@pytest.mark.slow
def test_the_study_writes_a_figure_and_numbers(image_folder, tmp_path, capsys):
    short = [o for o in train_arguments(image_folder) if not o.startswith(("data.path", "data.validation"))]
    validation = f"data.validation={image_folder}"
    flags = ["--data", str(image_folder), "--seeds", "0", "1", "--output", str(tmp_path)]
    arguments = [*flags, *short, validation, "optim.steps=4"]
    main([*arguments, "run.eval_every=2", "run.samples_per_class=0"])
    results = json.loads((tmp_path / "collapse.json").read_text())
    assert list(results) == ["naive", "stop_gradient", "dsd"]
    for runs in results.values():
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(run["steps"] == [0, 2, 4] and len(run["effective_rank"]) == len(run["psnr"]) == 3 for run in runs)
    first = {name: [(run["effective_rank"][0], run["psnr"][0]) for run in runs] for name, runs in results.items()}
    assert first["naive"] == first["stop_gradient"] == first["dsd"], "all start from the same network"
    assert first["dsd"][0] != first["dsd"][1], "each seed has its own"
    assert Image.open(tmp_path / "collapse.png").size[0] > 800
    assert "| dsd |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["collapse", "collapse-again"])
def test_the_committed_studies_show_the_collapse(name):
    results = json.loads((ROOT / f"studies/results/{name}.json").read_text())
    for naive, dsd in zip(results["naive"], results["dsd"], strict=True):
        assert dsd["effective_rank"][-1] >= 2 * naive["effective_rank"][-1]
        assert dsd["psnr"][-1] >= naive["psnr"][-1] + 4


def test_the_studies_differ_in_their_classes_only():
    first, again = (
        load_config(CONFIG.with_name(name), ["run.dir=x"]) for name in ("collapse.toml", "collapse-again.toml")
    )
    assert len(again.data.classes) == 10 and not set(first.data.classes) & set(again.data.classes)
    assert first.model_copy(update={"data": again.data}) == again
    data = first.data.model_copy(update={"classes": again.data.classes})
    assert data == again.data
