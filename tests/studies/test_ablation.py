"""The ablation runs and resumes, training speed is measured, and committed pages are current."""

import json

import pytest

from benchmarks import training_speed
from studies.ablation import COLUMNS, VARIANTS, main, table
from tests.support.data import ROOT, TINY
from training.estimate import flops_per_image


@pytest.mark.slow
def test_the_ablation_changes_switches_and_repeats_nothing(image_folder, tmp_path, capsys):
    short = [*TINY, "data.classes=[1, 207, 950]", "optim.steps=4", "optim.batch_size=4", "optim.micro_batch_size=4"]
    short += [
        "optim.warmup_steps=0",
        "optim.lr=0.01",
        "run.log_every=1",
        "run.eval_images=4",
        f"data.validation={image_folder}",
        "run.device=cpu",
    ]

    def run(*variants):
        main([*short, "--data", str(image_folder), "--output", str(tmp_path), "--variants", *variants])
        return json.loads((tmp_path / "ablation.json").read_text())

    first = run("base", "base, seed 1", "Muon")
    assert list(first) == ["base", "base, seed 1", "Muon"]
    assert first["Muon"]["switches"] == ["optim.name=muon"]
    assert first["base"]["psnr"] != first["Muon"]["psnr"] != first["base, seed 1"]["psnr"]
    assert all(set(COLUMNS) < set(run) for run in first.values())
    assert first["Muon"]["cost"] == 1
    again = run("base", "1 noise draw")
    assert again["base"] == first["base"], "not repeated"
    assert 0.6 < again["1 noise draw"]["cost"] < 0.9
    assert list(again) == ["base", "base, seed 1", "1 noise draw", "Muon"], "in the order of the table"
    assert "| Muon |" in (tmp_path / "ablation.md").read_text()
    with pytest.raises(SystemExit, match="--variants must be of base"):
        run("no such")


def test_only_what_lies_outside_the_seeds_of_the_base_is_marked():
    def row(value):
        return dict.fromkeys(COLUMNS, value)

    lines = table({"base": row(1.0), "base, seed 1": row(2.0), "Muon": row(1.5), "1 noise draw": row(2.5)}).splitlines()
    assert "+" not in lines[2] + lines[3] + lines[4] and "-" not in lines[4].replace("| -", "")
    assert lines[5].count(" +") == len(COLUMNS) - 1, "cost is not marked"


def test_speed_is_a_share_of_the_matrix_product_rate(train_config, monkeypatch):
    monkeypatch.setattr(training_speed, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(training_speed, "SIDE", 64)
    config = train_config()
    where = training_speed.choose_device(config, config.network_config())
    rates = {"fp32": 1e12, "bf16": 1e12}
    assert training_speed.matmul_rate(where, training_speed.torch.float32) > 1e6
    row = training_speed.time_case(where, config, rates)
    flops = flops_per_image(config.network_config(), config.loss)
    assert row["tflops"] >= row["images_per_second"] * flops / 1e12 > 0
    assert row["share_of_matmul"] == pytest.approx(row["tflops"])


def test_the_committed_page_is_of_these_variants():
    results = json.loads((ROOT / "studies/results/ablation.json").read_text())
    assert list(results) == [name for name in VARIANTS if name in results]
    assert sum(name.startswith("base") for name in results) >= 2 and len(results) >= 6
    for name, row in results.items():
        assert row["switches"] == list(VARIANTS[name]) and row["overrides"] == []
    assert table(results) in (ROOT / "docs/ablation.md").read_text()
