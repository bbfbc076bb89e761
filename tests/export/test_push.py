"""dsd-export --push, against a local stand-in for the hub: what arrives there, and what is refused."""

import json
import os
import subprocess
import sys

import pytest

from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError, InputError
from dsd_serve.hub import model_dir
from export.card import hub_card
from export.push import check_place, push
from tests.support.data import ROOT
from tests.support.hub import running_hub, use_hub


@pytest.fixture
def hub():
    with running_hub() as hub:
        hub.token = "hf_secret"
        yield hub


@pytest.mark.filterwarnings("ignore:Use 'content=")  # of huggingface_hub's HTTP client
def test_a_pushed_model_is_loaded_by_its_name(hub, demo_dir, tmp_path, monkeypatch):
    use_hub(hub, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="HF_TOKEN is missing") as caught:
        push(demo_dir, "hf:org/demo", "other")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="HF_TOKEN is missing") as caught:
        push(demo_dir, "hf:org/demo", "other")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    url = push(demo_dir, "hf:org/demo", "cc-by-nc-4.0")
    assert url.startswith(f"{hub.url}/org/demo/commit/")
    files = hub.repos["org/demo"]["main"]
    here = {file.name: file.read_bytes() for file in demo_dir.iterdir()}
    assert {name: data for name, data in files.items() if name != "README.md"} == here
    readme = files["README.md"].decode()
    assert readme.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: dsd-serve\n")
    assert "dsd-serve --model hf:org/demo" in readme and here["card.md"].decode().strip() in readme
    loaded = model_dir("hf:org/demo")
    assert {file.name: file.read_bytes() for file in loaded.iterdir()} == here
    push(demo_dir, "hf:org/demo", "cc-by-nc-4.0")
    assert len([path for _, path, _ in hub.log if "/commit/" in path]) == 2, "all files of a push at once"


def test_damaged_directories_are_not_pushed(hub, demo_dir, tmp_path, monkeypatch):
    use_hub(hub, tmp_path / "home", monkeypatch)
    folder = tmp_path / "model"
    folder.mkdir()
    for file in demo_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"is not the file that config\.json was written with"):
        push(folder, "hf:org/demo", "other")
    (folder / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json names model\.onnx, which is missing"):
        push(folder, "hf:org/demo", "other")
    assert not hub.log


@pytest.mark.thorough
def test_the_command_pushes_and_takes_models_by_name(hub, demo_dir, tmp_path):
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
        "PYTHONPATH": str(ROOT),
    }

    def export(*arguments):
        command = [sys.executable, "-m", "export", *map(str, arguments)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert "hf_" not in done.stdout + done.stderr and "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, said = export(demo_dir, "--push", "hf:org/demo")
    assert code == 0 and f"pushed: {hub.url}/org/demo/commit/" in said
    assert "HTTP Request" not in said
    code, said = export("hf:org/demo", "--triton", tmp_path / "repo", "--triton-device", "cpu")
    assert code == 0, said
    assert (tmp_path / "repo/dsd/config.pbtxt").exists()
    code, said = export("hf:org/demo")
    assert code == 1 and "hf:org/demo needs -o DIR: the downloaded directory belongs to the cache" in said


@pytest.mark.parametrize("place", ["org/demo", "hf:demo", "hf:org/demo@main", "hf:../x"])
def test_wrong_places_get_a_sentence(place):
    with pytest.raises(InputError, match="--push must be hf:org/name, without a revision, got"):
        check_place(place)


def test_the_card_has_the_metadata_of_the_hub(demo_dir):
    yaml = pytest.importorskip("yaml")
    card = hub_card(f"# {read_model_dir(demo_dir).name}\n\nText.\n", "hf:org/demo", "other")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "other" and metadata["license_name"] and metadata["license_link"]
    assert metadata["library_name"] == "dsd-serve" and "onnx" in metadata["tags"]
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert json.dumps(metadata)
    assert body.startswith("\n# dsd-demo\n\nText.\n\n## Use\n")
