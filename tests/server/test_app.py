"""The real server, in a process of its own, over HTTP."""

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from dsd_serve.client import Client
from dsd_serve.engines import load_engine
from dsd_serve.errors import ServerError
from dsd_serve.imaging.codec import fit, read_image, write_image
from dsd_serve.params import SAMPLER_NAMES, SamplingParams
from dsd_serve.programs import generate, reconstruct, run
from tests.support.answers import opened, problem
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server


def test_a_class_becomes_a_png(http):
    answer = http.get("/generate", params={"class": 207})
    image = opened(answer)
    assert (image.format, image.size, image.mode) == ("PNG", (16, 16), "RGB")
    assert answer.headers["x-dsd-class"] == "207"
    assert 0 <= int(answer.headers["x-dsd-seed"]) < 2**32
    assert (answer.headers["x-dsd-steps"], answer.headers["x-dsd-guidance"]) == ("4", "1.5")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_as_in_the_readme(server_url, tmp_path):
    url = f"{server_url}/generate?class=207"
    subprocess.run(["curl", "-sSf", url, "-o", tmp_path / "dog.png"], check=True)
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


def test_all_names_of_a_class_and_both_methods_draw_the_same(http):
    settings = {"seed": 3, "steps": 3, "sampler": "euler", "guidance": 2}
    answers = [http.get("/generate", params={"class": c, **settings}) for c in ("207", "n02099601", "golden retriever")]
    answers.append(http.post("/generate", json={"class": 207, **settings}))
    assert len({answer.content for answer in answers}) == 1


def test_the_image_is_what_the_program_draws(http, tiny_dir):
    engine = load_engine("onnx", tiny_dir)
    params = SamplingParams(seed=11, index=2, num_steps=5, sampler="dpmpp_2m", guidance_scale=3.0)
    query = {"class": 950, "seed": 11, "index": 2, "steps": 5, "sampler": "dpmpp_2m", "guidance": 3.0}
    drawn = read_image(http.get("/generate", params=query).content)
    assert np.array_equal(drawn, run(engine, generate(engine.config, 950, params)))


def test_sizes_formats_and_accept(http):
    for query, headers, kind, size in (
        ({"size": 64}, {}, "PNG", (64, 64)),
        ({"format": "jpeg"}, {}, "JPEG", (16, 16)),
        ({}, {"accept": "image/webp,*/*;q=0.1"}, "WEBP", (16, 16)),
        ({}, {"accept": "image/avif,image/*;q=0.8"}, "PNG", (16, 16)),
        ({"n": 4}, {}, "PNG", (32, 32)),
        ({"n": 3, "size": 20}, {}, "PNG", (40, 40)),
    ):
        image = opened(http.get("/generate", params={"class": 1, "steps": 1, **query}, headers=headers))
        assert (image.format, image.size) == (kind, size)


def test_json_holds_every_image_and_what_draws_it_again(http):
    answer = http.get("/generate", params={"class": 1, "n": 3, "seed": 5, "steps": 2, "format": "json"}).json()
    assert answer["class"] == {"index": 1, "wnid": "n01443537", "name": "goldfish"}
    assert [image["index"] for image in answer["images"]] == [0, 1, 2]
    again = http.get("/generate", params={"class": 1, "seed": answer["seed"], "index": 2, "steps": answer["steps"]})
    assert base64.b64decode(answer["images"][2]["base64"]) == again.content


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "class is missing"),
        ({"class": "3"}, "tiger shark, which this model was not trained on; the model has 1 (goldfish), 207"),
        ({"class": "1000"}, "class must be an index"),
        ({"class": "golden retreiver"}, "did you mean 207 (Golden Retriever)?"),
        ({"clas": "207", "class": "207"}, "there is no parameter 'clas'"),
        ({"class": "207", "steps": "0"}, "steps must be greater than or equal to 1, got '0'"),
        ({"class": "207", "steps": "100000"}, "steps must be at most 250 on this server, got 100000"),
        ({"class": "207", "steps": "many"}, "steps must be a valid integer"),
        (
            {"class": "207", "sampler": "ddim"},
            "sampler must be one of euler, heun, dpmpp_2m with this model, got 'ddim'",
        ),
        ({"class": "207", "guidance": "nan"}, "guidance must be a finite number"),
        ({"class": "207", "guidance": "-1"}, "guidance must be greater than or equal to 0"),
        ({"class": "207", "n": "9"}, "n must be at most 8 on this server"),
        ({"class": "207", "seed": "-1"}, "seed must be"),
        ({"class": "207", "seed": str(2**63)}, "seed must be"),
        ({"class": "207", "index": str(2**63 - 1), "n": "2"}, "index must be"),
        ({"class": "207", "size": "5000"}, "size must be at most 1024"),
        (
            {"class": "207", "format": "gif"},
            "format must be 'png', 'jpeg', 'webp', 'json', 'zip' or 'events', got 'gif'",
        ),
        ({"class": "207", "guidance_start": "0.8", "guidance_stop": "0.2"}, "must be times from 0 to 1 in this order"),
        ({"class": "207", "timeout": "0"}, "timeout must be greater than or equal to 0.001"),
    ],
)
def test_errors_name_the_parameter(http, query, words):
    assert words in problem(http.get("/generate", params=query), 422)
    if query and all(not value.lstrip("-").isdecimal() for value in query.values()):
        assert words in problem(http.post("/generate", json=query), 422)


def test_other_errors_are_problems_too(http):
    assert "there is no /nothing here" in problem(http.get("/nothing"), 404)
    assert "does not take DELETE" in problem(http.delete("/generate"), 405)
    assert "text/html" in problem(http.get("/generate?class=1", headers={"accept": "text/html"}), 406)
    assert "must be a JSON object" in problem(http.post("/generate", content=b"{"), 415)
    json_type = {"content-type": "application/json"}
    assert "not valid JSON" in problem(http.post("/generate", content=b"{", headers=json_type), 422)
    assert "must be a JSON object" in problem(http.post("/generate", json=[207]), 422)


def test_reconstruct_takes_a_body_or_a_form(http, tiny_dir):
    pixels = sample_image(207, 0, size=40)
    data = write_image(pixels)
    engine = load_engine("onnx", tiny_dir)
    expected = run(engine, reconstruct(fit(pixels, 16)))
    for answer in (
        http.post("/reconstruct", content=data),
        http.post("/reconstruct", files={"image": ("dog.png", data, "image/png")}),
    ):
        assert np.array_equal(read_image(answer.content), expected)
    answer = http.post("/reconstruct", content=data, params={"format": "json", "size": 32}).json()
    assert read_image(base64.b64decode(answer["images"][0]["base64"])).shape == (3, 32, 32)
    error = np.mean((fit(pixels, 16).astype(float) - expected) ** 2)
    assert answer["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)


def test_reconstruct_takes_real_photos(http, real_data):
    for path in sorted(real_data.glob("photos/*.jpg"))[:10]:
        assert opened(http.post("/reconstruct", content=path.read_bytes())).size == (16, 16)


def test_wrong_uploads_are_sentences(http):
    assert "the body is empty" in problem(http.post("/reconstruct"), 422)
    assert "not a readable image" in problem(http.post("/reconstruct", content=b"hello"), 422)
    truncated = write_image(sample_image(1, 0, size=64))[:-60]
    assert "broken" in problem(http.post("/reconstruct", content=truncated), 422)
    assert "larger than 2 MB" in problem(http.post("/reconstruct", content=b"x" * 2_000_001), 413)

    def chunks():
        for _ in range(30):
            yield b"x" * 100_000

    assert "larger than 2 MB" in problem(http.post("/reconstruct", content=chunks()), 413)
    form = {"files": {"photo": ("a.png", b"x", "image/png")}}
    assert "unknown form field 'photo'; this form takes image" in problem(http.post("/reconstruct", **form), 422)
    broken = {"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}
    assert "form" in problem(http.post("/reconstruct", **broken), 422)


def test_classes_and_model(http):
    assert [c["index"] for c in http.get("/classes").json()] == [1, 207, 950]
    assert [c["index"] for c in http.get("/classes", params={"q": "gold"}).json()] == [1, 207]
    assert len(http.get("/classes", params={"trained": False}).json()) == 1000
    model = http.get("/model").json()
    assert (model["name"], model["classes"]) == ("tiny", [1, 207, 950])
    assert model["engine"]["provider"] == "CPUExecutionProvider"
    assert model["defaults"] == {
        "steps": 4,
        "sampler": "heun",
        "guidance": 1.5,
        "guidance_start": 0,
        "guidance_stop": 1,
    }
    assert len(model["fingerprint"]) == 64


def test_health_docs_and_root(http):
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == http.get("/health").json() == {"status": "ready"}
    assert "generate" in http.get("/").json()["try"]
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/generate", "/reconstruct", "/edit", "/interpolate", "/encode", "/decode", "/model"} < set(paths)
    assert http.get("/docs").status_code == 200


@pytest.mark.parametrize("version", ["abc", "1.x.0", "", "9" * 6000 + ".0.0", "1.0.0"])
def test_metrics_come_whatever_version_is_accepted(http, version):
    answer = http.get("/metrics", headers={"Accept": f"application/openmetrics-text;version={version}"})
    assert answer.status_code == 200 and "dsd_ready 1" in answer.text
    assert http.get("/metrics", headers={"Accept": "application/openmetrics-text;=;==;version=="}).status_code == 200


def test_options_of_the_server_as_a_whole(server_url):
    """RFC 9110, 9.3.7: OPTIONS *."""
    host, port = server_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert connection.makefile("rb").readline() in (b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 200 OK\r\n")


def test_a_seed_gives_the_same_bytes_alone_and_in_a_crowd(server_url):
    """Seventeen requests at once with other samplers, step counts and guidance, each equal to itself alone."""
    queries = [
        {
            "class": (1, 207, 950)[i % 3],
            "seed": i,
            "steps": 1 + i,
            "sampler": SAMPLER_NAMES[i % 3],
            "guidance": 1 + i % 2,
        }
        for i in range(17)
    ]
    with httpx.Client(base_url=server_url, timeout=60) as client, ThreadPoolExecutor(17) as pool:
        alone = [client.get("/generate", params=query).content for query in queries]
        together = list(pool.map(lambda query: client.get("/generate", params=query).content, queries))
    assert together == alone


def test_a_full_queue_is_429_with_retry_after(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-waiting", "4", "--row-budget", "1")
    codes = []

    def send(_):
        with httpx.Client(base_url=running.url, timeout=60) as client:
            answer = client.get("/generate", params={"class": 1, "n": 2, "steps": 200})
            codes.append(answer.status_code)
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert "at most 4 images" in problem(answer, 429)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(send, range(12)))
    assert set(codes) == {200, 429}
    assert running.stop() == 0


def test_a_full_queue_refuses_only_requests_that_would_queue_work(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-waiting", "1", "--row-budget", "1", "--max-steps", "1000")
    with httpx.Client(base_url=running.url, timeout=60) as client, ThreadPoolExecutor(2) as pool:
        known = client.get("/generate", params={"class": 1, "seed": 1, "steps": 1}).headers["etag"]
        # One image, of 4000 rows, runs; another waits, and the queue is full until the first ends.
        slow = f"{running.url}/generate?class=1&steps=1000&sampler=heun&guidance=2"
        busy = []
        for place in ("running", "waiting"):
            busy.append(pool.submit(httpx.get, slow, timeout=60))
            while not client.get("/debug/batcher").json()[place]:
                time.sleep(0.01)
        problem(client.post("/generate", content=b"not even JSON"), 429)
        problem(client.post("/reconstruct", content=b"x" * 5_000_000), 429)
        refused = client.post("/v1/images/generations", json={"prompt": "goldfish"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        headers = {"If-None-Match": known}
        assert client.get("/generate", params={"class": 1, "seed": 1, "steps": 1}, headers=headers).status_code == 304
        assert client.head("/generate", params={"class": 1, "steps": 1}).status_code == 200
        for path in ("/health/ready", "/classes", "/model", "/v1/models", "/docs"):
            assert client.get(path).status_code == 200, path
        metrics = client.get("/metrics").text
        assert 'dsd_requests_rejected_total{reason="queue_full"} 3.0' in metrics
        assert 'dsd_requests_total{code="429",route="/reconstruct"} 1.0' in metrics
        assert [one.result().status_code for one in busy] == [200, 200]
    assert running.stop() == 0


def test_a_client_that_goes_away_frees_its_place(tiny_dir):
    """The second client would wait for minutes behind the first's images if these went on."""
    running = Server("--model", str(tiny_dir), "--row-budget", "1", "--max-steps", "1000")
    with httpx.Client(base_url=running.url, timeout=1) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.get("/generate", params={"class": 1, "n": 16, "steps": 1000})
    with httpx.Client(base_url=running.url, timeout=30) as client:
        began = time.monotonic()
        client.get("/generate", params={"class": 1, "steps": 2}).raise_for_status()
        assert time.monotonic() - began < 1.5
    assert running.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--model", "/nowhere"], {}, "/nowhere is not a model directory"),
        (["--device", "cuda"], {}, "onnxruntime-gpu"),
        (["--engine", "magic"], {}, "engine must be one of onnx, torch"),
        (["--max-steps", "0"], {}, "max_steps must be an integer from 1 to 1000, got '0'"),
        ([], {"DSD_PORT": "http"}, "DSD_PORT must be an integer from 0 to 65535, got 'http'"),
        (["--port", "99999"], {}, "port must be an integer from 0 to 65535, got '99999'"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_exits(arguments, environment, words):
    import os

    command = [sys.executable, "-m", "server.main", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_after_kill_9_it_serves_again_within_three_seconds():
    """With the demo model, on the same port, to the first image."""
    running = Server()
    url, port = running.url, running.url.rpartition(":")[2]
    running.process.kill()
    running.process.wait(10)
    began = time.monotonic()
    again = Server("--port", port)
    assert httpx.get(url + "/generate", params={"class": 207}).status_code == 200
    assert time.monotonic() - began < 3
    assert again.stop() == 0


def test_settings_from_the_environment(tiny_dir):
    running = Server(env={"DSD_MODEL": str(tiny_dir), "DSD_MAX_IMAGES": "3"})
    assert httpx.get(running.url + "/model").json()["limits"]["n"] == 3
    assert running.stop() == 0


def test_the_client(server_url):
    with Client(server_url) as client:
        assert read_image(client.generate("goldfish", seed=1, steps=1)).shape == (3, 16, 16)
        assert len(client.generate_json(1, n=2, steps=1)["images"]) == 2
        assert client.reconstruct(write_image(sample_image(1, 1)))["psnr"] > 5
        assert client.classes("orange")[0]["index"] == 950
        with pytest.raises(ServerError, match="sampler must be one of") as error:
            client.generate(1, sampler="x")
        assert error.value.status == 422
    with pytest.raises(ServerError, match="cannot be reached"):
        Client("http://127.0.0.1:9").model()


def test_the_demo_model_draws_every_class(demo_dir):
    running = Server()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        classes = client.get("/classes").json()
        assert 207 in [c["index"] for c in classes]
        for c in classes:
            answer = client.get("/generate", params={"class": c["wnid"], "seed": 1, "steps": 4, "size": 256})
            assert opened(answer).size == (256, 256)
            assert np.asarray(opened(answer)).std() > 5
    assert running.stop() == 0


def test_the_openapi_document_is_valid_json_with_examples(http):
    document = http.get("/openapi.json").json()
    assert "golden retriever" in json.dumps(document)
    answers = document["paths"]["/generate"]["get"]["responses"]
    assert {"application/json", "application/zip", "text/event-stream", "image/png"} < set(answers["200"]["content"])
    assert set(answers) == {"200", "304", "406", "422", "429", "500", "503", "504"}
    assert "application/problem+json" in answers["429"]["content"]
    for path in document["paths"].values():
        for operation in path.values():
            assert operation.get("description") or operation.get("summary")
