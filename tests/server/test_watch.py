"""--watch: a model directory that is replaced, and a training run whose checkpoints are served."""

import io
import itertools
import json
import os
import shutil
from dataclasses import replace

import httpx
import pytest
from PIL import Image

from dsd_serve.errors import ConfigError, EngineUnavailableError
from dsd_serve.loading import load
from server.checkpoint_strip import MAX_CHECKPOINTS, CheckpointStrip, Drawn
from server.service import Service
from server.settings import Settings, parse_settings
from server.watched_directories import is_model_of
from tests.support.answers import problem
from tests.support.models import NAMES, OWN, write_checkpoint
from tests.support.servers import Server, until


def fingerprint(http):
    return http.get("/model").json()["fingerprint"]


def test_a_directory_that_is_replaced(own_dir, plain_dir, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(own_dir)
    running = Server("--model", str(folder), "--watch", "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as http:
        before = fingerprint(http)
        (tmp_path / "new").symlink_to(plain_dir)
        os.replace(tmp_path / "new", folder)
        until(lambda: fingerprint(http) != before)
        assert http.get("/model").json()["num_classes"] == 0
        damaged = tmp_path / "damaged"
        shutil.copytree(own_dir, damaged)
        (damaged / "config.json").write_text("{}")
        (tmp_path / "new").symlink_to(damaged)
        after = fingerprint(http)
        os.replace(tmp_path / "new", folder)
        until(lambda: "the model model is not replaced" in running.log)
        assert fingerprint(http) == after
    assert running.stop() == 0
    assert "Traceback" not in running.log


def test_which_directories_hold_the_served_model(own_dir, plain_dir):
    with load(own_dir, threads=1, row_budget=4) as model:
        info = model.info
    assert info.described["precision"] == "fp32", "auto on a CPU"
    assert is_model_of(own_dir, info)
    assert not is_model_of(plain_dir, info)
    assert not is_model_of(own_dir, replace(info, described={**info.described, "precision": "fp16"})), "none is there"


@pytest.mark.thorough
def test_a_run_whose_checkpoints_are_served(tmp_path):
    run = tmp_path / "flowers"
    run.mkdir()
    running = Server("--watch", str(run), "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as http:
        assert "waiting for the first checkpoint" in problem(http.get("/health/ready"), 503)
        (run / "checkpoint.pt").write_bytes(b"half of")
        until(lambda: "cannot be served" in problem(http.get("/health/ready"), 503), 120)
        found = {}
        for step in (5, 10):
            write_checkpoint(OWN, run / "checkpoint.pt", step)
            until(lambda: step_of(http) == step, 200)  # noqa: B023
            found[step] = fingerprint(http)
        strip = http.get("/checkpoints").json()
        assert strip["run"] == http.get("/model").json()["name"] == "flowers"
        assert [one["name"] for one in strip["classes"]] == list(NAMES)
        assert strip["seeds"] == [1, 2]
        assert {one["step"]: one["fingerprint"] for one in strip["checkpoints"]} == found
        assert found[5] != found[10]
        image = http.get("/checkpoints/10")
        drawn = http.get("/generate", params={"class": 1, "seed": 2, "guidance": 2}).content
        with Image.open(io.BytesIO(image.content)) as sheet, Image.open(io.BytesIO(drawn)) as single:
            assert sheet.size == (16, 6 * 16)
            assert sheet.crop((0, 48, 16, 64)).tobytes() == single.tobytes()  # the second seed of the second class
            assert json.loads(sheet.text["dsd"])["fingerprint"] == found[10]
        again = http.get("/checkpoints/10", headers={"If-None-Match": image.headers["etag"]})
        assert again.status_code == 304
        assert "there are no images of step 7" in problem(http.get("/checkpoints/7"), 404)
        assert "/checkpoints/{step}" in http.get("/openapi.json").json()["paths"]
        (run / "checkpoint.pt").write_bytes(b"no checkpoint")
        until(lambda: running.log.count("cannot be served") == 2, 120)
        assert fingerprint(http) == found[10]
    assert running.stop() == 0
    assert "Traceback" not in running.log
    assert sorted(CheckpointStrip(run).drawn) == [5, 10]  # for the next server


def step_of(http):
    answer = http.get("/checkpoints")
    steps = answer.json()["checkpoints"] if answer.status_code == 200 else []
    return steps[-1]["step"] if steps else None


def test_a_long_run_is_thinned_out(tmp_path):
    strip = CheckpointStrip(tmp_path)
    for step in range(0, 1000, 10):
        strip.keep(Drawn(step, "0" * 64, 0, b"no image"))
    steps = sorted(strip.drawn)
    assert len(steps) == len(list(tmp_path.iterdir())) == MAX_CHECKPOINTS
    assert steps[0] == 0 and steps[-1] == 990
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 80
    assert CheckpointStrip(tmp_path).drawn == {}  # what is not an image is left out
    strip.keep(Drawn(500, "1" * 64, 0, b"of a run that began again"))
    assert max(strip.drawn) == 500 and strip.drawn[500].fingerprint == "1" * 64


def test_what_cannot_be_watched_is_a_sentence(own_dir, tmp_path, monkeypatch):
    for settings, sentence in (
        (Settings(watch=str(tmp_path / "none")), "is not a folder"),
        (Settings(watch=str(own_dir)), f"is a model directory, not a run: dsd-serve --model {own_dir} --watch"),
        (Settings(watch=str(tmp_path), model=("a",)), "serves the models of that run"),
        (Settings(watch=str(tmp_path), engine="tensorrt"), "needs engine onnx or torch"),
        (Settings(watch="on", engine_process="off"), "engine_process must be auto or on"),
        (Settings(watch="on", triton="localhost:1"), "triton cannot be combined with"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Service(settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else True)
    with pytest.raises(EngineUnavailableError, match=r"which needs torch: pip install '\.\[export\]'"):
        Service(Settings(watch=str(tmp_path)))


def test_the_values_of_watch(monkeypatch):
    assert parse_settings([]).watch == ""
    assert parse_settings(["--watch"]).watch == "on"
    assert parse_settings(["--watch", "runs/a"]).watch == "runs/a"
    for text, value in (("1", "on"), ("false", ""), ("runs/b", "runs/b")):
        monkeypatch.setenv("DSD_WATCH", text)
        assert parse_settings([]).watch == value
