"""Models by name, against a local stand-in for the hub: downloads, the cache, and what must not be loaded."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from dsd_serve import hub as module
from dsd_serve.checkpoint import config_json, read_model_dir
from dsd_serve.config import PRESETS
from dsd_serve.errors import CheckpointError, EngineUnavailableError
from dsd_serve.hub import model_dir, parse
from dsd_serve.params import SamplingParams
from tests.support.data import ROOT
from tests.support.hub import commit_of, running_hub, use_hub

constants = pytest.importorskip("huggingface_hub.constants")


def model_files(weights=b"weights" * 1000, name="small"):
    """The files of a model directory, as far as the hub is concerned."""
    files = {"model.safetensors": weights, "model.onnx": b"graph"}
    hashes = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    text = config_json(name, PRESETS["dsd-s"], SamplingParams(), {"fp32": {"files": hashes}})
    return {"config.json": text.encode(), "card.md": b"# small\n", **files}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as hub:
        use_hub(hub, tmp_path, monkeypatch)
        hub.repos["org/small"] = {"main": model_files()}
        yield hub


def names(path):
    return sorted(file.name for file in path.iterdir())


def downloads(hub):
    return sorted(path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("hf:org/name", ("org/name", None)),
        ("hf:o-r.g/n_ame.v1@main", ("o-r.g/n_ame.v1", "main")),
        ("hf:org/name@refs/pr/4", ("org/name", "refs/pr/4")),
        ("hf:org/name@" + "a" * 40, ("org/name", "a" * 40)),
    ],
)
def test_names(place, expected):
    assert parse(place) == expected


@pytest.mark.parametrize(
    "place",
    ["hf:", "hf:name", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a/b@", "hf:a/b@../x", "hf:a/b c", "hf:a/b\n", "hf:/a"],
)
def test_wrong_names_get_a_sentence(place):
    with pytest.raises(CheckpointError, match=r"a model by name must be hf:org/name or hf:org/name@revision, got"):
        model_dir(place)


def test_a_path_is_itself(tmp_path):
    assert model_dir(tmp_path) == tmp_path
    assert model_dir(str(tmp_path / "x")) == tmp_path / "x"


def test_a_model_is_downloaded_once(hub):
    hub.repos["org/small"]["main"] |= {"evil.pkl": b"x", "model.pt": b"x", "code.py": b"x", "a/model.onnx": b"x"}
    path = model_dir("hf:org/small")
    assert names(path) == ["card.md", "config.json", "model.onnx", "model.safetensors"], "nothing else is"
    assert read_model_dir(path).name == "small"
    assert (path / "model.safetensors").read_bytes() == b"weights" * 1000
    before = downloads(hub)
    assert before == ["card.md", "config.json", "model.onnx", "model.safetensors"]
    assert model_dir("hf:org/small") == path and downloads(hub) == before


def test_a_new_version_is_found_and_old_ones_by_their_revision(hub):
    old = model_dir("hf:org/small")
    commit = commit_of(hub.repos["org/small"]["main"])
    hub.repos["org/small"]["v1"] = hub.repos["org/small"]["main"]
    hub.repos["org/small"]["main"] = model_files(b"better", "better")
    assert read_model_dir(model_dir("hf:org/small")).name == "better"
    assert model_dir("hf:org/small@v1") == model_dir(f"hf:org/small@{commit}") == old


def test_without_a_network_the_cache_is_used(hub, monkeypatch):
    with pytest.raises(CheckpointError, match="has no such repository"):
        model_dir("hf:org/other")
    path = model_dir("hf:org/small")
    hub.status = 503
    assert model_dir("hf:org/small") == path
    hub.status = 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.log)
    assert model_dir("hf:org/small") == path
    assert len(hub.log) == requests
    with pytest.raises(CheckpointError, match=r"hf:org/other is not in the cache.*\(HF_HUB_OFFLINE\)"):
        model_dir("hf:org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert model_dir("hf:org/small") == path
    with pytest.raises(CheckpointError, match=r"not in the cache.*http://127\.0\.0\.1:9 cannot be reached"):
        model_dir("hf:org/other")


def test_an_incomplete_cache_is_not_a_model(hub, monkeypatch):
    path = model_dir("hf:org/small")
    (path / "model.onnx").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not in the cache, at least not as a whole"):
        model_dir("hf:org/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (model_dir("hf:org/small") / "model.onnx").exists()


def test_a_download_that_breaks_off_goes_on(hub):
    weights = bytes(24_000_000)  # huggingface_hub keeps whole blocks of 10 MiB
    hub.repos["org/small"]["main"] = model_files(weights)
    hub.cut.add("model.safetensors")
    assert (model_dir("hf:org/small") / "model.safetensors").read_bytes() == weights
    ranges = [
        headers.get("range") or headers.get("Range")
        for method, name, headers in hub.log
        if method == "GET" and name.endswith("model.safetensors")
    ]
    assert ranges[1] == "bytes=10485760-", "from where it stopped"


def test_changed_files_are_not_loaded(hub):
    hub.repos["org/small"]["main"]["model.safetensors"] = b"other weights"
    with pytest.raises(CheckpointError, match="a file differs from the sha256 in"):
        model_dir("hf:org/small")


def test_a_graph_that_config_json_does_not_name_is_not_loaded(hub):
    path = model_dir("hf:org/small")
    (path / "model.ort.onnx").write_bytes(b"put here by another program")
    with pytest.raises(CheckpointError, match=r"also holds model\.ort\.onnx, which its config\.json does not name"):
        model_dir("hf:org/small")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config.json": None}, r"is not a model directory: the repository has no config\.json"),
        ({"config.json": b"{}"}, "is not of format 'dsd-model-1'"),
        ({"config.json": b" " * 10_000_001}, "has 10,000,001 bytes; at most 10,000,000 are read"),
        ({"model.onnx": None}, r"is incomplete: its config\.json names model\.onnx, which the repository lacks"),
        ({"files": {}}, "has no sha256 of its files"),
        ({"files": {"../../x.onnx": "0" * 64}}, r"names the file '\.\./\.\./x\.onnx', which no model directory has"),
        ({"files": {"model.pkl": "0" * 64}}, r"names the file 'model\.pkl'"),
        ({"files": {"model*.onnx": "0" * 64}}, r"names the file 'model\*\.onnx'"),
    ],
)
def test_wrong_repositories_get_a_sentence(hub, change, sentence):
    files = hub.repos["org/small"]["main"]
    for name, data in change.items():
        if name == "files":
            values = json.loads(files["config.json"])
            values["artefacts"]["fp32"]["files"] = data
            files["config.json"] = json.dumps(values).encode()
        elif data is None:
            del files[name]
        else:
            files[name] = data
    with pytest.raises(CheckpointError, match=sentence):
        model_dir("hf:org/small")


def test_too_large_a_model_is_not_downloaded(hub, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 5000)
    with pytest.raises(CheckpointError, match=r"has files of 0\.0 GB; at most 0 are downloaded"):
        model_dir("hf:org/small")
    assert downloads(hub) == ["card.md", "config.json"]


def test_revisions_and_tokens(hub, monkeypatch):
    with pytest.raises(CheckpointError, match="the repository has no such revision"):
        model_dir("hf:org/small@v9")
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match="no such repository, or it is private and HF_TOKEN is missing"):
        model_dir("hf:org/small")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="HF_TOKEN is missing or wrong") as caught:
        model_dir("hf:org/small")
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert model_dir("hf:org/small").is_dir()
    hub.status = 403
    with pytest.raises(CheckpointError, match=r"answered 403 \(HF_TOKEN is missing, wrong, or lacks the permission\)"):
        model_dir("hf:org/small@v2")


def test_a_missing_package_gets_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(EngineUnavailableError, match=r"hf:org/name needs huggingface_hub: pip install '\.\[hub\]'"):
        model_dir("hf:org/name")


def test_a_model_by_name_draws_like_its_directory(demo_dir, tmp_path):
    """Through HF_ENDPOINT, in a process of its own; the files of the cache are links, which engines must follow."""
    script = (
        "import dsd_serve\n"
        "for place in ('hf:org/demo', None):\n"
        "    with dsd_serve.load(place) as model:\n"
        "        print(model.info.fingerprint, model.generate(207, seed=3, num_steps=2).tobytes().hex()[:200])\n"
    )
    with running_hub() as hub:
        hub.repos["org/demo"] = {"main": {file.name: file.read_bytes() for file in demo_dir.iterdir()}}
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    by_name, bundled = done.stdout.splitlines()
    assert by_name == bundled
