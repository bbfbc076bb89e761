"""dsd-export --web: the folder that it writes, what it refuses, and what it leaves alone."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.params import API_NAMES
from export.main import main
from export.web_folder import write_web
from export.web_runtime import find_runtime, pinned_version
from tests.support.data import ROOT
from tests.support.web_runtime import empty_runtime


@pytest.fixture
def runtime(tmp_path):
    return empty_runtime(tmp_path / "npm")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def described(folder: Path) -> dict:
    return json.loads((folder / "network.json").read_text())


def test_the_folder_is_complete_and_describes_itself(demo_dir, runtime, tmp_path):
    before = snapshot(demo_dir)
    main([str(demo_dir), "--web", str(tmp_path / "a/site"), "--runtime", str(runtime)])
    site = tmp_path / "a/site"
    assert snapshot(demo_dir) == before, "the model directory is only read"
    description = described(site)
    assert {description["graph"], description["weights"]} < description["files"].keys()
    for name, file in description["files"].items():
        data = (site / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    for build in ("wasm", "webgpu"):
        assert set(description["runtime"][build].values()) < description["files"].keys()
    assert (site / "model/model.safetensors").read_bytes() == before["model.safetensors"]
    assert [one["index"] for one in description["classes"]] == list(read_model_dir(demo_dir).config.classes)
    assert description["settings"]["steps"]["default"] == read_model_dir(demo_dir).defaults.num_steps
    assert description["settings"]["seed"]["most"] == str(2**63 - 1)
    assert not [file for file in site.rglob("*") if file.suffix == ".mjs"], "hosts send .mjs with a wrong type"
    names = {file.name for file in site.iterdir()}
    assert names >= {"client.js", "worker.js", "network.js", "network.json", "model", "runtime"}
    assert {file.stat().st_mode & 0o444 for file in site.rglob("*")} == {0o444}, "the host may run as another user"
    assert "MIT License" in (site / "runtime/LICENSE.txt").read_text()


@pytest.mark.parametrize(("flag", "name"), [("--guidance-start", "guidance_start"), ("--guidance", "guidance_scale")])
def test_a_setting_of_zero_is_not_ignored(own_dir, runtime, tmp_path, flag, name):
    shutil.copytree(own_dir, tmp_path / "model")
    main([str(tmp_path / "model"), flag, "0", "--web", str(tmp_path / "site"), "--runtime", str(runtime)])
    assert getattr(read_model_dir(tmp_path / "model").defaults, name) == 0
    assert described(tmp_path / "site")["settings"][API_NAMES[name]]["default"] == 0


def test_the_images_of_the_classes_are_those_of_the_model(demo_dir, runtime, tmp_path):
    write_web(demo_dir, tmp_path / "site", runtime)
    images, grid = described(tmp_path / "site")["classImages"], read_model_dir(demo_dir).class_images
    file = tmp_path / "site" / images["url"].partition("?")[0]
    assert file.read_bytes() == (demo_dir / "classes.webp").read_bytes()
    assert (images["columns"], images["perClass"]) == (grid.columns, grid.per_class)
    with Image.open(file) as sheet:
        assert sheet.width == grid.columns * images["size"]


def test_a_model_without_classes(plain_dir, runtime, tmp_path):
    write_web(plain_dir, tmp_path / "site", runtime)
    description = described(tmp_path / "site")
    assert (description["classes"], description["classImages"], description["config"]["nullLabel"]) == ([], None, 0)


def test_a_folder_of_ours_is_replaced_and_other_files_stay(demo_dir, plain_dir, runtime, tmp_path):
    site = tmp_path / "site"
    write_web(plain_dir, site, runtime)
    (site / "CNAME").write_text("images.example.org")
    (site / "client.js").write_text("of an earlier version")
    write_web(demo_dir, site, runtime)
    assert described(site)["name"] == "dsd-demo"
    assert (site / "CNAME").read_text() == "images.example.org"
    assert (site / "client.js").read_bytes() == (ROOT / "export/web/client.js").read_bytes()
    assert not [file for file in site.iterdir() if file.name.startswith(".dsd-export-")]


def test_another_folder_is_refused(demo_dir, runtime, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("a page of mine")
    with pytest.raises(SystemExit, match="--web must be a new folder, or one that --web wrote"):
        main([str(demo_dir), "--web", str(site), "--runtime", str(runtime)])
    assert snapshot(site) == {"index.html": b"a page of mine"}
    with pytest.raises(CheckpointError, match=r"index.html is a file"):
        write_web(demo_dir, site / "index.html", runtime)


def test_a_failure_leaves_the_old_folder(plain_dir, runtime, tmp_path, monkeypatch):
    site, replace = tmp_path / "site", os.replace
    write_web(plain_dir, site, runtime)
    (site / "client.js").write_text("of an earlier version")
    before, failures = snapshot(site), 0
    for failing in range(60):
        calls = []

        def failing_replace(*names, calls=calls, failing=failing):
            calls.append(names)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device")
            replace(*names)

        monkeypatch.setattr("export.commit.os.replace", failing_replace)
        try:
            write_web(plain_dir, site, runtime)
        except OSError:
            failures += 1
            assert snapshot(site) == before
        else:
            break
    assert failures == len(calls) > 10


def test_without_the_runtime_the_command_says_what_to_install(demo_dir, tmp_path):
    command = [sys.executable, "-m", "export", str(demo_dir), "--web", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert f"npm install --ignore-scripts onnxruntime-web@{pinned_version()}" in done.stderr
    assert not (tmp_path / "site").exists()


def test_the_runtime_is_found_as_node_finds_it(runtime, tmp_path, monkeypatch):
    package = runtime / "node_modules/onnxruntime-web"
    (runtime / "a/b").mkdir(parents=True)
    monkeypatch.chdir(runtime / "a/b")
    assert find_runtime(None) == package
    for place in (runtime, runtime / "node_modules", package):
        assert find_runtime(place) == package


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda package: (package / "package.json").write_text('{"name": "onnxruntime-web"}'), "is version null"),
        (lambda package: (package / "package.json").write_text("{"), "which is not in"),
        (lambda package: (package / "dist/ort.wasm.min.mjs").unlink(), "dist/ort.wasm.min.mjs is missing"),
    ],
)
def test_a_wrong_runtime_is_a_sentence(runtime, spoil, says):
    spoil(runtime / "node_modules/onnxruntime-web")
    with pytest.raises(EngineUnavailableError, match=says):
        find_runtime(runtime)


def test_another_version_of_the_runtime_is_refused(tmp_path):
    with pytest.raises(EngineUnavailableError, match=r"and .* is version '1.2.3': npm install"):
        find_runtime(empty_runtime(tmp_path / "npm", "1.2.3"))


def test_runtime_alone_is_refused(demo_dir, runtime):
    with pytest.raises(SystemExit, match="--runtime is for --web DIR"):
        main([str(demo_dir), "--runtime", str(runtime)])
