"""Several models in one server: each by its name, loaded when it is first needed, at rest when it is not."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from dsd_serve.errors import CheckpointError, ConfigError
from server.service import Service
from server.settings import Settings, parse_settings
from tests.support.answers import events_of, problem
from tests.support.servers import Server, running_server, until

QUICK = {"steps": 1, "sampler": "euler", "seed": 1}


@pytest.fixture(scope="module")
def several(own_dir, plain_dir):
    with running_server("--model", f"a={own_dir}", "--model", f"b={plain_dir}", "--threads", "1") as server:
        yield server


@pytest.fixture
def http(several):
    with httpx.Client(base_url=several.url, timeout=60) as client:
        yield client


def test_a_request_names_its_model(http, several):
    shown = {name: http.get("/model", params={"model": name}).json() for name in ("a", "b")}
    assert {name: one["name"] for name, one in shown.items()} == {"a": "a", "b": "b"}
    assert shown["a"]["fingerprint"] != shown["b"]["fingerprint"]
    assert http.get("/model").json() == shown["a"]  # the first
    for query, name in (({"class": 1}, "a"), ({"class": 1, "model": "a"}, "a"), ({"model": "b"}, "b")):
        answer = http.get("/generate", params={**QUICK, **query})
        assert answer.headers["x-dsd-model"] == name
        answer = http.post("/generate", json={**QUICK, **query, "format": "json"}).json()
        assert (answer["model"], answer["fingerprint"]) == (name, shown[name]["fingerprint"])
        events = events_of(http.get("/generate", params={**QUICK, **query, "format": "events"}))
        assert {value["model"] for kind, value in events if kind != "preview"} == {name}
    walk = {"from": {"seed": 1}, "to": {"seed": 2}, "n": 2, "model": "b", "format": "json", **QUICK}
    assert http.post("/interpolate", json={**walk, "seed": None}).json()["model"] == "b"
    image = http.get("/generate", params={**QUICK, "model": "b"}).content
    for path in ("/edit", "/reconstruct"):
        answer = http.post(path, params={"model": "b", "format": "json"}, content=image).raise_for_status().json()
        assert answer["model"] == "b"
    latents = [http.post("/encode", params={"model": name}, content=image).content for name in ("a", "b")]
    assert latents[0] != latents[1]
    assert len(http.get("/classes", params={"model": "a"}).json()) == 3
    assert http.get("/classes", params={"model": "b"}).json() == []


def test_openai_clients_name_it_too(http):
    listed = http.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["a", "b"]
    assert http.get("/v1/models/b").json() == listed[1]
    body = {"prompt": "image", "model": "b", "num_inference_steps": 1}
    assert http.post("/v1/images/generations", json=body).headers["x-dsd-model"] == "b"
    wrong = http.post("/v1/images/generations", json={**body, "model": "c"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["message"] == "there is no model 'c' here; this server has a, b"
    assert wrong.json()["error"]["code"] == "model_not_found"


def test_an_unknown_name_is_one_sentence(http):
    sentence = "there is no model 'c' here; this server has a, b"
    for path in ("/generate", "/model", "/model/card", "/classes", "/debug/batcher"):
        assert problem(http.get(path, params={"model": "c"}), 422) == sentence


def test_metrics_and_state_of_each(several, http):
    before = several.metrics()
    http.get("/generate", params={**QUICK, "model": "b", "n": 3})
    after = several.metrics()
    assert after[("dsd_model_images_total", "b")] == before.get(("dsd_model_images_total", "b"), 0) + 3
    assert after[("dsd_model_ready", "a")] == after[("dsd_model_ready", "b")] == 1
    assert after[("dsd_engine_process", "ready")] == 2
    assert sorted(labels[3] for name, *labels in after if name == "dsd_model_info") == ["a", "b"]
    state = http.get("/debug/batcher").json()
    assert sorted(state["models"]) == ["a", "b"]
    assert state["ticks"] == sum(one["ticks"] for one in state["models"].values())
    assert http.get("/debug/batcher", params={"model": "b"}).json()["process"]["pid"]


def test_the_document_is_that_of_all_models(http):
    document = http.get("/openapi.json").json()
    parameters = document["paths"]["/generate"]["get"]["parameters"]
    (model,) = [one["schema"] for one in parameters if one["name"] == "model"]
    assert ["a", "b"] in [part.get("enum") for part in model["anyOf"]]


def test_models_that_are_loaded_when_needed(own_dir, plain_dir, tmp_path):
    arguments = ("--model", f"a={own_dir}", "--model", f"b={plain_dir}", "--lazy", "--rest-after", "1.5")
    running = Server(*arguments, "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        assert http.get("/health/ready").status_code == 200
        assert [one["id"] for one in http.get("/v1/models").json()["data"]] == ["a", "b"]
        assert len(http.get("/classes").json()) == 3
        assert http.get("/openapi.json").status_code == 200
        assert "dsd_engine_process" not in {name for name, *_ in running.metrics()}  # nothing is loaded yet
        asked = [pool.submit(httpx.get, running.url + "/generate", params={**QUICK, "model": "b"}) for _ in range(8)]
        images = {one.result().content for one in asked}
        assert len(images) == 1
        after = running.metrics()
        assert after[("dsd_model_loads_total", "b", "done")] == 1
        assert after[("dsd_model_ready", "a")] == 0 and after[("dsd_model_ready", "b")] == 1
        until(lambda: running.metrics()[("dsd_model_ready", "b")] == 0)
        assert http.get("/health/ready").status_code == 200
        assert http.get("/model", params={"model": "b"}).json()["name"] == "b"  # which does not wake it
        assert running.metrics()[("dsd_model_ready", "b")] == 0
        until(lambda: ("dsd_engine_process", "ready") not in running.metrics())
        late = http.get("/generate", params={**QUICK, "model": "a", "class": 1, "timeout": 0.01})
        assert "still being loaded" in problem(late, 503)
        assert late.headers["retry-after"]
        until(lambda: http.get("/generate", params={**QUICK, "model": "a", "class": 1}).status_code == 200)
        again = http.get("/generate", params={**QUICK, "model": "b"})
        assert {again.content} == images
    assert running.stop() == 0
    assert "Traceback" not in running.log


def test_a_model_that_cannot_be_loaded_later(own_dir, tmp_path):
    """Its requests get a sentence without the path, the others are served, and it is tried again after a while."""
    (tmp_path / "b").symlink_to(own_dir)
    arguments = ("--model", f"a={own_dir}", "--model", f"b={tmp_path / 'b'}", "--lazy")
    running = Server(*arguments, "--threads", "1", folder=tmp_path)
    with httpx.Client(base_url=running.url, timeout=60) as http:
        (tmp_path / "b").unlink()
        for _ in range(3):
            answer = http.get("/generate", params={**QUICK, "model": "b", "class": 1})
            assert problem(answer, 503) == "the model b cannot be loaded; the server's log says why"
        assert running.metrics()[("dsd_model_loads_total", "b", "failed")] == 1
        assert running.log.count(f"{tmp_path / 'b'} is not a model directory") == 1
        assert http.get("/generate", params={**QUICK, "class": 1}).status_code == 200
        (tmp_path / "b").symlink_to(own_dir)
        began = time.monotonic()
        until(lambda: http.get("/generate", params={**QUICK, "model": "b", "class": 1}).status_code == 200)
        assert time.monotonic() - began < 15
    assert running.stop() == 0


def test_settings_of_several(own_dir, tmp_path, monkeypatch):
    assert parse_settings(["--model", "a=x", "--model", "b=y,z"]).model == ("a=x", "b=y,z")
    for text, models in (("a=x,b=y", ("a=x", "b=y")), ("x,y", ("x,y",)), ("a=x,y", ("a=x,y",))):
        monkeypatch.setenv("DSD_MODEL", text)
        assert parse_settings([]).model == models
    for models, sentence in (
        (("a=x", "y"), "several models need a name each"),
        (("a=x", "a=y"), "the names of models must differ, and a is given twice"),
        (tuple(f"m{i}=x" for i in range(40)), "at most 32 models, got 40"),
        (("a=x", "b=y"), "engine_process must be auto or on"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Service(Settings(model=models, engine_process="off" if sentence.startswith("engine") else "auto"))
    with pytest.raises(CheckpointError, match="is not a model directory"):  # at once, not with the first request
        Service(Settings(model=(f"a={own_dir}", f"b={tmp_path}"), lazy=True))
