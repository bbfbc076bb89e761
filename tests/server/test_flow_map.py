"""A model with a flow map through the whole system: images in few steps, and the sampler only where a model has it."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import dsd_serve
from dsd_serve.checkpoint import read_model_dir, read_weights
from dsd_serve.engines import load_engine
from dsd_serve.engines.torch_engine import TorchEngine
from dsd_serve.errors import CheckpointError, InputError
from dsd_serve.flow import jump
from dsd_serve.imaging.codec import write_image
from dsd_serve.network import DSD
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Interpolate, WalkEnd, edit, generate, run
from dsd_serve.rows import Decode, Denoise
from dsd_serve.samplers import initial_noise
from dsd_serve.shell import generate_command, verify_command
from server.openapi_model import name_samplers
from tests.support.answers import events_of, problem
from tests.support.data import sample_image
from tests.support.models import FLOW_MAP
from tests.support.servers import serving

PHOTO = write_image(sample_image(1, 1))


@pytest.fixture(scope="module")
def http(flow_map_dir: Path, own_dir: Path) -> Iterator[httpx.Client]:
    """A server of the model, and of one without a flow map."""
    models = ("--model", f"fast={flow_map_dir}", "--model", f"slow={own_dir}")
    with serving(*models, "--threads", "1") as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def engine(flow_map_dir: Path):
    return load_engine("onnx", flow_map_dir, num_threads=1)


def drawn(engine, label: int, seed: int, ts: list[float], guidance: float = 1.0):
    """The image of the sampler, written out."""
    z = initial_noise(seed, 0, engine.config.latent_shape)
    for t, r in pairwise(ts):
        z_hat, z_null = engine.run([Denoise(z, t, label, r), Denoise(z, t, engine.config.null_label, r)])
        z = jump(z_hat if guidance == 1 else z_null + np.float32(guidance) * (z_hat - z_null), z, t, r)
    return engine.run([Decode(z)])[0]


def pixels_of(answer: httpx.Response):
    assert answer.status_code == 200, answer.text
    return np.array(Image.open(io.BytesIO(answer.content))).transpose(2, 0, 1)


@pytest.mark.parametrize("guidance", [1, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_images_of_any_number_of_steps(http, engine, steps, guidance):
    query = {"class": 1, "seed": 5, "steps": steps, "guidance": guidance}
    answer = http.get("/generate", params=query)
    assert answer.headers["X-DSD-Sampler"] == "flow_map", "its recommendation"
    expected = drawn(engine, 1, 5, [i / steps for i in range(steps)] + [1.0], guidance)
    assert np.array_equal(pixels_of(answer), expected)


def test_the_default_is_three_rows(http, engine, flow_map_dir):
    model = http.get("/model").json()
    assert model["defaults"] == {
        "steps": 2,
        "sampler": "flow_map",
        "guidance": 1,
        "guidance_start": 0,
        "guidance_stop": 1,
    }
    assert model["samplers"] == ["euler", "heun", "dpmpp_2m", "flow_map"]
    rows = "an image with these settings takes 3 rows, 2 to denoise and 1 to decode"
    assert rows in http.get("/model/card").text
    assert np.array_equal(
        pixels_of(http.get("/generate", params={"class": 0, "seed": 1})), drawn(engine, 0, 1, [0, 0.5, 1])
    )


def test_the_other_samplers_draw_as_with_the_same_weights_in_a_model_without_a_flow_map(http, flow_map_dir):
    network = DSD(replace(FLOW_MAP, flow_map=False))
    network.load_state_dict({name: torch.from_numpy(array) for name, array in read_weights(flow_map_dir).items()})
    twin = TorchEngine(network)
    for sampler in ("euler", "heun", "dpmpp_2m"):
        params = SamplingParams(seed=2, num_steps=4, sampler=sampler, guidance_scale=2.0)
        query = {"class": 1, "seed": 2, "steps": 4, "sampler": sampler, "guidance": 2}
        served = pixels_of(http.get("/generate", params=query))
        assert np.abs(served.astype(int) - run(twin, generate(twin.config, 1, params))).max() <= 1
    with pytest.raises(InputError, match="sampler must be one of euler, heun, dpmpp_2m with this model"):
        run(twin, generate(twin.config, 1, replace(params, sampler="flow_map")))
    with pytest.raises(InputError, match="r, the time to jump to, is for models with a flow map"):
        twin.run([Denoise(initial_noise(0, 0, twin.config.latent_shape), 0.5, 1, 0.75)])


def test_a_model_without_a_flow_map_says_which_samplers_it_has(http, own_dir, tmp_path, monkeypatch, capsys):
    sentence = "sampler must be one of euler, heun, dpmpp_2m with this model, got 'flow_map'"
    query = {"class": 1, "sampler": "flow_map", "model": "slow"}
    assert sentence in problem(http.get("/generate", params=query), 422)
    assert sentence in problem(http.post("/edit", params=query, content=PHOTO), 422)
    assert http.get("/model", params={"model": "slow"}).json()["samplers"] == ["euler", "heun", "dpmpp_2m"]
    body = {"prompt": "Café", "sampler": "flow_map", "model": "slow"}
    answer = http.post("/v1/images/generations", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, sentence)
    with dsd_serve.load(own_dir) as model, pytest.raises(InputError, match=sentence):
        model.generate(1, sampler="flow_map")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=sentence):
        generate_command.main(["1", "--sampler", "flow_map", "--model", str(own_dir)])
    for file in own_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    values["sampling"]["sampler"] = "flow_map"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=sentence):
        read_model_dir(tmp_path)


def test_the_document_has_the_samplers_of_the_models(http):
    def listed(document):
        (query,) = (p for p in document["paths"]["/generate"]["get"]["parameters"] if p["name"] == "sampler")
        return query["schema"]["enum"], document["components"]["schemas"]["ModelAnswer"]["properties"]["samplers"]

    document = http.get("/openapi.json").json()
    enum, of_model = listed(document)
    assert enum == ["euler", "heun", "dpmpp_2m", "flow_map", None]
    assert of_model["items"]["enum"] == enum[:-1]
    name_samplers(document, ("euler", "heun", "dpmpp_2m"))
    assert listed(document)[0] == ["euler", "heun", "dpmpp_2m", None]
    assert '"flow_map"' not in json.dumps(document)


def test_previews_are_the_clean_estimates_of_the_jumps(http, engine):
    query = {"class": 1, "seed": 3, "steps": 3, "format": "events", "preview_every": 1}
    events = events_of(http.get("/generate", params=query))
    assert [kind for kind, _ in events].count("preview") == 2
    shown = base64.b64decode(next(value for kind, value in events if kind == "preview")["base64"])
    z = initial_noise(3, 0, engine.config.latent_shape)
    (z_hat,) = engine.run([Denoise(z, 0.0, 1, 1 / 3)])
    (expected,) = engine.run([Decode(z_hat)])
    assert np.array_equal(np.array(Image.open(io.BytesIO(shown))).transpose(2, 0, 1), expected)


def test_edits_masks_and_walks(http, engine):
    config, params = engine.config, SamplingParams(seed=4, num_steps=4, sampler="flow_map", guidance_scale=1.5)
    query = {"class": 2, "seed": 4, "steps": 4, "guidance": 1.5}
    pixels = sample_image(1, 1, size=16)
    mask = np.zeros((16, 16), bool)
    mask[:6, 3:] = True
    png, mask_png = write_image(pixels), write_image(np.repeat(255 * mask[None].astype(np.uint8), 3, 0))
    for strength in (0.2, 0.5, 1.0):
        expected = run(engine, edit(config, pixels, 2, params, strength))
        answer = http.post("/edit", params={**query, "strength": strength}, content=png)
        assert np.array_equal(pixels_of(answer), expected)
    answer = http.post("/edit", params={**query, "strength": 0.9}, files={"image": png, "mask": mask_png})
    assert np.array_equal(pixels_of(answer), run(engine, edit(config, pixels, 2, params, 0.9, mask)))
    assert np.array_equal(pixels_of(answer)[:, ~mask], pixels[:, ~mask])
    walk = {"from": {"class": 0, "seed": 1}, "to": {"class": 2, "seed": 2}, "n": 3, "steps": 2}
    strip = pixels_of(http.post("/interpolate", json=walk))
    fast = SamplingParams(num_steps=2, sampler="flow_map")
    for number, fraction in enumerate((0, 0.5, 1)):
        task = Interpolate(WalkEnd(0, 1), WalkEnd(2, 2), fraction, fast)
        assert np.array_equal(strip[:, :, 16 * number : 16 * (number + 1)], run(engine, task.program(config)))


def test_files_say_how_they_were_drawn_and_are_drawn_again(http, flow_map_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    png = http.get("/generate", params={"class": 1, "seed": 7, "steps": 1}).content
    settings = json.loads(Image.open(io.BytesIO(png)).text["dsd"])
    assert (settings["sampler"], settings["steps"]) == ("flow_map", 1)
    generate_command.main(
        ["1", "--seed", "7", "--steps", "1", "-o", "one.png", "--model", str(flow_map_dir), "--size", "16"]
    )
    with dsd_serve.load(flow_map_dir) as model:
        assert np.array_equal(np.array(model.generate(1, seed=7, num_steps=1)), np.array(Image.open("one.png")))
    Path("served.png").write_bytes(png)
    capsys.readouterr()
    verify_command.main(["one.png", "--model", str(flow_map_dir)])
    assert capsys.readouterr().out == "one.png: identical bytes\n"
