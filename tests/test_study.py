"""The collapse study runs, and its result is the one that the README tells; the long one is `make study`."""

import json

from PIL import Image

from tests.conftest import ROOT, train_arguments
from training.study import main


def test_the_study_writes_a_picture_and_numbers(picture_folder, tmp_path, capsys):
    short = [o for o in train_arguments(picture_folder) if not o.startswith(("data.path", "data.validation"))]
    validation = f"data.validation={picture_folder}"
    arguments = ["--data", str(picture_folder), "--output", str(tmp_path), *short, validation, "optim.steps=4"]
    main([*arguments, "run.eval_every=2", "run.samples_per_class=0"])
    results = json.loads((tmp_path / "collapse.json").read_text())
    assert list(results) == ["naive", "stop_gradient", "dsd"]
    for result in results.values():
        assert result["steps"] == [0, 2, 4]
        assert len(result["effective_rank"]) == len(result["psnr"]) == 3
    first = {name: [result[key][0] for key in ("effective_rank", "psnr")] for name, result in results.items()}
    assert first["naive"] == first["stop_gradient"] == first["dsd"], "all start from the same network"
    assert Image.open(tmp_path / "collapse.png").size[0] > 800
    assert "| dsd |" in capsys.readouterr().out


def test_the_committed_study_shows_the_collapse():
    results = json.loads((ROOT / "docs/collapse.json").read_text())
    last = {name: (result["effective_rank"][-1], result["psnr"][-1]) for name, result in results.items()}
    assert last["dsd"][0] >= 2 * last["naive"][0]
    assert last["dsd"][1] >= last["naive"][1] + 4
