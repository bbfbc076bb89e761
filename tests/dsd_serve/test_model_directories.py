"""Damaged model directories are rejected with a sentence before anything is served."""

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd_serve.checkpoint import read_model_dir, read_text, read_weights
from dsd_serve.config import ModelConfig
from dsd_serve.errors import CheckpointError, ConfigError, DSDError
from dsd_serve.files import demo_model
from dsd_serve.loading import load
from tests.support.data import ROOT

HONEST = json.loads((demo_model() / "config.json").read_text())
GRAPH = next(name for name in ("model.ort.onnx", "model.onnx") if (demo_model() / name).exists())


def paths_of(value, path=()):
    """The paths of all values in config.json."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*path, key))
    elif isinstance(value, list):
        yield from ((*path, number) for number in range(len(value)))


def replaced(path, value):
    if not path:
        return value
    tree = copy.deepcopy(HONEST)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


WRONG = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**9,
        10**400,
        -(10**400),
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "x" * 99999,
    ),
    *([], [[]], [None], ["a"], [1, 1], [True], [-1], [10**400], {}, {"a": 1}, {"files": {}}, {"files": {"a": 1}}, "\n"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@given(path=st.sampled_from(list(paths_of(HONEST))), value=st.sampled_from(WRONG) | json_values)
def test_any_value_at_any_key_of_config_json_is_accepted_or_gets_a_sentence(scratch, path, value):
    sys.set_int_max_str_digits(0)  # to write them; the reader has its limit back
    (scratch / "config.json").write_text(json.dumps(replaced(path, value)))
    sys.set_int_max_str_digits(4300)
    try:
        found = read_model_dir(scratch)
    except CheckpointError as error:
        assert len(str(error)) < 600 + len(str(scratch)) and "\n" not in str(error)
        assert "Error" not in str(error) and "not supported between" not in str(error)
    else:
        config = found.config
        assert all(type(label) is int and 0 <= label < 1000 for label in config.classes)
        assert isinstance(found.name, str) and found.name.isprintable() and found.name
        np.empty(config.pixel_shape, np.uint8), np.empty(config.latent_shape, np.float32)  # fit into memory
        found.check([])


@pytest.mark.parametrize("path", [path for path in paths_of(HONEST) if len(path) < 4], ids=str)
def test_every_wrong_type_is_rejected(tmp_path, path):
    """Each value is replaced by values of other types."""
    honest = HONEST
    for key in path:
        honest = honest[key]
    others = [value for value in ("x", 7, 1.5, [1], {"a": 1}, True) if type(value) is not type(honest)]
    if isinstance(honest, float):
        others.remove(7)
    for value in others:
        of_files = path[:1] == ("artefacts",) and path[2:3] != ("files",)
        if len(path) > 2 and (of_files or path[:2] == ("class_images", "made_from")):
            continue  # what dsd-export recorded for people and for itself
        (tmp_path / "config.json").write_text(json.dumps(replaced(path, value)))
        with pytest.raises(CheckpointError):
            read_model_dir(tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe{}", "it is not UTF-8"),
        (json.dumps(HONEST).encode("utf-16"), "it is not UTF-8"),
        (b"", "cannot be read"),
        (b"\0" * 100, "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (json.dumps(HONEST).encode()[:-9], "cannot be read"),
        (b" " * 10_000_001, "larger than 10 MB"),
        (b"5", "is not of format"),
    ],
)
def test_broken_config_files(tmp_path, data, words):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_model_dir(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(HONEST).encode())
    assert read_model_dir(tmp_path).name == HONEST["name"]


def test_impossible_numbers_are_rejected(config=HONEST["network"]):
    for name, value in (("image_size", 10**6), ("hidden_size", 10**7), ("num_classes", 100_001), ("depth", 10**30)):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number from [01] to"):
            ModelConfig.from_dict({**config, name: value})
    with pytest.raises(ConfigError, match="the latents of one image must be at most"):
        ModelConfig.from_dict({**config, "image_size": 4096, "patch_size": 1})


def directory(file):
    file.unlink()
    file.mkdir()


def loop(file):
    file.unlink()
    file.symlink_to(file.name)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


def dangling(file):
    file.unlink()
    file.symlink_to("nowhere")


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


LOADED = [GRAPH, "model.safetensors"]
DAMAGE = [directory, loop, pipe, device, dangling, half, empty, zeros, flipped]


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(demo_model(), tmp_path / "model")


def without_hashes(model):
    values = json.loads((model / "config.json").read_text())
    values.pop("artefacts", None)
    (model / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "recorded"),
    [*((name, True) for name in ("config.json", "card.md", *LOADED)), *((name, False) for name in LOADED)],
)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_gets_a_sentence(model, name, damage, recorded):
    """With the hashes in config.json, and without them."""
    if not recorded:
        without_hashes(model)
    plain, other = (model / name for name in ("model.onnx", "model.ort.onnx"))
    if plain.exists() and other.exists():
        (plain if name == other.name else other).unlink()  # or the other graph takes the place of a missing one
        if name not in (plain.name, other.name):
            shutil.copy(demo_model() / GRAPH, model / GRAPH)
    damage(model / name)
    try:
        load(model, row_budget=1).close()
    except DSDError as error:
        assert len(str(error)) < 700 + 2 * len(str(model)) and "\n" not in str(error)
    else:
        harmless = name == "card.md" and damage in (dangling, loop, half, empty, zeros, flipped)
        harmless |= name == "config.json" and damage is flipped  # in what nothing depends on
        assert harmless or (not recorded and damage in (flipped, zeros, half)), "it was served"


def test_a_graph_of_another_network_is_rejected(model):
    values = json.loads((model / "config.json").read_text())
    values["network"] |= {"image_size": 64, "patch_size": 16}
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"does not belong to its config\.json: encode_pixels is"):
        load(model, row_budget=1)


def test_a_graph_of_a_flow_map_needs_a_configuration_that_says_so(flow_map_dir, tmp_path):
    shutil.copytree(flow_map_dir, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    del values["network"]["flow_map"]
    values["sampling"]["sampler"] = "euler"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="'denoise_r' is not among the inputs and outputs of such a model"):
        load(file.parent, row_budget=1)


def test_non_finite_weights_are_rejected(model):
    without_hashes(model)
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not finite"):
        load(model, row_budget=1)


@pytest.mark.parametrize("damage", [directory, pipe, device, half, empty, zeros], ids=lambda damage: damage.__name__)
def test_damaged_weights_get_a_sentence_from_torch_too(model, damage):
    damage(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_weights(model)


def test_an_unreadable_card(model):
    (model / "card.md").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"card\.md cannot be read: it is not UTF-8"):
        read_text(model / "card.md")
    command = [sys.executable, "-m", "server.main", "--port", "0", "--row-budget", "1", "--model", str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith("card.md cannot be read: it is not UTF-8")
    assert done.stderr.splitlines()[-1].startswith("dsd-serve: ")


def test_impossible_paths(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("x" * 5000), tmp_path / "a\nb", ROOT / "README.md"):
        with pytest.raises(CheckpointError):
            load(path)
