"""The report of --dry-run against real runs, and the recipe at its real size."""

import json
import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsd_serve.imaging.codec import write_image
from tests.support.data import CLASSES, ROOT, sample_image
from training import estimate
from training.device import Device
from training.estimate import (
    flops_per_image,
    kept_for_backward,
    measure_speed,
    micro_batches,
    peak_bytes,
    random_batch,
    reset_peak,
    rows_per_image,
    state_bytes,
)
from training.run_config import load_config
from training.state import new_state
from training.step import add_gradient, update
from training.train import main, train

CPU = Device(torch.device("cpu"), bf16=False, compiled=False, plain_attention=True)


@pytest.mark.parametrize(("draws", "rows"), [(1, 4), (3, 6)])
def test_flops_are_those_that_torch_counts(train_config, draws, rows):
    config = train_config(
        f"loss.num_draws={draws}", "model.hidden_size=192", "model.num_heads=3", "model.image_size=64"
    )
    state = new_state(config, CPU.device)
    network = state.ema.config
    with FlopCounterMode(display=False) as counter:
        add_gradient(state, state.objective, config, CPU, random_batch(network, 2, 0), 1.0)
    expected = flops_per_image(network, config.loss, state.objective)
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.03)
    assert rows_per_image(config.loss) == rows


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_holds_as_many_bytes_as_estimated(train_config, name):
    config = train_config(f"optim.name={name}")
    state = new_state(config, CPU.device)
    estimated = state_bytes(state)
    add_gradient(state, state.objective, config, CPU, random_batch(state.ema.config, 2, 0), 1.0)
    gradients = sum(p.grad.nbytes for p in state.objective.parameters())
    update(state, config)
    held = sum(
        value.nbytes
        for optimizer in state.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    assert estimated["gradients"] == gradients
    assert estimated["optimiser"] == held
    assert estimated["EMA copy"] == sum(p.nbytes for p in state.ema.parameters())


def test_neither_compilation_nor_the_first_update_is_timed(train_config, monkeypatch):
    """The first micro-batch compiles the network, which may take minutes; the first update allocates the optimiser."""
    clock, done = [0.0], {"micro": 0, "update": 0}

    def takes(name, first, later):
        def run(*_, **__):
            clock[0] += later if done[name] else first
            done[name] += 1

        return run

    monkeypatch.setattr(estimate, "seconds", lambda where, call: (began := clock[0], call(), clock[0] - began)[2])
    monkeypatch.setattr(estimate, "add_gradient", takes("micro", 100.0, 0.5))
    monkeypatch.setattr(estimate, "update", takes("update", 10.0, 0.25))
    config = train_config()
    state = new_state(config, CPU.device)
    speed = measure_speed(state, micro_batches(state, None, config, CPU), config, CPU, 4)
    assert (speed.micro_seconds, speed.update_seconds) == (0.5, 0.25)
    assert done["micro"] >= 4 and done["update"] >= 3, "compiled micro-batches are fast, so several are timed"


@pytest.mark.slow
def test_memory_kept_grows_with_the_network_and_speed_is_of_real_steps(train_config):
    def kept(*changes):
        config = train_config(*changes)
        state = new_state(config, CPU.device)
        return kept_for_backward(state, micro_batches(state, state.objective, config, CPU))[0]

    def peak(megabytes):
        reset_peak(CPU)
        torch.ones(megabytes * 250_000).sum()
        return peak_bytes(CPU)[0]

    assert peak(300) - peak(1) > 200e6, "an earlier peak does not count"
    assert 0 < kept("loss.num_draws=1") < kept("loss.num_draws=3")
    assert kept("model.depth=2") < 0.7 * kept("model.depth=4")
    config = train_config()
    state = new_state(config, CPU.device)
    before = state.ema.pixel_head.weight.clone()
    speed = measure_speed(state, micro_batches(state, state.objective, config, CPU), config, CPU, 4)
    assert speed.micro_seconds > 0 and speed.update_seconds > 0 and state.step == 3
    assert not torch.equal(before, state.ema.pixel_head.weight)
    assert speed.step_seconds(config.optim) == pytest.approx(2 * speed.micro_seconds + speed.update_seconds)


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = ["model.depth=1", "model.hidden_size=64", "model.num_heads=2"]
    arguments = [*network, "run.compile=off", "run.device=cpu", "data.path=/nowhere", "--dry-run"]
    main([str(ROOT / "training/configs/demo.toml"), *arguments])
    printed = capsys.readouterr().out
    for named in (
        "0.2M parameters",
        "an image: 7 rows of",
        "GFLOP forward",
        "memory held",
        "images/s",
        "the whole run here",
    ):
        assert named in printed
    assert "H100" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_twenty_real_steps_of_dsd_s_at_256_pixels(tmp_path):
    """On generated images, on the CPU: the losses fall and memory stays small. One to five minutes."""
    for label in CLASSES:
        (tmp_path / f"images/{label}").mkdir(parents=True)
        for number in range(12):
            pixels = write_image(sample_image(label, number, size=300))
            (tmp_path / f"images/{label}/{number}.png").write_bytes(pixels)
    overrides = [f"data.path={tmp_path}/images", f"data.validation={tmp_path}/images", f"run.dir={tmp_path}/run"]
    overrides += ["optim.steps=20", "optim.batch_size=2", "optim.micro_batch_size=1", "optim.warmup_steps=5"]
    overrides += ["run.log_every=1", "run.eval_every=1000", "run.eval_images=4", "run.samples_per_class=0"]
    overrides += ["data.num_workers=1", "run.device=cpu", "run.precision=auto"]
    config = load_config(ROOT / "training/configs/dsd-s.toml", overrides)

    def on_the_same_images_and_noise(state):
        batch = random_batch(state.ema.config, 2, 0)
        pixels = torch.stack([torch.from_numpy(sample_image(label, 99, size=256)) for label in CLASSES[:2]])
        with torch.no_grad():
            losses = add_gradient(
                state, state.objective, config, CPU, (*batch[:2], pixels, torch.tensor(CLASSES[:2])), 1.0, False
            )
        return {name: round(float(value), 4) for name, value in losses.items()}

    before = on_the_same_images_and_noise(new_state(config, CPU.device))
    after = on_the_same_images_and_noise(train(config))
    print(before, after, sep="\n")
    assert after["loss"] < before["loss"] and after["reconstruction"] < 0.8 * before["reconstruction"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak {peak / 1e9:.1f} GB, {lines[-2]['images_per_second']:.2f} images/s")
    assert peak < 8e9
