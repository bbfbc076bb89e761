import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from dsd_serve.checkpoint import read_checkpoint, read_model_dir
from dsd_serve.engines import load_engine
from dsd_serve.errors import CheckpointError
from dsd_serve.rows import OUTPUT_NAMES, inputs_of
from export.card import write_card
from export.commit import Stoppable, commit, drafting
from export.main import main
from export.verify import Report, verify
from tests.support.data import ROOT
from tests.support.processor import has_int8, needs_int8


def test_the_model_directory_is_complete(tiny_dir):
    files = {"config.json", "model.safetensors", "model.onnx", "model.ort.onnx", "card.md", "classes.webp"}
    assert {file.name for file in tiny_dir.iterdir()} == files
    assert {file.stat().st_mode & 0o444 for file in tiny_dir.iterdir()} == {0o444}, "a server may run as another user"
    model = read_model_dir(tiny_dir)
    assert model.name == "tiny"
    assert model.config.trained_classes == (1, 207, 950)
    assert (model.defaults.num_steps, model.defaults.guidance_scale) == (4, 1.5)
    card = (tiny_dir / "card.md").read_text()
    assert "Golden Retriever (207)" in card
    assert "research and education" in card
    assert "| fp32 | 0.2 MB |" in card


def test_a_flow_map_is_exported_in_every_precision(flow_map_dir, tmp_path):
    """The export would refuse a graph that is not the network, of which the rows that are compared jump."""
    target = tmp_path / "model"
    shutil.copytree(flow_map_dir, target)
    main([str(target), "--precision", "fp16", "bf16", *(["int8"] if has_int8() else [])])
    graphs = sorted(target.glob("*.onnx"))
    assert len(graphs) == (7 if has_int8() else 6)
    for file in graphs:
        assert [i.name for i in onnx.load(file, load_external_data=False).graph.input][-1] == "denoise_r"
    assert (read_model_dir(target).defaults.sampler, read_model_dir(target).defaults.num_steps) == ("flow_map", 2)


def test_the_weights_are_the_ema_rounded_to_what_is_stored(checkpoint, tiny_dir):
    stored = load_file(tiny_dir / "model.safetensors")
    for name, tensor in read_checkpoint(checkpoint)["ema"].items():
        assert stored[name].dtype == np.float16
        assert np.array_equal(stored[name], tensor.numpy().astype(np.float16))


def test_the_graph_has_the_promised_signature_and_shares_the_weights(demo_dir):
    graph = onnx.load(demo_dir / "model.onnx", load_external_data=False).graph
    assert tuple(value.name for value in graph.input) == tuple(
        one.name for one in inputs_of(read_model_dir(demo_dir).config)
    )
    assert tuple(value.name for value in graph.output) == OUTPUT_NAMES
    inline = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert inline < 100_000
    onnx.checker.check_model(str(demo_dir / "model.onnx"))
    text = (demo_dir / "model.onnx").read_bytes()
    assert b"/site-packages/" not in text, "no paths of the exporting machine"


def test_the_fused_graph_has_onnxruntimes_operators_and_the_plain_graph_none(demo_dir):
    def operators(file):
        graph = onnx.load(demo_dir / file, load_external_data=False).graph
        return {(node.domain, node.op_type) for node in graph.node}

    assert {domain for domain, _ in operators("model.onnx")} == {""}
    fused = operators("model.ort.onnx")
    assert ("com.microsoft", "MultiHeadAttention") in fused
    assert ("", "SimplifiedLayerNormalization") in fused
    assert not {("", "Softmax"), ("", "Pow")} & fused, "every attention and normalisation is fused"


def test_the_plain_graph_runs_where_the_fused_one_is_missing(demo_dir, tmp_path):
    for file in demo_dir.iterdir():
        if file.name != "model.ort.onnx":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert verify(load_engine("onnx", tmp_path), load_engine("onnx", demo_dir)).passed


def test_fp32_weights_give_a_graph_too(checkpoint, tmp_path):
    main([str(checkpoint), "-o", str(tmp_path / "model"), "--name", "mine"])
    assert verify(load_engine("onnx", tmp_path / "model"), load_engine("torch", tmp_path / "model")).passed
    assert json.loads((tmp_path / "model/config.json").read_text())["name"] == "mine"
    assert [path.name for path in (tmp_path / "model").iterdir() if path.name.startswith(".")] == []


@pytest.mark.thorough
def test_an_untrained_preset_can_be_exported(tmp_path):
    main(["--untrained", "demo", "-o", str(tmp_path)])
    assert "random" in (tmp_path / "card.md").read_text()
    assert read_model_dir(tmp_path).config.depth == 6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["README.md"], "README.md is"),
        (["tests"], "tests is not a model directory"),
    ],
)
def test_wrong_input_ends_in_one_sentence(arguments, named, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "-o", str(tmp_path / "out")])
    assert str(stop.value).startswith("dsd-export: ")
    assert named in str(stop.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("export.build.verify", lambda *_: Report(0.5, 3, 1, 10))
    with pytest.raises(SystemExit, match="nothing was written"):
        main([str(checkpoint), "-o", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_verify_notices_a_wrong_engine(tiny_dir):
    """A change of a hundredth in the latents and a row that depends on its neighbours are both found."""

    class Wrong:
        def __init__(self, engine):
            self.engine, self.config = engine, engine.config

        def run(self, rows):
            outputs = self.engine.run(rows)
            if len(rows) > 1 and outputs[0].dtype == np.float32:
                outputs[0] = outputs[0] + np.float32(0.01)
            return outputs

    reference = load_engine("torch", tiny_dir)
    report = verify(Wrong(load_engine("onnx", tiny_dir)), reference)
    assert not report.passed
    assert report.latent_error > 0.009
    assert report.dependent_rows > 0


# Incremental and atomic updates.


@pytest.fixture
def directory(tiny_dir, tmp_path, caplog):
    caplog.set_level("INFO", "export")
    return shutil.copytree(tiny_dir, tmp_path / "model")


@pytest.fixture
def retrained(checkpoint, tmp_path):
    """The checkpoint with other weights."""
    values = torch.load(checkpoint, weights_only=True)
    values["ema"]["latent_head.bias"] += 0.25
    torch.save(values, tmp_path / "retrained.pt")
    return tmp_path / "retrained.pt"


@contextlib.contextmanager
def stopping():
    """The part of main that handles interrupts."""
    with Stoppable():
        try:
            yield
        except KeyboardInterrupt:
            sys.exit("stopped")


def contents(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_second_run_does_nothing(checkpoint, directory, caplog):
    before = stamps(directory)
    arguments = [str(checkpoint), "-o", str(directory), "--name", "tiny", "--store", "fp16"]
    main([*arguments, "--steps", "4", "--guidance", "1.5"])
    assert stamps(directory) == before
    assert "fp32: unchanged (model.safetensors, model.onnx, model.ort.onnx)" in caplog.text


def test_other_recommended_settings_change_no_weights_and_no_graph(directory):
    before = stamps(directory)
    main([str(directory), "--sampler", "dpmpp_2m", "--steps", "3"])
    after = stamps(directory)
    assert {name for name in before if before[name] != after[name]} == {"card.md", "config.json", "classes.webp"}
    defaults = read_model_dir(directory).defaults
    assert (defaults.sampler, defaults.num_steps, defaults.guidance_scale) == ("dpmpp_2m", 3, 1.5)
    assert "| sampling | dpmpp_2m, 3 steps, guidance 1.5 |" in (directory / "card.md").read_text()


def test_guidance_within_an_interval_is_recommended(directory):
    before = read_model_dir(directory)
    main([str(directory), "--guidance-start", "0.25", "--guidance-stop", "0.8"])
    after = read_model_dir(directory)
    assert after.defaults == replace(before.defaults, guidance_start=0.25, guidance_stop=0.8)
    assert "| sampling | heun, 4 steps, guidance 1.5 from t = 0.25 to 0.8 |" in (directory / "card.md").read_text()
    assert after.fingerprint() != before.fingerprint()
    main([str(directory), "--guidance-start", "0", "--guidance-stop", "1"])
    assert read_model_dir(directory).fingerprint() == before.fingerprint()


@pytest.mark.parametrize("given", [["--guidance-start", "0.9", "--guidance-stop", "0.2"], ["--guidance-stop", "1.5"]])
def test_an_impossible_interval_is_refused(directory, given):
    before = stamps(directory)
    with pytest.raises(SystemExit, match="dsd-export: guidance_st"):
        main([str(directory), *given])
    assert stamps(directory) == before


@needs_int8
def test_a_precision_is_added_without_the_checkpoint_and_the_rest_stays(directory, caplog):
    before = stamps(directory)
    main([str(directory), "--precision", "int8"])
    after = stamps(directory)
    changed = {"card.md", "config.json"}
    assert set(after) - set(before) == {"model.int8.safetensors", "model.int8.ort.onnx"}
    assert {name for name in before if before[name] != after[name]} == changed
    assert "| int8 |" in (directory / "card.md").read_text()
    assert "Golden Retriever (207)" in (directory / "card.md").read_text()
    assert read_model_dir(directory).defaults.num_steps == 4
    caplog.clear()
    main([str(directory), "--precision", "int8"])
    assert stamps(directory) == after
    assert "int8: unchanged" in caplog.text
    (directory / "model.int8.ort.onnx").write_bytes(b"damaged")
    main([str(directory)])
    assert load_engine("onnx", directory, precision="int8")


def test_no_graph_follows_a_new_name_and_guidance(directory):
    before = stamps(directory)
    main([str(directory), "--name", "other", "--guidance", "3"])
    after = stamps(directory)
    assert {name for name in before if before[name] != after[name]} <= {"card.md", "config.json", "classes.webp"}
    assert (read_model_dir(directory).name, read_model_dir(directory).defaults.guidance_scale) == ("other", 3)


@needs_int8
def test_new_weights_update_every_existing_precision(directory, retrained):
    main([str(directory), "--precision", "int8"])
    before = contents(directory)
    main([str(retrained), "-o", str(directory), "--store", "fp16"])
    after = contents(directory)
    assert set(after) == set(before)
    assert not {name for name in before if before[name] == after[name]}
    bias = load_file(directory / "model.int8.safetensors")["latent_head.bias"]
    assert np.array_equal(bias, read_checkpoint(retrained)["ema"]["latent_head.bias"].numpy().astype(np.float16))


def test_a_directory_without_graphs_gets_them(directory):
    for name in ("model.onnx", "model.ort.onnx", "card.md"):
        (directory / name).unlink()
    main([str(directory), "--onnx"])
    assert verify(load_engine("onnx", directory), load_engine("torch", directory)).passed
    assert "One network" in (directory / "card.md").read_text()


def test_the_default_folder_is_next_to_the_checkpoint_and_is_logged(checkpoint, tmp_path, caplog):
    caplog.set_level("INFO", "export")
    (tmp_path / "run").mkdir()
    shutil.copyfile(checkpoint, tmp_path / "run/checkpoint.pt")
    main([str(tmp_path / "run/checkpoint.pt")])
    assert f"the model directory is {tmp_path / 'run/model'}" in caplog.text
    assert read_model_dir(tmp_path / "run/model").name == "run"


def test_a_full_disk_leaves_the_old_files(directory, retrained):
    before = contents(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (directory / "model.safetensors").stat().st_size
    try:
        for limit in (1000, size // 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(SystemExit, match="dsd-export: the file would exceed the file size limit; no partial"):
                main([str(retrained), "-o", str(directory), "--store", "fp16"])
            with pytest.raises(SystemExit, match="size limit"):
                main([str(retrained), "-o", str(directory.parent / "new"), "--store", "fp16"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(directory) == before
    assert not (directory.parent / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_old_files(directory, retrained, number):
    before = contents(directory)
    timer = threading.Timer(1, os.kill, (os.getpid(), number))
    timer.start()
    try:
        with pytest.raises(SystemExit, match="dsd-export: stopped"):
            main([str(retrained), "-o", str(directory), "--store", "fp16"])
    finally:
        timer.join()
    assert contents(directory) == before


NAMES = ["model.safetensors", "model.onnx", "model.fp16.onnx", "card.md", "config.json"]
MOVES = 1 + 2 * (len(NAMES) - 1) + 1 + 1  # config.json away; old away, new in place; an obsolete file away; config.json


def fill(folder, version, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{version} of {name}")


def version_of(folder):
    """old or new, which all loaded files must agree on; None without config.json."""
    if not (folder / "config.json").exists():
        return None
    versions = {(folder / name).read_text().split()[0] for name in NAMES}
    assert len(versions) == 1, f"a mixture: {versions}"
    return versions.pop()


DYING = """
import os, sys
from pathlib import Path
from export.commit import commit, drafting
NAMES = sys.argv[3:]
count, last, replace = 0, int(sys.argv[2]), os.replace
def dying(*names):
    global count
    if count == last:
        os._exit(9)  # like kill -9: no handler, no finally
    count += 1
    replace(*names)
os.replace = dying
with drafting(Path(sys.argv[1])) as draft:
    for name in NAMES:
        (draft / name).write_text("new of " + name)
    commit(draft, Path(sys.argv[1]), NAMES, ["model.int8.onnx"])
"""


def test_a_kill_at_any_move_leaves_no_mixture(tmp_path):
    processes = []
    for last in range(MOVES + 1):
        fill(tmp_path / str(last), "old", [*NAMES, "model.int8.onnx"])
        command = [sys.executable, "-c", DYING, str(tmp_path / str(last)), str(last), *NAMES]
        processes.append(subprocess.Popen(command, cwd=ROOT))
        if len(processes) % 4 == 0:
            [process.wait() for process in processes]
    assert [process.wait() for process in processes] == [9] * MOVES + [0]
    found = [version_of(tmp_path / str(last)) for last in range(MOVES + 1)]
    assert found == ["old"] + [None] * (MOVES - 1) + ["new"]
    for last in range(MOVES + 1):  # the next export repairs it and removes the leftovers
        with drafting(tmp_path / str(last)) as draft:
            fill(draft, "new")
            commit(draft, tmp_path / str(last), NAMES, ["model.int8.onnx"])
        assert {file.name for file in (tmp_path / str(last)).iterdir()} == set(NAMES)
        assert version_of(tmp_path / str(last)) == "new"


def test_an_error_at_any_move_is_undone(tmp_path, monkeypatch):
    replace = os.replace
    for last in range(MOVES):
        target = tmp_path / str(last)
        fill(target, "old", [*NAMES, "model.int8.onnx"])
        before, count = contents(target), iter(range(100))

        def failing(*names, count=count, last=last):
            if next(count) == last:
                raise OSError(28, "No space left on device")
            replace(*names)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="No space"), drafting(target) as draft:
            fill(draft, "new")
            commit(draft, target, NAMES, ["model.int8.onnx"])
        assert contents(target) == before


def test_an_interrupt_waits_for_the_moves(tmp_path, monkeypatch):
    replace = os.replace
    fill(tmp_path / "model", "old")

    def interrupting(*names):
        replace(*names)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, "replace", interrupting)
    with pytest.raises(SystemExit, match="stopped"), stopping(), drafting(tmp_path / "model") as draft:
        fill(draft, "new")
        commit(draft, tmp_path / "model", NAMES)
    assert version_of(tmp_path / "model") == "new"
    assert {file.name for file in (tmp_path / "model").iterdir()} == set(NAMES)


def test_an_interrupt_that_python_lost_still_stops(directory, retrained, monkeypatch):
    """It is raised in a destructor, where Python prints it and continues."""
    before = contents(directory)

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def write(*arguments):
        Dying()
        return write_card(*arguments)

    monkeypatch.setattr("export.main.write_card", write)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    with pytest.raises(SystemExit, match="dsd-export: stopped"):
        main([str(retrained), "-o", str(directory), "--store", "fp16"])
    assert contents(directory) == before


def test_two_exports_to_one_directory_exclude_each_other(directory):
    with drafting(directory), pytest.raises(SystemExit, match="another dsd-export is writing"):
        main([str(directory), "--precision", "int8"])


def test_an_engine_rejects_a_mixture_and_a_changing_directory(directory, tmp_path, monkeypatch):
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that config\.json was written with"):
        load_engine("onnx", directory)
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    from dsd_serve.engines import onnx_engine

    opened = onnx_engine.open_session

    def replaced_meanwhile(*arguments, **options):
        (directory / "config.json").unlink()
        return opened(*arguments, **options)

    monkeypatch.setattr(onnx_engine, "open_session", replaced_meanwhile)
    with pytest.raises(CheckpointError, match="was exported again while it was loaded"):
        load_engine("onnx", directory)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"no config\.json; dsd-export writes one"):
        load_engine("onnx", directory)


def test_notes_must_be_text_and_a_name_is_not_empty(checkpoint, tmp_path, capsys):
    (tmp_path / "notes").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match="--notes must name a text file in UTF-8"):
        main([str(checkpoint), "-o", str(tmp_path / "out"), "--notes", str(tmp_path / "notes")])
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(SystemExit):
            main([str(checkpoint), "-o", str(tmp_path / "out"), "--name", name])
        assert "--name: must be 1 to 200 printable characters, got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--precision", "int8", "--trt"], "engine 'tensorrt' computes in fp32, fp16 or bf16, not in int8"),
        (["--store", "fp16"], "--store and --notes are for checkpoints"),
    ],
)
def test_options_that_do_not_fit_a_directory_are_rejected(directory, arguments, named):
    before = stamps(directory)
    with pytest.raises(SystemExit, match=named):
        main([str(directory), *arguments])
    assert stamps(directory) == before


def test_an_untrained_preset_needs_a_folder():
    with pytest.raises(SystemExit, match="--untrained needs -o DIR"):
        main(["--untrained", "demo"])


def test_without_tensorrt_the_error_comes_before_the_work(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "export.tensorrt.plans", None)
    before = stamps(directory)
    with pytest.raises(SystemExit, match=r"pip install '\.\[tensorrt\]'"):
        main([str(directory), "--trt", "--precision", "fp16"])
    assert stamps(directory) == before
