import json
import os
import pickle

import pytest
import torch

from dsd_serve.checkpoint import read_checkpoint, read_model_dir, read_weights, write_checkpoint
from dsd_serve.errors import CheckpointError
from dsd_serve.files import atomic


def pickle_to(value, path):
    path.write_bytes(pickle.dumps(value))


def test_a_pickle_with_code_is_rejected(tmp_path):
    marker = tmp_path / "was-here"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for name, write in (("torch.pt", torch.save), ("plain.pt", pickle_to)):
        write({"format": "dsd-checkpoint-1", "ema": Payload()}, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"refused: .* something other than tensors"):
            read_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    for name, content in (("empty.pt", b""), ("text.pt", b"hello, world"), ("zip.pt", b"PK\x03\x04" + b"\0" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"{name} is (refused|not a checkpoint of dsd-train, or it is cut off)"
        ):
            read_checkpoint(tmp_path / name)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of dsd-train"):
        read_checkpoint(tmp_path / "other.pt")


def test_a_truncated_checkpoint_is_named(checkpoint, tmp_path):
    data = checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"half\.pt is (not a checkpoint|refused)"):
        read_checkpoint(tmp_path / "half.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"step": 1})
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk full")
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "not a model directory"),
        ("{", "cannot be read"),
        ("[]", "not of format"),
        ('{"format": "dsd-model-1", "name": "x"}', "network"),
        ('{"format": "dsd-model-1", "name": "x", "network": {"image_size": 32}}', "incomplete"),
    ],
)
def test_a_wrong_model_directory_is_named(tmp_path, text, named):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=named):
        read_model_dir(tmp_path)


def test_wrong_sampling_defaults_are_named(tiny_dir, tmp_path):
    values = json.loads((tiny_dir / "config.json").read_text())
    values["sampling"]["sampler"] = "magic"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="euler, heun, dpmpp_2m, flow_map, got 'magic'"):
        read_model_dir(tmp_path)


def test_a_model_directory_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        read_weights(tmp_path)


def test_the_fingerprint_changes_with_the_weights(tiny_dir, tmp_path):
    for file in tiny_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = read_model_dir(tmp_path).fingerprint()
    assert before == read_model_dir(tiny_dir).fingerprint()
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert read_model_dir(tmp_path).fingerprint() != before
