"""dsd-distill from a tiny teacher to a model directory that draws: quality, resuming, several processes, refusals."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import dsd_serve
from dsd_serve.checkpoint import read_checkpoint, read_model_dir, write_checkpoint
from dsd_serve.config import ModelConfig
from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams
from dsd_serve.programs import generate, run_all
from dsd_serve.samplers import initial_noise
from tests.support.data import ROOT
from tests.support.runs import assert_same
from training.distillation import distill as module
from training.distillation.distill_config import TeacherSection, load_distill_config
from training.distillation.main import main
from training.distillation.teacher import draw_trajectories, even_times, read_teacher

SHAPE = {"image_size": 16, "patch_size": 8, "latent_dim": 8, "hidden_size": 32, "depth": 3, "num_heads": 2}
NETWORK = ModelConfig(**SHAPE, num_classes=3, class_names=("a", "b", "c"))
QUICK = [
    "optim.batch_size=16",
    "optim.micro_batch_size=8",
    "optim.warmup_steps=2",
    "optim.lr=4e-3",
    "optim.ema_decay=0.9",
    "run.compile=off",
    "run.device=cpu",
    "run.precision=fp32",
    "run.log_every=1",
    "run.held_out_seeds=24",
    "run.samples_per_class=1",
    "teacher.steps=4",
]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A checkpoint of a network whose flow bends: its random weights depend on t and on the class."""
    torch.manual_seed(0)
    model = DSD(NETWORK)
    with torch.no_grad():
        model.adaLN_modulation.weight.normal_(std=0.05)
        model.y_embed.embedding.weight.normal_(std=1.0)
    path = tmp_path_factory.mktemp("teacher") / "checkpoint.pt"
    values = {"step": 0, "network": NETWORK.to_dict(), "ema": model.state_dict(), "config": None}
    sampling = {"sampler": "dpmpp_2m", "num_steps": 4, "guidance_scale": 2.0, "guidance_stop": 0.9}
    write_checkpoint(path, {**values, "sampling": sampling})
    return path


def distilled(teacher_file, folder, *overrides, expected=None):
    """Distil into folder/fast, with the run in folder/run; returns the refusal if one is expected."""
    arguments = [str(teacher_file), "-o", str(folder / "fast"), f"run.dir={folder / 'run'}", *QUICK, *overrides]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if expected is None:
            main(arguments)
        else:
            with pytest.raises(SystemExit, match=expected):
                main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def with_folder(config, folder):
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def journal(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def fast(teacher_file, tmp_path_factory):
    """The folder of a distillation of forty steps."""
    folder = tmp_path_factory.mktemp("distilled")
    distilled(teacher_file, folder, "optim.steps=40", "run.eval_every=20", "run.save_every=20")
    return folder


def test_a_student_comes_closer_to_the_images_of_its_teacher(fast):
    """By the latents of held-out seeds, in one jump and in two, while it encodes and decodes as before."""
    evaluations = [line for line in journal(fast) if "latent_psnr_1" in line]
    assert [line["step"] for line in evaluations] == [0, 20, 40]
    before, after = evaluations[0], evaluations[-1]
    assert before["encode_psnr"] > 119 and before["decode_psnr"] > 119, "it begins as the teacher"
    assert after["latent_psnr_1"] > before["latent_psnr_1"] + 5
    assert after["latent_psnr_2"] > before["latent_psnr_2"] + 3
    assert after["encode_psnr"] > 25 and after["decode_psnr"] > 40
    assert (fast / "run/samples-0000040.png").exists()


def test_the_model_recommends_jumps_and_draws_in_any_number_of_them(fast):
    directory = read_model_dir(fast / "fast")
    assert directory.config.flow_map
    assert (directory.defaults.sampler, directory.defaults.num_steps) == ("flow_map", 2)
    assert (directory.defaults.guidance_scale, directory.defaults.guidance_stop) == (1, 1)
    assert "guidance 2 from t = 0 to 0.9 |" in (fast / "fast/card.md").read_text()
    with dsd_serve.load(fast / "fast") as model:
        images = [np.asarray(model.generate("b", seed=3, num_steps=steps)) for steps in (1, 2, 3)]
        assert len({image.tobytes() for image in images}) == 3
        assert np.asarray(model.generate("b", seed=3)).tobytes() == images[1].tobytes()


def test_resuming_is_bit_exact(teacher_file, tmp_path, monkeypatch):
    options = ["optim.steps=7", "run.eval_every=3", "run.save_every=2", "loss.feature_weight=1"]
    config = load_distill_config(None, [*QUICK, *options, f"run.start_from={teacher_file}"], f"{tmp_path}/whole/run")
    module.distill(config)
    original = module.distill_step

    def until(last):
        def step(state, *rest):
            losses = original(state, *rest)
            if state.step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

        return step

    for last in (3, 5):
        monkeypatch.setattr(module, "distill_step", until(last))
        distilled(teacher_file, tmp_path / "part", *options)
        assert read_checkpoint(tmp_path / "part/run/checkpoint.pt")["step"] == last
        assert not (tmp_path / "part/fast").exists()
    monkeypatch.setattr(module, "distill_step", original)
    module.distill(with_folder(config, tmp_path / "part/run"))
    assert_same(tmp_path / "whole/run/checkpoint.pt", tmp_path / "part/run/checkpoint.pt")
    whole, part = (
        {line["step"]: line["loss"] for line in journal(tmp_path / name) if "loss" in line}
        for name in ("whole", "part")
    )
    assert whole == part and len(whole) == 7


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_trajectories_are_those_of_the_sampler(teacher_file, interval):
    """The same latents as a request for dpmpp_2m with guidance draws, and at the end the same image."""
    start, stop = interval
    section = TeacherSection(guidance=3.0, guidance_start=start, guidance_stop=stop)
    teacher = read_teacher(str(teacher_file), section, torch.device("cpu"))
    noise = torch.from_numpy(np.stack([initial_noise(5, i, NETWORK.latent_shape) for i in range(2)]))
    times = even_times(2, 6, None, torch.device("cpu"))
    labels = torch.tensor([2, 0])
    drawn = draw_trajectories(teacher.network.denoise, noise, labels, times, teacher.guidance, NETWORK.null_label)
    assert drawn.z.shape == (2, 7, *NETWORK.latent_shape)
    params = SamplingParams(5, 0, 6, "dpmpp_2m", 3.0, start, stop)
    programs = [generate(NETWORK, label, replace(params, index=i)) for i, label in enumerate((2, 0))]
    pixels = np.stack(run_all(TorchEngine(teacher.network), programs)).astype(int)
    images = ((teacher.network.decode(drawn.z[:, -1]).clamp(-1, 1) + 1) * 127.5).round().int().numpy()
    assert np.abs(pixels - images).max() <= 1
    shifted = even_times(50, 6, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert bool((shifted.diff(dim=1) > 0).all()) and bool((shifted[:, [0, -1]] == torch.tensor([0.0, 1.0])).all())


def test_a_model_without_classes_is_distilled_without_guidance(tmp_path):
    network = ModelConfig(**SHAPE, num_classes=0)
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"step": 0, "network": network.to_dict(), "ema": DSD(network).state_dict(), "config": None})
    distilled(path, tmp_path, "optim.steps=2", "teacher.guidance=2", expected=r"teacher\.guidance must be 1.*got 2")
    distilled(path, tmp_path, "optim.steps=2")
    with dsd_serve.load(tmp_path / "fast") as model:
        assert model.generate(seed=1).size == (16, 16)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["teacher.steps=1"], r"teacher\.steps must be between 2 and 100, got 1"),
        (["teacher.guidance=-1"], r"teacher\.guidance must be 0 or more, got -1"),
        (["teacher.guidance_start=2"], r"teacher\.guidance_start must be at most 1, got 2"),
        (
            ["teacher.guidance_start=0.6", "teacher.guidance_stop=0.5"],
            r"must be times from 0 to 1 in this order, got 0\.6 and 0\.5",
        ),
        (["jumps.rolled_out=2"], r"jumps\.rolled_out must be between 0 and 1, got 2"),
        (["loss.jump_weight=0", "loss.end_weight=0"], "otherwise no jump is learnt"),
        (["run.start_from=demo"], r"run\.start_from must be left out"),
        (["loss.colour=1"], "unknown key loss.colour; known are"),
        (["run.sample_steps=0"], r"run\.sample_steps must be between 1 and 100, got 0"),
        (["-o", "FILE"], "-o must be a folder"),
        (["-o", "TEACHER"], "-o must be another folder than the teacher"),
    ],
)
def test_wrong_inputs_get_a_sentence(tiny_dir, tmp_path, overrides, sentence):
    (tmp_path / "file").touch()
    places = {"FILE": str(tmp_path / "file"), "TEACHER": str(tiny_dir)}
    overrides = [places.get(one, one) for one in overrides]
    with pytest.raises(SystemExit, match=f"dsd-distill: .*{sentence}"):
        main([str(tiny_dir), "-o", str(tmp_path / "fast"), f"run.dir={tmp_path}/run", *QUICK, *overrides])
    assert not (tmp_path / "fast").exists()


def test_teachers_that_cannot_be_distilled_get_a_sentence(teacher_file, tiny_dir, checkpoint, fast, tmp_path):
    for teacher, sentence in (
        ("nowhere", "nowhere is not a model directory"),
        ("dsd-b", "dsd-b is a preset, which only --dry-run takes"),
        (str(tiny_dir), "a flow map needs a depth of 3 or more"),
        (str(checkpoint), "a checkpoint recommends no guidance"),
        (str(tmp_path / "none.pt"), "there is no checkpoint"),
    ):
        distilled(teacher, tmp_path, "optim.steps=2", expected=sentence)
    distilled(teacher_file, tmp_path, "optim.frozen=['blocks.9']", expected=r"optim\.frozen must be names of")
    run = f"run.dir={fast}/run"
    distilled(teacher_file, tmp_path, "teacher.guidance=3", run, expected="with guidance 2.0, this teacher has 3.0")
    other = "with guidance_stop 0.9, this teacher has 1.0"
    distilled(teacher_file, tmp_path, "teacher.guidance_stop=1", run, expected=other)
    distilled(teacher_file, tmp_path, f"run.dir={checkpoint.parent}", expected="is a checkpoint of dsd-train")


def test_a_dry_run_prints_the_cost_and_writes_nothing(teacher_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(teacher_file), "--dry-run", *QUICK])
    printed = capsys.readouterr().out
    for named in ("a trajectory: 24 rows of 4 tokens", "memory held", "trajectories/s", "the whole run here"):
        assert named in printed, printed
    assert list(tmp_path.iterdir()) == []


def test_configurations_are_valid():
    files = sorted((ROOT / "training/configs").glob("distill-*.toml"))
    assert len(files) >= 2
    for file in files:
        assert load_distill_config(file, [], "runs/x").optim.name == "muon"
