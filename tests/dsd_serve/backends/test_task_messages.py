"""Messages to Triton, the model repository, and the front without Triton; no tritonserver is needed."""

import sys
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest

from dsd_serve.backends.task_messages import error_from_text, error_to_text, from_wire, results_to_wire, to_wire
from dsd_serve.backends.triton.addresses import parse_addresses
from dsd_serve.checkpoint import read_model_dir
from dsd_serve.errors import CheckpointError, ConfigError, DeadlineError, InputError, QueueFullError
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Edit, Generate, Interpolate, Reconstruct, WalkEnd
from dsd_serve.rows import Decode, Denoise, Encode
from export.triton_repository import write_repository
from server.main import main
from tests.support.data import sample_image
from tests.support.servers import Server

PARAMS = SamplingParams(2**63 - 1, 3, 7, "dpmpp_2m", 1.1 + 0.2, 0.1, 0.7, 2)


@pytest.fixture(scope="module")
def directory(demo_dir):
    """The demo model without its flow map."""
    demo = read_model_dir(demo_dir)
    return replace(demo, config=replace(demo.config, flow_map=False), defaults=SamplingParams(guidance_scale=2.0))


def tasks_of(config):
    pixels = sample_image(1, 1, size=config.image_size)
    z = np.random.default_rng(0).standard_normal(config.latent_shape, dtype=np.float32)
    mask = pixels[0] > 100
    return [
        Generate(207, PARAMS),
        Edit(pixels, 207, PARAMS, 1 / 3, mask),
        Edit(pixels, config.null_label, PARAMS, 0.5),
        Reconstruct(pixels),
        Interpolate(WalkEnd(207, PARAMS.seed, PARAMS.index), WalkEnd(1, 5, 6), 1 / 7, PARAMS),
        Encode(pixels),
        Decode(z),
        Denoise(z, 1 / 3, config.null_label),
    ]


def same(a, b) -> bool:
    values = [[getattr(one, name) for name in one.__dataclass_fields__] for one in (a, b)]
    return type(a) is type(b) and all(
        np.array_equal(x, y) if x is not None else y is None for x, y in zip(*values, strict=True)
    )


def test_tasks_survive_the_round_trip(directory):
    for task in tasks_of(directory.config):
        inputs, parameters = to_wire(task)
        assert all(isinstance(value, str | int | float) for value in parameters.values())
        (arrived,), seconds = from_wire(inputs, parameters, directory.config, directory.defaults)
        assert same(arrived, task), task
        assert seconds is None


def test_a_denoise_row_of_a_flow_map_may_have_the_time_to_jump_to(directory):
    flow_map = replace(directory.config, flow_map=True)
    z = np.zeros(flow_map.latent_shape, np.float32)
    for row in (Denoise(z, 1 / 3, 207, 2 / 3), Denoise(z, 1 / 3, 207, 1.0), Denoise(z, 1 / 3, 207)):
        (arrived,), _ = from_wire(*to_wire(row), flow_map, directory.defaults)
        assert same(arrived, row)
    inputs, parameters = to_wire(Denoise(z, 0.5, 207, 0.75))
    with pytest.raises(InputError, match="denoise does not take r"):
        from_wire(inputs, parameters, directory.config, directory.defaults)
    for r in (0.25, 1.25, np.nan):
        with pytest.raises(InputError, match=f"r must be from t to 1, got {r} for t = 0.5"):
            from_wire({**inputs, "r": np.array([r])}, parameters, flow_map, directory.defaults)
    with pytest.raises(InputError, match="r must have as many rows as t, got 2 and 1"):
        from_wire({**inputs, "r": np.ones(2)}, parameters, flow_map, directory.defaults)


def test_missing_settings_default_to_the_recommendation(directory):
    (task,), seconds = from_wire(
        {}, {"operation": "generate", "label": "orange", "max_seconds": 3}, directory.config, directory.defaults
    )
    assert (task, seconds) == (Generate(950, directory.defaults), 3.0)


def test_each_row_is_a_task(directory):
    pixels = np.stack([sample_image(1, i, size=32) for i in range(3)])
    tasks, _ = from_wire({"pixels": pixels}, {"operation": "encode"}, directory.config, directory.defaults)
    assert [np.array_equal(task.pixels, one) for task, one in zip(tasks, pixels, strict=True)] == [True] * 3
    assert results_to_wire([np.zeros((16, 16), np.float32)] * 3)["latents"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operation": "paint"}, "operation must be one of generate, edit"),
        ({"operation": 3}, "operation must be of type str"),
        ({"label": None}, "label is missing"),
        ({"label": 3}, "tiger shark, which this model was not trained on"),
        ({"label": True}, "label must be of type int"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be of type int, got 1.5"),
        ({"seed": 10**400}, "seed must be a whole number from 0"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, got a number of 401 digits"),
        ({"label": "x" * 1_000_000}, "label must have at most 200 characters"),
        ({"label": "金"}, "label must be an index, a wnid"),
        ({"operation": "interpolate", "fraction": 0.5, "to_label": "²"}, "to_label must be an index, a wnid"),
        ({"sampler": "x" * 1_000_000}, "sampler must be one of"),
        ({"sampler": "flow_map"}, "sampler must be one of euler, heun, dpmpp_2m with this model, got 'flow_map'"),
        ({"x" * 1_000_000: 1}, "generate does not take x"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be between 0"),
        ({"guidence": 2.0}, "generate does not take guidence; is it misspelt?"),
        ({"max_seconds": 0}, "max_seconds must be above 0"),
        ({"operation": "interpolate", "to_label": 1, "fraction": 1.5}, "fraction must be from 0 to 1"),
        ({"operation": "edit", "strength": 0.5}, "the input pixels is missing"),
    ],
)
def test_wrong_parameters_get_a_sentence(directory, change, words):
    parameters = {"operation": "generate", "label": 207, **change}
    parameters = {name: value for name, value in parameters.items() if value is not None}
    with pytest.raises(InputError, match=words.replace("?", r"\?")) as caught:
        from_wire({}, parameters, directory.config, directory.defaults)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("operation", "inputs", "words"),
    [
        ("encode", {"pixels": np.zeros((3, 32, 32), np.uint8)}, r"must be uint8 \[3, 32, 32\], got uint8 \[32, 32\]"),
        ("encode", {"pixels": np.zeros((1, 3, 32, 32), np.float32)}, "got float32"),
        ("reconstruct", {"pixels": np.zeros((2, 3, 32, 32), np.uint8)}, "must have one row for this operation, got 2"),
        ("decode", {"latents": np.zeros((0, 16, 32), np.float32)}, "the input latents is missing"),
        ("decode", {"latents": np.zeros((1, 16, 32), np.float32), "t": np.zeros(1)}, "decode does not take t"),
        (
            "denoise",
            {"latents": np.zeros((1, 16, 32), np.float32), "t": np.ones(1), "labels": np.ones(1, np.int64)},
            "t must be from 0 to below 1",
        ),
        (
            "denoise",
            {"latents": np.zeros((2, 16, 32), np.float32), "t": np.zeros(1), "labels": np.ones(2, np.int64)},
            "must have as many rows, got 2, 1 and 2",
        ),
    ],
)
def test_wrong_tensors_get_a_sentence(directory, operation, inputs, words):
    with pytest.raises(InputError, match=words):
        from_wire(inputs, {"operation": operation}, directory.config, directory.defaults)


def test_errors_keep_their_type_and_sentence():
    full = error_from_text("Triton says: " + error_to_text(QueueFullError("300 images wait; try again later", 2.5)))
    assert isinstance(full, QueueFullError)
    assert (str(full), full.retry_after) == ("300 images wait; try again later", 2.5)
    assert isinstance(error_from_text(error_to_text(DeadlineError("too late"))), DeadlineError)
    assert "secret" not in error_to_text(KeyError("secret"))
    assert error_from_text("Stub process 'dsd_0_0' is not healthy.") is None
    assert error_from_text("ValueError: not one of ours") is None


@pytest.mark.parametrize("text", ["localhost", "localhost:", "http://a:8001", "a:8001,", "a:99999", "a:8001,a:8001"])
def test_wrong_addresses_get_a_sentence(text):
    with pytest.raises(ConfigError, match="triton"):
        parse_addresses(text)
    assert parse_addresses("a:8001, [::1]:8001") == ["a:8001", "[::1]:8001"]


def test_an_impossible_front_is_rejected(monkeypatch):
    with pytest.raises(SystemExit, match="dsd-serve: triton must be HOST:PORT"):
        main(["--triton", "localhost"])
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)  # as if it were not installed
    with pytest.raises(SystemExit, match=r"pip install '\.\[triton\]'"):
        main(["--triton", "localhost:8001"])


def test_a_repository_is_replaced_atomically(demo_dir, tmp_path):
    write_repository(demo_dir, tmp_path / "models", device="cpu")
    model = tmp_path / "models" / "dsd"
    assert "KIND_CPU" in (model / "config.pbtxt").read_text()
    (model / "1" / "stale").write_text("")
    write_repository(demo_dir, tmp_path / "models")
    text = (model / "config.pbtxt").read_text()
    assert "KIND_GPU" in text
    assert '"device" value { string_value: "cuda" }' in text
    assert not (model / "1" / "stale").exists()
    assert [one.name for one in (tmp_path / "models").iterdir()] == ["dsd"]
    assert read_model_dir(model / "model").fingerprint() == read_model_dir(demo_dir).fingerprint()
    with pytest.raises(CheckpointError, match="has no graph in int8"):
        write_repository(demo_dir, tmp_path / "models", precision="int8")
    with pytest.raises(CheckpointError, match="has no TensorRT plan"):
        write_repository(demo_dir, tmp_path / "models", engine="tensorrt")
    with pytest.raises(CheckpointError, match="is inside"):
        write_repository(model / "model", tmp_path / "models")


def test_a_front_without_triton_answers_503_and_stops_cleanly(free_port):
    pytest.importorskip("tritonclient", reason="the extra triton is not installed")
    address = f"127.0.0.1:{free_port()}"
    running = Server("--triton", address)
    with httpx.Client(base_url=running.url, timeout=10) as client:
        assert client.get("/health/live").status_code == 200
        for path in ("/health/ready", "/generate?class=207", "/model"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert f"no Triton server is ready: {address}" in answer.json()["detail"]
            assert answer.headers["retry-after"]
    began = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - began < 10
