"""Models that are replaced while the server runs: no request fails, none mixes models, nothing is left behind."""

import base64
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

import dsd_serve
from tests.conftest import made_once
from tests.support.answers import events_of, problem
from tests.support.models import OWN, export_model
from tests.support.servers import running_server, until

KEY = "0123456789-admin-key"
ADMIN = {"Authorization": f"Bearer {KEY}"}
SEEDS = 10
QUERY = {"class": 1, "steps": 4, "sampler": "euler", "guidance": 1}
SLOW = {"class": 1, "steps": 250, "sampler": "heun", "guidance": 2, "n": 16, "format": "json"}


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory) -> Path:
    """A model like that of own_dir, with other weights."""
    return made_once(tmp_path_factory, "other", lambda folder: export_model(replace(OWN, depth=1), folder)) / "model"


@pytest.fixture(scope="module")
def live(own_dir):
    with running_server("--model", str(own_dir), "--threads", "1", env={"DSD_ADMIN_KEY": KEY}) as server:
        yield server


@pytest.fixture
def http(live):
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def put(http, path, **headers):
    return http.post("/admin/model", json={"model": str(path)}, headers={**ADMIN, **headers})


def serve(http, path):
    return put(http, path).raise_for_status().json()


def images_of(path):
    """fingerprint -> seed -> PNG, from Python."""
    with dsd_serve.load(path) as model:
        settings = {"num_steps": QUERY["steps"], "sampler": QUERY["sampler"], "guidance_scale": 1.0}
        drawn = {seed: model.generate(1, seed=seed, **settings) for seed in range(SEEDS)}
        return {model.info.fingerprint: {seed: dsd_serve.to_png(image) for seed, image in drawn.items()}}


def test_a_swap_under_load(http, live, own_dir, other_dir):
    """200 requests during several swaps: all are answered, and each with the bytes of the model that it names."""
    expected = images_of(own_dir) | images_of(other_dir)
    assert len(expected) == 2
    seeds = itertools.count()
    answers = []

    def ask():
        with httpx.Client(base_url=live.url, timeout=60) as client:
            while (number := next(seeds)) < 200 or not swapped:
                query = {**QUERY, "seed": number % SEEDS, "format": "json" if number % 2 else "events"}
                answers.append((number % SEEDS, client.get("/generate", params=query)))

    swapped = False
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        for path in (other_dir, own_dir, other_dir):
            serve(http, path)
        swapped = True
        for one in asking:
            one.result()
    assert len(answers) >= 200
    used = set()
    for seed, answer in answers:
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"].startswith("application/json"):
            shown = answer.json()
            assert shown["fingerprint"] == shown["images"][0]["fingerprint"]
            (image,) = shown["images"]
        else:
            (image,) = [value for name, value in events_of(answer) if name == "image"]
        assert answer.headers["x-dsd-fingerprint"] == image["fingerprint"]
        used.add(image["fingerprint"])
        assert base64.b64decode(image["base64"]) == expected[image["fingerprint"]][seed]
    assert used == set(expected)


def test_a_request_ends_with_the_model_with_which_it_began(http, live, own_dir, other_dir):
    before = serve(http, own_dir)["fingerprint"]
    with ThreadPoolExecutor(6) as pool:
        slow = [pool.submit(httpx.get, live.url + "/generate", params=SLOW, timeout=60) for _ in range(6)]
        until(lambda: http.get("/debug/batcher").json()["running"])
        replaced = serve(http, other_dir)
        assert replaced["replaced"] == before != replaced["fingerprint"]
        assert not all(one.done() for one in slow)
        assert live.metrics()[("dsd_model_draining", "model")] == 1
        assert http.get("/model").json()["fingerprint"] == replaced["fingerprint"]
        assert http.get("/generate", params={**QUERY, "format": "json"}).json()["fingerprint"] != before
        for one in slow:
            assert {image["fingerprint"] for image in one.result().json()["images"]} == {before}
    until(lambda: live.metrics()[("dsd_model_draining", "model")] == 0)


def test_what_follows_the_model(http, live, own_dir, plain_dir):
    serve(http, own_dir)
    tag = http.get("/generate", params={**QUERY, "seed": 1}).headers["etag"]
    assert http.get("/generate", params={**QUERY, "seed": 1}, headers={"If-None-Match": tag}).status_code == 304
    document = http.get("/openapi.json").json()
    assert "class" in document["components"]["schemas"]["GenerateRequest"]["properties"]
    new = serve(http, plain_dir)
    assert http.get("/generate", params={**QUERY, "seed": 1}).status_code == 422  # it has no classes
    plain = {"steps": 4, "sampler": "euler", "seed": 1}
    assert http.get("/generate", params=plain, headers={"If-None-Match": tag}).status_code == 200
    assert "class" not in http.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]
    assert http.get("/classes").json() == []
    assert http.get("/v1/models").json()["data"][0]["id"] == "model"
    (fingerprint,) = [labels[2] for name, *labels in live.metrics() if name == "dsd_model_info"]
    assert fingerprint == new["fingerprint"]
    assert live.metrics()[("dsd_engine_process", "ready")] >= 1


def test_a_model_that_fails_changes_nothing(http, live, own_dir, tmp_path):
    before = serve(http, own_dir)["fingerprint"]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in own_dir.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    for path, sentence in ((damaged, "is not the file that config.json was written with"), (tmp_path, "has no config")):
        detail = problem(put(http, path), 422)
        assert sentence in detail and detail.endswith("; the model model is unchanged")
    wrong = http.post("/admin/model", json={"model": str(own_dir), "name": "b"}, headers=ADMIN)
    assert problem(wrong, 422) == "there is no model 'b' here; this server has model"
    assert http.get("/model").json()["fingerprint"] == before
    assert live.metrics()[("dsd_model_loads_total", "model", "failed")] >= 2


def test_who_may_replace_models(http, server_url, own_dir):
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer another-key-of-some"}):
        assert "admin key" in problem(put(http, own_dir, **headers), 403)
    ours = http.post("/admin/model", json={"model": str(own_dir)}, headers={"X-API-Key": KEY})
    assert ours.status_code == 200
    answer = httpx.post(server_url + "/admin/model", json={"model": str(own_dir)}, headers=ADMIN)
    assert "there is no /admin/model here" in problem(answer, 404)
    assert "/admin/model" in http.get("/openapi.json").json()["paths"]
    assert "/admin/model" not in httpx.get(server_url + "/openapi.json").json()["paths"]


def test_swaps_of_one_model_take_turns(http, own_dir, other_dir):
    serve(http, own_dir)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda path: put(http, path), (other_dir, own_dir, other_dir)))
    assert [answer.status_code for answer in answers] == [200] * 3
    found = http.get("/model").json()["fingerprint"]
    assert found in {answer.json()["fingerprint"] for answer in answers}


def resources(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "processes": sum(
            f"\nPPid:\t{pid}\n" in Path(f"/proc/{other}/status").read_text()
            for other in os.listdir("/proc")
            if other.isdigit() and Path(f"/proc/{other}/status").exists()
        ),
        "mb": rss / 1000,
    }


def test_twenty_swaps_leave_nothing_behind(http, live, own_dir, other_dir):
    pid = live.process.pid
    for path in (own_dir, other_dir) * 2:
        serve(http, path)
    until(lambda: live.metrics()[("dsd_model_draining", "model")] == 0)
    before = resources(pid)
    began = time.monotonic()
    for path in (own_dir, other_dir) * 10:
        serve(http, path)
        assert http.get("/generate", params=QUERY).status_code == 200
    print(f"20 swaps in {time.monotonic() - began:.1f} s")
    until(lambda: live.metrics()[("dsd_model_draining", "model")] == 0)
    after = resources(pid)
    print(before, after)
    assert after["processes"] == before["processes"] == 1
    assert after["threads"] <= before["threads"] + 1
    assert after["descriptors"] <= before["descriptors"] + 1
    assert after["mb"] <= before["mb"] + 8
