"""The recipe trials: equal cost, runs that go on, and a table of what was measured."""

import json

import pytest

from studies.recipe import COLUMNS, GROUPS, configure, cost, main, table
from tests.support.data import ROOT, TINY


@pytest.mark.parametrize("group", GROUPS)
def test_variants_of_a_group_cost_the_same_and_none_is_below_two_thousand_steps(group, tmp_path):
    configs = {name: configure(name, 0, "nowhere", tmp_path) for name in group}
    totals = [cost(config) * config.optim.steps for config in configs.values()]
    assert max(totals) / min(totals) == pytest.approx(1, abs=1e-3)
    assert min(config.optim.steps for config in configs.values()) >= 2000


def test_trials_of_removed_switches_stay_in_the_table():
    rows = table({name: dict.fromkeys(COLUMNS, 1) for name in ("base, seed 0", "gone, seed 0", "256 wide, seed 0")})
    losses, networks = rows.split("\n\n")
    assert "| gone, seed 0 |" in losses and "| base, seed 0 |" in losses and "256 wide" not in losses
    assert "| 256 wide, seed 0 |" in networks


def test_the_committed_page_is_of_the_committed_trials():
    results = json.loads((ROOT / "studies/results/recipe.json").read_text())
    assert table(results) in (ROOT / "docs/recipe.md").read_text()


@pytest.mark.slow
def test_trials_are_measured_once_and_written(image_folder, tmp_path, capsys):
    classes = "data.classes=[1, 207, 950]"
    short = [*TINY, classes, "optim.steps=4", "optim.batch_size=4", "optim.micro_batch_size=4", "optim.warmup_steps=0"]
    short += ["run.eval_images=4", "run.compile=off", f"data.validation={image_folder}", "run.device=cpu"]
    places = ["--data", str(image_folder), "--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    main([*places, "--variants", "base", "balanced batches", "--", *short])
    results = json.loads((tmp_path / "recipe.json").read_text())
    assert list(results) == ["balanced batches, seed 0", "base, seed 0"]
    assert all(set(COLUMNS) < set(trial) for trial in results.values())
    capsys.readouterr()
    main([*places, "--variants", "base", "--", *short])
    assert "| base, seed 0 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "recipe.json").read_text()) == results
    with pytest.raises(SystemExit, match="--variants must be of base"):
        main([*places, "--variants", "no such"])
