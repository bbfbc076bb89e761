"""The native API over HTTP: formats, events, caching, latents, edits, walks."""

import base64
import io
import json
import re
import threading
import time
import zipfile

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from dsd_serve.engines import load_engine
from dsd_serve.imaging.codec import fit, grid, read_image, write_image
from dsd_serve.params import SamplingParams
from dsd_serve.programs import edit, encode, generate, reconstruct, run
from server.app import create_app
from server.service import Service
from server.settings import Settings
from tests.support.answers import events_of, opened, pixels_of, problem
from tests.support.data import sample_image
from tests.support.servers import Server


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return load_engine("onnx", tiny_dir)


# Generate.


def test_a_png_tells_how_it_was_drawn_and_can_be_drawn_again(http):
    first = http.get("/generate", params={"class": 207, "steps": 3, "guidance": 2, "guidance_stop": 0.7})
    settings = json.loads(opened(first).text["dsd"])
    assert settings["class"]["index"] == 207
    assert settings["seed"] == int(first.headers["x-dsd-seed"])
    names = ("seed", "index", "steps", "sampler", "guidance", "guidance_start", "guidance_stop")
    again = http.get(
        "/generate", params={"class": settings["class"]["wnid"], **{name: settings[name] for name in names}}
    )
    assert again.content == first.content
    assert settings["fingerprint"] == http.get("/model").json()["fingerprint"]


def test_a_seed_gives_an_etag_and_a_304_without_drawing(http):
    query = {"class": 1, "seed": 4, "steps": 2}
    first = http.get("/generate", params=query)
    etag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    drawn = http.get("/debug/batcher").json()["rows"]
    for known in (etag, f'"other", {etag}', "*", f"W/{etag}"):
        again = http.get("/generate", params=query, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert http.get("/debug/batcher").json()["rows"] == drawn
    for other in ({"steps": 3}, {"format": "webp"}, {"size": 32}, {"guidance": 3}, {"index": 1}, {"n": 2}):
        changed = http.get("/generate", params={**query, **other}, headers={"if-none-match": etag})
        assert (changed.status_code, changed.headers["etag"] == etag) == (200, False)
    random = http.get("/generate", params={"class": 1, "steps": 1})
    assert random.headers["cache-control"] == "no-store"
    assert "etag" not in random.headers


def test_a_zip_has_each_image_with_its_settings(http):
    query = {"class": 1, "seed": 4, "steps": 2, "n": 3, "format": "zip"}
    answer = http.get("/generate", params=query)
    assert answer.headers["content-type"] == "application/zip"
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.namelist() == ["000.png", "001.png", "002.png"]
    single = http.get("/generate", params={"class": 1, "seed": 4, "steps": 2, "index": 2})
    assert archive.read("002.png") == single.content
    assert http.get("/generate", params=query).content == answer.content


def test_server_timing_names_the_queue_and_the_network(http):
    timing = http.get("/generate", params={"class": 1, "steps": 2}).headers["server-timing"]
    parts = dict(part.strip().split(";dur=") for part in timing.split(","))
    assert set(parts) == {"queue", "network"}
    assert all(float(value) >= 0 for value in parts.values())


def test_events_bring_previews_then_the_same_image(http):
    query = {"class": 207, "seed": 3, "steps": 6, "n": 2, "preview_every": 2}
    answer = http.post("/generate", json=query, headers={"accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer)
    previews = [(e["image"], e["step"]) for name, e in events if name == "preview"]
    assert sorted(previews) == [(0, 2), (0, 4), (1, 2), (1, 4)]
    images = {e["image"]: e for name, e in events if name == "image"}
    for number in (0, 1):
        single = http.get("/generate", params={"class": 207, "seed": 3, "steps": 6, "index": number})
        assert base64.b64decode(images[number]["base64"]) == single.content
    assert events[-1][0] == "done"
    assert events[-1][1]["images"] == 2
    names = [name for name, e in events if e.get("image") == 0]
    assert names == ["preview", "preview", "image"]


def test_events_by_format_show_some_previews_by_themselves(http):
    events = events_of(http.get("/generate", params={"class": 1, "steps": 16, "format": "events"}))
    assert [e["step"] for name, e in events if name == "preview"] == [2, 4, 6, 8, 10, 12, 14]


def test_previews_arrive_while_it_samples(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-steps", "1000")
    url = f"{running.url}/generate?class=1&steps=1000&format=events&preview_every=100"
    with httpx.stream("GET", url, timeout=60) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("event: ")]
    assert len(times) == 9 + 1 + 1
    assert times[0] - times[-1] < -0.1, "the first long before the last"
    assert running.stop() == 0


def test_a_stream_whose_reader_leaves_stops_the_work(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-steps", "1000", "--row-budget", "1")
    url = f"{running.url}/generate?class=1&steps=1000&n=16&format=events&preview_every=10"
    with httpx.stream("GET", url, timeout=60) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 5
    while (state := httpx.get(running.url + "/debug/batcher").json())["running"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (state["running"], state["waiting"]) == ([], [])
    assert running.stop() == 0


def test_wrong_requests_for_events_are_answered_before_the_stream(http):
    accept = {"accept": "text/event-stream"}
    assert "sampler must be" in problem(http.post("/generate", json={"class": 1, "sampler": "x"}, headers=accept), 422)


def test_a_timeout_that_cannot_be_met_is_504_at_once(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-steps", "1000", "--row-budget", "1")
    query = {"class": 1, "steps": 1000, "n": 16}
    http = httpx.Client(base_url=running.url, timeout=60)
    http.get("/generate", params={"class": 1}).raise_for_status()
    began = time.monotonic()
    assert "more than the timeout of 0.5 s" in problem(http.get("/generate", params={**query, "timeout": 0.5}), 504)
    assert time.monotonic() - began < 0.4
    assert http.get("/debug/batcher").json()["running"] == []
    assert running.stop() == 0


# Images in.


def test_encode_gives_the_latents_in_three_forms_and_decode_takes_them(http, engine):
    data = write_image(sample_image(207, 0, size=40))
    pixels = fit(read_image(data), 16)
    z = run(engine, encode(pixels))
    expected = run(engine, reconstruct(pixels))
    npy = http.post("/encode", content=data)
    assert npy.headers["content-type"] == "application/x-npy"
    assert np.array_equal(np.load(io.BytesIO(npy.content)), z)
    forms = [npy.content]
    for accept in ("application/x-safetensors", "application/json"):
        answer = http.post("/encode", content=data, headers={"accept": accept})
        assert answer.headers["content-type"] == accept
        forms.append(answer.content)
    for form in forms:
        assert np.array_equal(read_image(http.post("/decode", content=form).content), expected)
    assert np.array_equal(np.array(json.loads(forms[2])["latents"], np.float32), z)
    from safetensors.numpy import load

    assert np.array_equal(load(forms[1])["latents"], z)


def test_wrong_latents_are_sentences(http):
    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    assert "empty" in problem(http.post("/decode"), 422)
    shape = http.get("/model").json()["latent_shape"]
    assert str(shape) in problem(http.post("/decode", content=npy(np.zeros((3, 3), np.float32))), 422)
    assert "finite" in problem(http.post("/decode", content=npy(np.full(shape, np.nan, np.float32))), 422)
    problem(http.post("/decode", content=npy(np.array([{}], object))), 422)
    problem(http.post("/decode", content=b"\x80\x04hello"), 422)


def test_edit_is_the_program(http, engine):
    data = write_image(sample_image(1, 0, size=40))
    query = {"class": 207, "seed": 2, "steps": 6, "strength": 0.5, "guidance": 2, "sampler": "euler"}
    params = SamplingParams(seed=2, num_steps=6, sampler="euler", guidance_scale=2.0)
    expected = run(engine, edit(engine.config, fit(read_image(data), 16), 207, params, 0.5))
    for files in ({"content": data}, {"files": {"image": ("a.png", data, "image/png")}}):
        answer = http.post("/edit", params=query, **files)
        assert np.array_equal(read_image(answer.content), expected)
    assert json.loads(opened(answer).text["dsd"])["strength"] == 0.5


def test_edit_with_a_mask_keeps_what_is_black(http):
    image, mask = sample_image(1, 0, size=16), np.zeros((3, 16, 16), np.uint8)
    mask[:, :, 8:] = 255
    files = {"image": ("a.png", write_image(image), "image/png"), "mask": ("m.png", write_image(mask), "image/png")}
    drawn = read_image(http.post("/edit", params={"class": 207, "strength": 1, "steps": 3}, files=files).content)
    assert np.array_equal(drawn[:, :, :8], image[:, :, :8])
    assert not np.array_equal(drawn[:, :, 8:], image[:, :, 8:])


def test_edit_without_a_class_makes_variations(http):
    data = write_image(sample_image(1, 0, size=16))
    answer = http.post("/edit", params={"strength": 0.5, "n": 3, "seed": 1, "format": "json"}, content=data).json()
    assert answer["class"] is None
    assert len({image["base64"] for image in answer["images"]}) == 3
    assert "guidance needs a class" in problem(http.post("/edit", params={"guidance": 3}, content=data), 422)
    assert "strength must be" in problem(http.post("/edit", params={"strength": 0}, content=data), 422)
    streamed = http.post("/edit", params={"class": 1, "steps": 8, "format": "events"}, content=data)
    assert {name for name, _ in events_of(streamed)} == {"preview", "image", "done"}


def test_a_walk_between_classes_begins_and_ends_with_what_generate_draws(http):
    body = {"from": {"class": 1, "seed": 5}, "to": {"class": "orange", "seed": 6}, "n": 5, "steps": 3}
    answer = http.post("/interpolate", json={**body, "format": "json"}).json()
    drawn = [pixels_of(image["base64"]) for image in answer["images"]]
    ends = [http.get("/generate", params={"class": c, "seed": s, "steps": 3}) for c, s in ((1, 5), (950, 6))]
    assert np.array_equal(drawn[0], read_image(ends[0].content))
    assert np.array_equal(drawn[-1], read_image(ends[1].content))
    assert [image["fraction"] for image in answer["images"]] == [0, 0.25, 0.5, 0.75, 1]
    strip = read_image(http.post("/interpolate", json=body).content)
    assert np.array_equal(strip, grid(drawn, columns=5))
    same = http.post("/interpolate", json={"from": {"class": 1, "seed": 5}, "to": {"class": 950}, "format": "json"})
    assert same.json()["to"]["seed"] == 5


def test_a_walk_between_images_begins_and_ends_with_their_reconstructions(http, engine):
    ends = [sample_image(1, 0, size=16), sample_image(950, 1, size=16)]
    files = {name: ("x.png", write_image(p), "image/png") for name, p in zip(("from", "to"), ends, strict=True)}
    strip = read_image(http.post("/interpolate", params={"n": 4}, files=files).content)
    assert strip.shape == (3, 16, 64)
    assert np.array_equal(strip[:, :, :16], run(engine, reconstruct(ends[0])))
    assert np.array_equal(strip[:, :, -16:], run(engine, reconstruct(ends[1])))
    del files["to"]
    assert "to" in problem(http.post("/interpolate", files=files), 422)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "from is missing"),
        ({"from": {"class": 1}, "to": {"class": 3}}, "not trained on"),
        ({"from": {"class": 1}, "to": {"class": 1, "sed": 3}}, "no parameter 'sed'"),
        ({"from": {"class": 1}, "to": {"class": 1}, "n": 1}, "n must be"),
        ({"from": {"class": 1}, "to": {"class": 1}, "n": 99}, "n must be at most 8"),
        ({"from": {"class": 1}, "to": {"class": 1}, "seed": 1}, "seed"),
    ],
)
def test_wrong_walks_are_sentences(http, body, words):
    assert words in problem(http.post("/interpolate", json=body), 422)


def test_model_tells_the_self_test(http):
    shown = http.get("/model").json()["self_test"]
    assert shown == {"batch_invariant": True, "rows": 4, "row_counts": [4], "max_difference": 0.0}


def test_two_hundred_random_requests_alone_and_all_at_once_are_identical(tiny_dir):
    """Same seed, same bytes, under any traffic: every kind of drawing at once."""
    rng = np.random.default_rng(0)
    data = write_image(sample_image(1, 0, size=16))

    def random_request():
        query = {
            "class": int(rng.choice([1, 207, 950])),
            "seed": int(rng.integers(2**32)),
            "steps": int(rng.integers(1, 25)),
            "sampler": str(rng.choice(["euler", "heun", "dpmpp_2m"])),
            "guidance": float(rng.choice([1, 2.5])),
            "guidance_start": float(rng.choice([0, 0.3])),
            "n": int(rng.integers(1, 4)),
            "format": "zip",
        }
        kind = rng.choice(["generate", "edit", "reconstruct"], p=[0.7, 0.2, 0.1])
        if kind == "generate":
            return {"method": "GET", "url": "/generate", "params": query}
        if kind == "edit":
            return {"method": "POST", "url": "/edit", "params": {**query, "strength": 0.7}, "content": data}
        return {"method": "POST", "url": "/reconstruct", "content": data}

    requests = [random_request() for _ in range(200)]
    running = Server("--model", str(tiny_dir), "--max-waiting", "1000")
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(base_url=running.url, timeout=120, limits=limits) as http:
        alone = [http.request(**request).raise_for_status().content for request in requests]
        together: list[bytes] = [b""] * len(requests)

        def send(number):
            together[number] = http.request(**requests[number]).raise_for_status().content

        threads = [threading.Thread(target=send, args=(number,)) for number in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone
    assert running.stop() == 0


def test_generate_draws_what_the_program_draws_with_an_interval(http, engine):
    params = SamplingParams(seed=1, num_steps=8, guidance_scale=3.0, guidance_start=0.2, guidance_stop=0.6)
    query = {"class": 1, "seed": 1, "steps": 8, "guidance": 3, "guidance_start": 0.2, "guidance_stop": 0.6}
    drawn = read_image(http.get("/generate", params=query).content)
    assert np.array_equal(drawn, run(engine, generate(engine.config, 1, params)))


def test_images_of_any_shape_come_out_square(http):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 20), "red").save(buffer, "JPEG")
    assert opened(http.post("/edit", params={"class": 1, "steps": 1}, content=buffer.getvalue())).size == (16, 16)


class Dependent:
    """An engine whose rows depend on their neighbours, as on a GPU."""

    def __init__(self, engine):
        self.engine, self.config, self.describe = engine, engine.config, engine.describe

    def run(self, rows):
        outputs = self.engine.run(rows)
        return [output + output.dtype.type(1e-6 * len(rows)) for output in outputs]


def test_the_etag_is_weak_where_bytes_may_depend_on_the_load(tiny_dir):
    service = Service(Settings(model=(str(tiny_dir),), row_budget=8), Dependent(load_engine("onnx", tiny_dir)))
    with TestClient(create_app(service)) as client:
        assert not client.get("/model").json()["self_test"]["batch_invariant"]
        query = {"class": 1, "seed": 4, "steps": 2}
        etag = client.get("/generate", params=query).headers["etag"]
        assert re.fullmatch('W/"[0-9a-f]{32}"', etag)
        for known in (etag, etag.removeprefix("W/"), f'"other", {etag}'):  # the weak comparison of RFC 9110, 8.8.3.2
            again = client.get("/generate", params=query, headers={"if-none-match": known})
            assert (again.status_code, again.headers["etag"]) == (304, etag)
