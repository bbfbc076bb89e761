"""The distillation trials: equal cost, and a table of what was measured."""

import json

import pytest

from studies.distilling import VARIANTS, configure, main
from training.distillation.cost import item_of
from training.distillation.distill_config import TeacherSection
from training.distillation.teacher import read_teacher


def test_variants_cost_the_same(tmp_path):
    teacher = read_teacher("demo", TeacherSection(), "cpu")
    configs = [configure(name, "demo", tmp_path) for name in VARIANTS]
    totals = [item_of(config, teacher).flops * config.optim.steps for config in configs]
    assert max(totals) / min(totals) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_trials_are_measured_once_and_written(image_folder, tmp_path, capsys):
    short = ["optim.steps=2", "optim.batch_size=4", "optim.micro_batch_size=4", "run.compile=off", "run.device=cpu"]
    short += ["run.held_out_seeds=4", "run.samples_per_class=0"]
    places = ["--data", str(image_folder), "--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    command = [*places, "--teacher", "demo", "--samples", "6", "--variants", "base", "no images", "--", *short]
    main(command)
    results = json.loads((tmp_path / "distilling.json").read_text())
    assert list(results) == ["teacher", "base", "no images"]
    assert results["no images"]["steps"] >= results["base"]["steps"]
    assert "| base | 2 |" in capsys.readouterr().out
    main(command)
    assert json.loads((tmp_path / "distilling.json").read_text()) == results
