import json
import resource
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dsd_serve.checkpoint import read_checkpoint, read_weights, write_checkpoint
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, ConfigError
from dsd_serve.imaging.codec import fit, write_image
from dsd_serve.network import DSD
from tests.support.data import CLASSES, ROOT, sample_image, train_arguments
from tests.support.runs import assert_same, launch, losses, train_until
from training.dataset import Images, hold_out, load_images
from training.loss import Draws, Objective
from training.monitor import Monitor, latent_metrics
from training.order import Order, micro_batches
from training.run_config import LossSection, MonitorSection, TrainConfig
from training.state import new_state, start_from
from training.step import lr_at
from training.train import main, train

NETWORK = ModelConfig(image_size=16, patch_size=8, latent_dim=8, hidden_size=32, depth=2, num_heads=2)


def test_resuming_is_bit_exact(train_config, tmp_path):
    """Also across a border between epochs, with accumulation, masks and all losses."""
    options = ["loss.mask_probability=0.5", "run.eval_every=3", "run.save_every=2", "run.log_every=1", "optim.lr=0.01"]
    train(train_config("optim.steps=12", f"run.dir={tmp_path}/whole", *options))
    for last in (5, 9, 12):
        stopping_at = f"run.dir={tmp_path}/{'part'}"
        train_until(train_config("optim.steps=12", stopping_at, *options), last)
    assert_same(tmp_path / "whole/checkpoint.pt", tmp_path / "part/checkpoint.pt")
    whole, part = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    )
    losses = {line["step"]: line["loss"] for line in whole if "loss" in line}
    assert losses == {line["step"]: line["loss"] for line in part if "loss" in line}
    assert len(losses) == 12


def test_what_a_crash_left_of_a_line_of_metrics_is_skipped(train_config, tmp_path):
    options = [f"run.dir={tmp_path}", "run.log_every=1"]
    train(train_config("optim.steps=2", *options))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    train(train_config("optim.steps=4", *options))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.fixture
def small_files():
    """Files of this process may have at most 40 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_gets_a_sentence_and_leaves_the_checkpoint(image_folder, tmp_path, small_files):
    command = ["training/configs/demo.toml", *train_arguments(image_folder, "optim.steps=2", f"run.dir={tmp_path}")]
    main(command)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    small_files()
    with pytest.raises(SystemExit, match=r"dsd-train: .* size limit; afterwards the same command resumes"):
        main([*command, "optim.steps=4"])
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_folder_that_cannot_be_written_gets_a_sentence(image_folder, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = train_arguments(image_folder, "optim.steps=2", f"run.dir={tmp_path}/file/run")
    with pytest.raises(
        SystemExit, match=r"dsd-train: .*file.* cannot be written or read: (Not a directory|File exists)"
    ):
        main(["training/configs/demo.toml", *arguments])


def test_sigterm_saves_a_checkpoint_and_exits_with_0(image_folder, tmp_path):
    arguments = train_arguments(image_folder, "optim.steps=100000", f"run.dir={tmp_path}", "run.eval_every=100000")
    command = [sys.executable, "-m", "training", "training/configs/demo.toml", *arguments, "run.log_every=1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.1)
    process.terminate()
    _, output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped after step" in output
    step = read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert step >= 4
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"]


@pytest.mark.thorough
def test_two_processes_compute_the_same_as_one_and_one_resumes_from_them(image_folder, tmp_path):
    """Two gloo processes have the losses of one with the same global batch, up to the order of sums; so does a run that
    two processes start and one finishes."""
    common = train_arguments(image_folder, "optim.steps=40", "run.log_every=1", "run.precision=fp32")
    common += ["run.eval_every=1000", "run.save_every=10"]
    alone = launch(1, common, tmp_path / "alone")
    _, output = alone.communicate(timeout=240)
    assert alone.returncode == 0, output[-2000:]

    pair = launch(2, common, tmp_path / "pair")
    deadline = time.monotonic() + 120
    journal = tmp_path / "pair/metrics.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 8:
        assert pair.poll() is None and time.monotonic() < deadline, pair.stderr.read()
        time.sleep(0.005)
    pair.terminate()  # torchrun forwards it
    _, output = pair.communicate(timeout=60)
    stopped = read_checkpoint(tmp_path / "pair/checkpoint.pt")["step"]
    assert "stopped after step" in output and 7 <= stopped < 40, output[-2000:]

    rest = launch(1, common, tmp_path / "pair")
    _, output = rest.communicate(timeout=240)
    assert rest.returncode == 0 and f"resumes after step {stopped}" in output, output[-2000:]

    one, two = losses(tmp_path / "alone"), losses(tmp_path / "pair")
    assert [line[0] for line in one] == [line[0] for line in two] == list(range(1, 41))
    np.testing.assert_allclose(one, two, rtol=2e-3)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("alone", "pair"))
    for key, value in one["ema"].items():
        torch.testing.assert_close(two["ema"][key], value, atol=5e-4, rtol=1e-3)


@pytest.mark.thorough
def test_processes_that_do_not_share_the_folder_get_a_sentence(image_folder, checkpoint, tmp_path):
    """Like two machines with separate disks, one of which has a checkpoint."""
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "zero/checkpoint.pt").write_bytes(checkpoint.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = train_arguments(image_folder, "optim.steps=30")
    processes = [
        launch(1, arguments, tmp_path / name, RANK=rank, LOCAL_RANK=rank, **group)
        for rank, name in (("0", "zero"), ("1", "one"))
    ]
    for process in processes:
        _, output = process.communicate(timeout=120)
        assert process.returncode == 1, output
        assert "found checkpoints of steps 0 to 20; run.dir must be the same folder" in output


def gradients(objective_name, **changes):
    """Gradient of the denoising loss alone with respect to the encoder's patch embedding, and with z detached."""
    torch.manual_seed(0)
    prediction = "latents" if objective_name == "dsd" else "velocity"
    model = DSD(ModelConfig(**{**NETWORK.to_dict(), "prediction": prediction, "classes": ()}))
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.3)
    config = LossSection(objective=objective_name, **changes)
    objective = Objective(model, config)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    draws = Draws.make(config, 4, NETWORK.latent_shape, torch.Generator().manual_seed(1))
    _, parts = objective(DSD(model.config), images, torch.tensor([1, 2, 3, 4]), draws)
    (gradient,) = torch.autograd.grad(parts["denoise"], model.patch_embed.proj.weight)
    return gradient


@pytest.mark.parametrize("name", ["dsd", "stop_gradient"])
def test_the_target_gets_no_gradient(name):
    """The gradient reaches the encoder through z_t only."""
    assert gradients(name).abs().max() > 0
    assert gradients(name, gradient_through_z_t=False).abs().max() == 0


def test_naive_lets_the_gradient_into_the_target():
    assert gradients("naive", gradient_through_z_t=False).abs().max() > 0


def test_every_loss_can_be_switched_off():
    model = DSD(NETWORK)
    config = LossSection(alignment_weight=0, representation_weight=0, classification_weight=0)
    draws = Draws.make(config, 2, NETWORK.latent_shape, torch.Generator().manual_seed(1))
    total, parts = Objective(model, config)(model, torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]), draws)
    assert set(parts) == {"denoise", "reconstruction"}
    expected = config.denoise_weight * parts["denoise"] + config.reconstruction_weight * parts["reconstruction"]
    torch.testing.assert_close(total, expected)
    _, parts = Objective(model, LossSection())(model, torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]), draws)
    assert set(parts) == {"denoise", "reconstruction", "alignment", "representation", "classification"}


def test_the_distributions_of_draws():
    config = LossSection(num_draws=4, mask_probability=0.5, mask_ratio=0.5)
    draws = Draws.make(config, 2000, (4, 8), torch.Generator().manual_seed(0))
    assert draws.t.max() <= 0.999
    assert abs(torch.logit(draws.t).std() - 1) < 0.05
    assert abs(draws.null.float().mean() - 0.1) < 0.02
    assert abs(draws.mask.float().mean() - 0.25) < 0.03
    assert abs((draws.decode_t == 1).float().mean() - 0.5) < 0.05
    assert draws.decode_t.min() >= 0.7


def test_the_learning_rate_warms_up_and_falls():
    optim = TrainConfig.from_dict({"optim": {"steps": 100, "warmup_steps": 10, "lr": 1.0, "lr_final": 0.1}}).optim
    assert lr_at(0, optim) == 0.1
    assert lr_at(9, optim) == lr_at(10, optim) == 1
    assert all(lr_at(s, optim) > lr_at(s + 1, optim) for s in range(10, 100))
    assert lr_at(100, optim) == pytest.approx(0.1)


# Metrics.


def test_collapse_is_warned_of():
    def warnings(rank, spread, *qualities):
        monitor = Monitor(MonitorSection(), 16)
        return [monitor.warnings({"effective_rank": rank, "image_std": spread, "psnr": q}) for q in qualities][-1]

    assert "effective rank 2.0 of 16, below 4.0" in warnings(2.0, 1.0, 20)[0]
    assert "hardly differ" in warnings(12.0, 0.01, 20)[0]
    assert warnings(12.0, 1.0, 20, 23, 21.5) == []
    assert warnings(12.0, 1.0, 20, 23, 20.5) == ["reconstruction gets worse: 20.5 dB, its best was 23.0 dB"]


def denoised(*pairs, past=(), **thresholds):
    """The sentences about memorisation for evaluations with these PSNRs of (held-out, training) images."""
    monitor = Monitor(MonitorSection(**thresholds), 16, past)
    healthy = {"effective_rank": 12.0, "image_std": 1.0, "psnr": 20.0}
    numbers = [{**healthy, "psnr_0.5": held, "training_psnr_0.5": seen} for held, seen in pairs]
    return [sentence for one in numbers for sentence in monitor.warnings(one)]


def test_memorisation_is_said_once():
    rising, apart = [(18, 18), (19, 19.2), (20, 20.5)], [(19.9, 21), (19.8, 22), (19.6, 23), (19.4, 24), (19.0, 25)]
    assert denoised(*rising) == denoised(*rising, *apart[:2]) == []
    (sentence,) = denoised(*rising, *apart)
    assert sentence.startswith("the network begins to memorise the training images")
    assert "held-out images fell from 20.0 to 19.6 dB over 3 evaluations" in sentence
    assert "training images rose from 20.5 to 23.0 dB" in sentence
    assert denoised(*rising, *apart, overfit_evals=0) == [], "switched off"
    assert denoised(*rising, *apart, overfit_drop=2.0) == [], "it must be more than noise"
    assert len(denoised(*rising, *apart, overfit_evals=5)) == 1
    assert denoised(*rising, (19.9, 21), (19.95, 22), (19.6, 23), (19.5, 24)) == [], "not in a row"
    assert denoised(*rising, (19.9, 20), (19.8, 19), (19.6, 18)) == [], "training images get worse too: not memorised"


def test_a_run_that_resumes_remembers_its_evaluations():
    pairs = [(20, 20), (19.9, 21), (19.8, 22), (19.6, 23)]
    past = [{"step": 1, "loss": 3.0}, *({"psnr": 20, "psnr_0.5": a, "training_psnr_0.5": b} for a, b in pairs[:3])]
    assert len(denoised(pairs[3], past=past)) == 1 and denoised(pairs[3]) == []
    said = {"step": 3, "warning": "the network begins to memorise the training images: ..."}
    assert denoised(pairs[3], past=[*past, said]) == []
    assert Monitor(MonitorSection(), 16, past).best_psnr == 20


def test_an_evaluation_below_a_threshold_warns(train_config, tmp_path):
    """In metrics.jsonl and TensorBoard events, next to the metrics, at every evaluation but the first."""
    train(train_config("optim.steps=4", "run.eval_every=2", "monitor.rank_share=1.0", f"run.dir={tmp_path}"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    warned = [line for line in lines if "warning" in line]
    assert [line["step"] for line in warned] == [2, 4]
    assert all("of 8, below 8.0" in line["warning"] for line in warned)
    assert [line["effective_rank_floor"] for line in lines if "psnr" in line] == [8, 8, 8]
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"the latents collapse" in events.read_bytes() and b"image_std_floor" in events.read_bytes()


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(train_config, tmp_path):
    common = [f"run.dir={tmp_path}", "run.eval_every=1000", "run.save_every=4", "run.log_every=1000"]
    train_until(train_config("optim.steps=100", *common), 5)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = ["optim.lr=1e30", "optim.warmup_steps=0", "run.save_every=1000"]
    with pytest.raises(ConfigError, match=r"not finite at step [67]; .*checkpoint\.pt of step 5 is kept"):
        train(train_config("optim.steps=100", *common, *broken))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert train(train_config("optim.steps=8", *common)).step == 8, "a run resumes from it"


# Data.


def test_a_folder_of_folders(image_folder):
    images = Images(str(image_folder), 16)
    assert len(images) == 36
    assert sorted(set(images.labels.tolist())) == [1, 207, 950]
    lazy, label = images[30]
    images.hold()
    held, _ = images[30]
    assert torch.equal(lazy, held)
    assert lazy.shape == (3, 16, 16)
    assert label == images.labels[30] == 207
    kept, held_out = hold_out(images, share=0.25)
    assert (len(kept), len(held_out)) == (27, 9)


def test_real_parquet_shards(real_data):
    images = Images(str(real_data / "tiny-imagenet-200"), 64, classes=(207,))
    assert len(images) == 500  # validation is not mixed in
    assert images[499][0].shape == (3, 64, 64)


def test_parquet_as_huggingface_writes_it(image_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("train-0.parquet", "train-1.parquet", "validation.parquet"):
        rows = [{"bytes": write_image(sample_image(label, 0)), "path": None} for label in CLASSES]
        pq.write_table(pa.table({"image": rows, "label": list(CLASSES)}), tmp_path / name)
    assert len(Images(str(tmp_path), 16)) == 6
    assert len(Images(str(tmp_path / "validation.parquet"), 16)) == 3


def test_huggingface_datasets(image_folder, tmp_path, monkeypatch):
    """The real library on a local folder, offline."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"bytes": write_image(sample_image(label, 0)), "path": None} for label in CLASSES]
    (tmp_path / "shards").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": rows, "label": list(CLASSES)}), tmp_path / f"shards/{split}-0.parquet")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = Images(f"hf:{tmp_path}/shards:validation", 16, classes=(207,))
    pixels, label = images[0]
    assert (len(images), label) == (1, 207)
    assert np.array_equal(pixels.numpy(), fit(sample_image(207, 0), 16))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Images(f"hf:{tmp_path}/nowhere", 16)


def test_wrong_data_gets_a_sentence(image_folder, tmp_path):
    for path, named in (
        (str(tmp_path / "nowhere"), "there is no"),
        ("", "data.path must be"),
        (str(tmp_path), "holds neither"),
    ):
        with pytest.raises(CheckpointError, match=named):
            Images(path, 16)
    with pytest.raises(CheckpointError, match="no images of class 5"):
        Images(str(image_folder), 16, classes=(1, 5))
    (tmp_path / "207").mkdir()
    (tmp_path / "207/broken.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"broken\.png: the bytes are not a readable image"):
        Images(str(tmp_path), 16).hold()
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(CheckpointError, match=r"x\.parquet is not a parquet file"):
        Images(str(tmp_path), 16)


def test_an_epoch_holds_every_image_once():
    order = Order(30, 7, seed=3)
    seen = np.concatenate([order.indices(step) for step in range(60)])[: 30 * 14]
    for epoch in seen.reshape(14, 30):
        assert sorted(epoch.tolist()) == list(range(30))
    assert not np.array_equal(seen[:30], seen[30:60])
    assert np.array_equal(Order(30, 7, seed=3).indices(20), order.indices(20))


def test_balanced_batches_hold_every_class_as_often_and_repeat_the_rare():
    labels = np.repeat([5, 7, 9], [20, 9, 1])
    order = Order(30, 6, seed=3, labels=labels)
    seen = np.concatenate([order.indices(step) for step in range(20)]).reshape(20, 6)
    for batch in seen:
        assert np.bincount(labels[batch], minlength=10)[[5, 7, 9]].tolist() == [2, 2, 2]
    epoch = seen[:5].ravel()
    assert set(np.flatnonzero(labels == 7)) <= set(epoch), "nine of ten places: each once before any twice"
    assert len({*epoch[labels[epoch] == 5]}) == 10
    assert not np.array_equal(seen[:5], seen[5:10])
    assert np.array_equal(Order(30, 6, seed=3, labels=labels).indices(17), seen[17])


@pytest.mark.parametrize("held", [True, False])
def test_processes_share_a_step_without_overlap(image_folder, held):
    images = Images(str(image_folder), 16)
    if held:
        images.hold()
    whole = list(micro_batches(images, Order(36, 12, 0), 2, 4, 4, rank=0, world=1, num_workers=0))
    parts = []
    for rank in range(3):
        parts += micro_batches(images, Order(36, 12, 0), 2, 4, 4, rank=rank, world=3, num_workers=1)
    assert [key[:2] for key in whole] == sorted(part[:2] for part in parts)
    for step, number, pixels, labels in parts:
        (same,) = [w for w in whole if w[:2] == (step, number)]
        assert torch.equal(same[2], pixels)
        assert torch.equal(same[3], labels)


# Configuration.


def test_a_missing_device_is_a_sentence(train_config, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            train(train_config("run.device=cuda", f"run.dir={tmp_path}"))


def test_a_checkpoint_whose_configuration_has_other_keys_is_resumed(checkpoint, train_config, tmp_path):
    """A checkpoint of an earlier version: the current configuration counts, the stored one is only a record."""
    values = read_checkpoint(checkpoint)
    values["config"] = {"loss": {"forgotten": 1}, "optim": {"steps": "many"}}
    write_checkpoint(tmp_path / "checkpoint.pt", values)
    state = train(train_config(f"run.dir={tmp_path}", f"optim.steps={values['step'] + 1}"))
    assert state.step == values["step"] + 1


@pytest.mark.parametrize("override", ["model.depth=3", "loss.objective=naive", "loss.classification_weight=0"])
def test_a_checkpoint_of_another_shape_is_refused(checkpoint, train_config, tmp_path, override):
    (tmp_path / "checkpoint.pt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        train(train_config(f"run.dir={tmp_path}", override))


def test_a_run_leaves_metrics_grids_and_events(checkpoint):
    names = {path.name for path in checkpoint.parent.iterdir()}
    assert {"metrics.jsonl", "samples-0000020.png", "reconstructions-0000020.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    last = json.loads((checkpoint.parent / "metrics.jsonl").read_text().splitlines()[-1])
    named = {"effective_rank", "psnr", "psnr_0.5", "training_psnr_0.5", "channel_std_min", "channel_std_max"}
    assert named <= set(last)


def test_a_run_may_begin_with_the_weights_of_a_model_directory(tiny_dir, train_config, tmp_path):
    config = train_config("optim.steps=1", "run.eval_every=1", f"run.dir={tmp_path}", f"run.start_from={tiny_dir}")
    state = new_state(config, torch.device("cpu"))
    start_from(state, tiny_dir)
    weights = read_weights(tiny_dir)
    for network in (state.ema, state.objective.model):
        assert all(np.array_equal(value, weights[name]) for name, value in network.state_dict().items())
    train(config)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    held_out = torch.from_numpy(np.stack([pixels for pixels, _ in load_images(config)[1]]))
    assert first["psnr"] == pytest.approx(latent_metrics(state.ema, held_out)[0]["psnr"], abs=1e-3)
    with pytest.raises(CheckpointError, match="has depth = "):
        start_from(new_state(train_config("model.depth=1"), torch.device("cpu")), tiny_dir)
