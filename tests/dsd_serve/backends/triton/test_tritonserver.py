"""A real tritonserver with the demo model behind the front, compared with the embedded server: the same bytes.

`make test-triton` installs Triton and runs these tests. Without Triton they are skipped.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

import dsd_serve
from dsd_serve.backends.triton.remote import TritonBackend
from dsd_serve.engines import load_engine
from dsd_serve.errors import CancelledError
from dsd_serve.imaging import codec
from dsd_serve.params import SamplingParams
from dsd_serve.programs import Generate
from dsd_serve.rows import Denoise
from tests.support.answers import events_of
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server
from tools.tritonserver import TritonMissing, TritonServer, binary, write_repository

pytestmark = pytest.mark.triton

LONG = "/generate?class=1&steps=500&sampler=euler&guidance=1"  # half a second or so for each image
PNG = codec.write_image(sample_image(207, 1, 48))
MASK = codec.write_image(np.repeat(np.triu(np.full((48, 48), 255, np.uint8))[None], 3, 0))


def repository_of(model: Path, folder: Path) -> Path:
    try:
        binary()
        import tritonclient.grpc  # noqa: F401
    except (TritonMissing, ImportError) as error:
        pytest.skip(f"NOT TESTED on Triton: {error}")
    write_repository(model, folder / "repository")
    return folder / "repository"


@pytest.fixture(scope="module")
def repository(demo_dir, tmp_path_factory) -> Path:
    return repository_of(demo_dir, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def triton(repository):
    with TritonServer(repository, repository.with_name("log")) as server:
        yield server


@pytest.fixture(scope="module")
def second(repository):
    with TritonServer(repository, repository.with_name("second.log")) as server:
        yield server


@pytest.fixture
def mortal(second):
    """A Triton that a test may kill."""
    if second.process is not None and second.process.poll() is not None:
        second.kill()  # it ended in a test that failed
    if second.process is None:
        second.start()
    return second


@pytest.fixture(scope="module")
def front(triton):
    running = front_of(triton)
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def embedded(demo_dir):
    running = Server("--model", str(demo_dir), "--max-steps", "1000")
    yield running
    assert running.stop() == 0


@pytest.fixture
def http(front):
    with httpx.Client(base_url=front.url, timeout=60) as client:
        yield client


def front_of(*servers: TritonServer, workers: int = 1) -> Server:
    """A ready front of these servers."""
    running = Server(
        *("--triton", ",".join(server.grpc for server in servers), "--max-steps", "1000"),
        *("--http-workers", str(workers)),
    )
    until(lambda: httpx.get(f"{running.url}/health/ready").status_code == 200)
    return running


def until(holds, seconds=15.0):
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.2)
    return value


def ask(server: Server, number: int) -> bytes:
    """The body of one of many mixed requests."""
    query = {"class": (1, 207, 950)[number % 3], "seed": number, "steps": 2 + number % 5}
    query["sampler"] = ("euler", "heun", "dpmpp_2m")[number % 3]
    query["guidance"] = (1, 1.7, 3)[number // 3 % 3]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        kind = number % 8
        if kind < 4:
            answer = client.get("/generate", params={**query, "guidance_start": 0.1, "index": number})
        elif kind == 4:
            query["strength"] = 0.35 + number / 100
            answer = client.post("/edit", params=query, files={"image": PNG, "mask": MASK})
        elif kind == 5:
            answer = client.post("/encode", content=PNG)
        elif kind == 6:
            answer = client.post("/reconstruct", content=PNG)
        else:
            ends = {"from": {"class": 207, "seed": number}, "to": {"class": 1, "index": 3}}
            answer = client.post("/interpolate", json={**ends, "n": 3, "steps": 3})
    answer.raise_for_status()
    return answer.content


def test_64_concurrent_mixed_requests_have_the_bytes_of_the_embedded_server(front, embedded):
    with ThreadPoolExecutor(64) as pool:
        through_triton = list(pool.map(lambda number: ask(front, number), range(64)))
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda number: ask(embedded, number), range(64)))
    assert [a == b for a, b in zip(through_triton, expected, strict=True)] == [True] * 64


def test_a_front_with_two_http_workers(mortal, embedded):
    """Both workers draw through the one connection of their main process, and follow it when Triton dies."""
    running = front_of(mortal, workers=2)
    try:
        expected = {number: ask(embedded, number) for number in range(8)}
        with ThreadPoolExecutor(8) as pool:
            drawn = list(pool.map(lambda number: ask(running, number % 8), range(24)))
        assert drawn == [expected[number % 8] for number in range(24)]
        mortal.kill()
        until(lambda: all(httpx.get(f"{running.url}/health/ready").status_code == 503 for _ in range(6)))
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        mortal.start()
        until(lambda: all(httpx.get(f"{running.url}/health/ready").status_code == 200 for _ in range(6)))
        assert ask(running, 3) == expected[3]
    finally:
        assert running.stop() == 0


def test_decode_walks_and_openai_have_the_same_bytes(front, embedded):
    answers = []
    for server in (front, embedded):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            z = client.post("/encode", content=PNG).content
            drawn = {"prompt": "golden retriever", "n": 2, "seed": 5, "num_inference_steps": 3}
            answers.append(
                (
                    client.post("/decode", content=z).content,
                    client.post("/interpolate?n=3", files={"from": PNG, "to": MASK}).content,
                    [one["b64_json"] for one in client.post("/v1/images/generations", json=drawn).json()["data"]],
                    client.get("/model").json()["fingerprint"],
                    client.get("/model/card").text,
                    client.get("/v1/models").json(),
                )
            )
    assert answers[0] == answers[1]


def test_previews_are_those_of_the_embedded_server(front, embedded):
    query = {"class": 207, "seed": 3, "n": 2, "steps": 6, "format": "events", "preview_every": 2}
    streams = [events_of(httpx.get(f"{server.url}/generate", params=query, timeout=60)) for server in (front, embedded)]
    images = [
        sorted((name, event["image"], event.get("step", 0), event["base64"]) for name, event in events[:-1])
        for events in streams
    ]
    assert [(name, image, step) for name, image, step, _ in images[0]] == [
        ("image", 0, 0),
        ("image", 1, 0),
        ("preview", 0, 2),
        ("preview", 0, 4),
        ("preview", 1, 2),
        ("preview", 1, 4),
    ]
    assert images[0] == images[1]


def describe(triton: TritonServer) -> dict:
    answer = httpx.post(f"{triton.http}/v2/models/dsd/generate", json={"operation": "describe"}, timeout=10).json()
    return json.loads(bytes(answer["text"]))


def test_a_disconnect_stops_the_work_inside_triton(http, triton):
    with http.stream("GET", f"{LONG}&n=4&format=events") as answer:
        lines = answer.iter_lines()  # kept: httpx closes the connection with it
        next(lines)
        until(lambda: describe(triton)["running"])
    until(lambda: not describe(triton)["running"] and not describe(triton)["waiting"], 5)
    assert http.get("/debug/batcher").json()["under_way"] == 0


def test_jobs_cancelled_at_once_end(triton):
    batcher = TritonBackend([triton.grpc])
    batcher.wait(30)
    for number in range(60):
        params = SamplingParams(seed=number, num_steps=50, sampler="euler")
        jobs = batcher.submit_tasks([Generate(1, params)] * 2)
        time.sleep(0.0005 * (number % 10))
        for job in jobs:
            job.cancel()
        assert [type(job.future.exception(10)) for job in jobs] == [CancelledError] * 2
    assert batcher.num_under_way == 0
    assert batcher.close(5)


def test_a_deadline_is_a_504_before_or_during_the_work(http):
    answer = http.get("/generate", params={"class": 1, "n": 16, "steps": 1000, "timeout": 0.5})
    assert answer.status_code == 504, answer.text
    assert "s" in answer.json()["detail"]
    assert http.get("/generate", params={"class": 1, "steps": 2}).status_code == 200


def test_tritons_own_http_api_draws(triton, embedded):
    url = f"{triton.http}/v2/models/dsd"
    asked = {"operation": "generate", "label": "golden retriever", "seed": 4, "num_steps": 3, "sampler": "euler"}
    answer = httpx.post(f"{url}/generate", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    drawn = np.array(answer.json()["image"], np.uint8).reshape(3, 32, 32)
    query = {"class": 207, "seed": 4, "steps": 3, "sampler": "euler", "format": "png"}
    expected = codec.read_image(httpx.get(f"{embedded.url}/generate", params=query, timeout=60).content)
    assert np.array_equal(drawn, expected)
    events = httpx.post(f"{url}/generate_stream", json={**asked, "preview_every": 1}, timeout=60).text
    assert [("preview" in line, "image" in line) for line in events.splitlines() if line] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    wrong = httpx.post(f"{url}/generate", json={**asked, "sampler": "magic"}, timeout=10)
    assert "sampler must be one of euler, heun, dpmpp_2m, flow_map, got 'magic'" in wrong.json()["error"]
    config = httpx.get(f"{url}/config").json()
    assert config["model_transaction_policy"] == {"decoupled": True}


def test_raw_denoise_rows(triton, demo_dir):
    engine = load_engine("onnx", demo_dir)
    latents = np.random.default_rng(0).standard_normal((3, *engine.config.latent_shape), dtype=np.float32)
    ts, labels = np.array([0.0, 0.3, 0.9]), np.array([1, 207, engine.config.null_label])
    expected = engine.run([Denoise(z, t, int(label)) for z, t, label in zip(latents, ts, labels, strict=True)])
    good, bad = denoised(triton, {"latents": latents, "t": ts, "labels": labels}, {"latents": latents, "t": ts})
    assert np.allclose(good, np.stack(expected), atol=1e-6)
    assert "the input labels is missing" in bad


def denoised(server, *requests):
    """The answers of Triton itself to denoise rows, given as tensors by name: latents, or the text of an error."""
    from tritonclient import grpc

    kinds = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}
    answers: list = []
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.append((result, error)))
        for number, tensors in enumerate(requests, 1):
            inputs = [
                grpc.InferInput(name, array.shape, kinds[array.dtype.name]).set_data_from_numpy(array)
                for name, array in tensors.items()
            ]
            client.async_stream_infer("dsd", inputs, parameters={"operation": "denoise"})
            until(lambda number=number: len(answers) == number)
        client.stop_stream()
    return [str(error) if error is not None else result.as_numpy("latents") for result, error in answers]


def test_a_flow_map_gives_the_bytes_of_python(flow_map_dir, tmp_path):
    repository = repository_of(flow_map_dir, tmp_path)
    assert 'input { name: "r" data_type: TYPE_FP64 dims: [ -1 ] optional: true }' in (
        repository / "dsd" / "config.pbtxt"
    ).read_text(encoding="utf-8")
    with TritonServer(repository, tmp_path / "log") as server, dsd_serve.load(flow_map_dir) as model:
        front = front_of(server)
        about = httpx.get(f"{front.url}/model").json()
        assert (about["defaults"]["sampler"], about["samplers"][-1]) == ("flow_map", "flow_map")
        for steps in (1, 2, 5):
            query = {"class": 1, "seed": steps, "steps": steps, "guidance": 1 + steps % 2}
            served = httpx.get(f"{front.url}/generate", params=query, timeout=60).raise_for_status().content
            image = model.generate(1, seed=steps, num_steps=steps, guidance_scale=1.0 + steps % 2)
            assert served == dsd_serve.to_png(image)
        query = {"class": 2, "seed": 3, "strength": 0.5}
        edited = httpx.post(f"{front.url}/edit", params=query, content=PNG, timeout=60).raise_for_status().content
        assert edited == dsd_serve.to_png(model.edit(PNG, 2, seed=3, strength=0.5))
        assert front.stop() == 0
        engine = load_engine("onnx", flow_map_dir)
        z = np.random.default_rng(0).standard_normal((2, *engine.config.latent_shape), dtype=np.float32)
        row = {"latents": z, "t": np.array([0.0, 0.3]), "labels": np.array([1, 2])}
        jumps, estimates, wrong = denoised(server, {**row, "r": np.array([0.5, 1.0])}, row, {**row, "r": np.zeros(2)})
        assert np.array_equal(jumps, engine.run([Denoise(z[0], 0.0, 1, 0.5), Denoise(z[1], 0.3, 2, 1.0)]))
        assert np.array_equal(estimates, engine.run([Denoise(z[0], 0.0, 1), Denoise(z[1], 0.3, 2)]))
        assert "r must be from t to 1, got 0.0 for t = 0.3" in wrong


def test_a_killed_triton_is_a_503_and_the_front_recovers(mortal):
    front = front_of(mortal)
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(httpx.get, f"{front.url}{LONG}&n=2", timeout=60) for _ in range(3)]
        until(lambda: describe(mortal)["running"])
        until(lambda: httpx.get(f"{front.url}/debug/batcher").json()["under_way"] == 6)  # all three are on their way
        mortal.kill()
        began = time.monotonic()
        for answer in (one.result() for one in busy):
            assert answer.status_code == 503, answer.text
            assert "send the request again" in answer.json()["detail"]
            assert answer.headers["retry-after"]
        assert time.monotonic() - began < 5
    refused = httpx.get(f"{front.url}/generate?class=1")
    assert refused.status_code == 503
    assert f"no Triton server is ready: {mortal.grpc} does not answer" in refused.json()["detail"]
    assert httpx.get(f"{front.url}/health/ready").status_code == 503
    assert httpx.get(f"{front.url}/health/live").status_code == 200
    mortal.start()
    until(lambda: httpx.get(f"{front.url}/health/ready").status_code == 200)
    assert httpx.get(f"{front.url}/generate?class=1&steps=2").status_code == 200
    assert front.stop() == 0


def test_two_servers_share_the_work_and_a_dead_one_is_left_out(triton, mortal):
    front = front_of(triton, mortal)

    def status_of(seed: int) -> int:
        return httpx.get(f"{front.url}/generate?class=1&steps=8&seed={seed}", timeout=60).status_code

    def ready() -> list[bool]:
        servers = httpx.get(f"{front.url}/debug/batcher").json()["servers"]
        return [server["not_ready"] is None for server in servers]

    with ThreadPoolExecutor(8) as pool:
        until(lambda: ready() == [True, True])
        before = [count(server) for server in (triton, mortal)]
        assert set(pool.map(status_of, range(16))) == {200}
        drawn = [count(server) - first for server, first in zip((triton, mortal), before, strict=True)]
        assert min(drawn) >= 4, drawn
        mortal.kill()
        until(lambda: ready() == [True, False])
        assert set(pool.map(status_of, range(8))) == {200}
        mortal.start()
        until(lambda: ready() == [True, True])
    assert front.stop() == 0


def test_a_full_instance_is_a_429_and_a_host_with_another_model_is_left_out(triton, demo_dir, tmp_path):
    shutil.copytree(demo_dir, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("dsd-demo", "another"))
    write_repository(tmp_path / "model", tmp_path / "repository")
    settings = tmp_path / "repository" / "dsd" / "config.pbtxt"
    few = settings.read_text().replace('string_value: "256"', 'string_value: "1"')
    settings.write_text(few)
    with TritonServer(tmp_path / "repository", tmp_path / "log") as other:
        front = front_of(other)
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(httpx.get, f"{front.url}{LONG}", timeout=60)
            until(lambda: describe(other)["running"])
            refused = httpx.get(f"{front.url}{LONG}&n=8", timeout=60)
            assert refused.status_code == 429
            assert "this server takes at most 1 images" in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) >= 1
            assert busy.result().status_code == 200
        assert front.stop() == 0
        batcher = TritonBackend([triton.grpc])
        batcher.wait(30)
        both = TritonBackend([triton.grpc, other.grpc])
        both.info = batcher.info  # as if the first had answered first
        until(lambda: "serves another model (another, " in str(both.servers[1].not_ready))
        assert both.ready
        assert both.close(5)
        assert batcher.close(5)


def test_a_hanging_triton_does_not_block_requests(mortal):
    front = front_of(mortal)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.get, f"{front.url}{LONG}&n=4", timeout=60)
        until(lambda: describe(mortal)["running"])
        os.kill(mortal.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert busy.result().status_code == 503
        assert time.monotonic() - began < 20
        os.kill(mortal.pid, signal.SIGCONT)
    until(lambda: httpx.get(f"{front.url}/health/ready").status_code == 200)
    assert front.stop() == 0


def test_a_stopping_front_finishes_its_requests(triton):
    front = front_of(triton)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.get, f"{front.url}{LONG}&n=2", timeout=60)
        until(lambda: describe(triton)["running"])
        assert front.stop() == 0
        assert busy.result().status_code == 200


def count(triton: TritonServer) -> int:
    """Requests that this server has carried out, by its own metrics; few of them are health checks of the front."""
    text = httpx.get(f"http://127.0.0.1:{triton.ports[2]}/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("nv_inference_request_success{"))
    return int(float(line.rsplit(" ", 1)[1]))


def test_the_death_of_the_backend_process_does_not_block_requests(mortal):
    """Triton 24.10 does not restart it; that is left to whoever monitors Triton, such as the image's health check."""
    front = front_of(mortal)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.get, f"{front.url}{LONG}&n=4", timeout=60)
        until(lambda: describe(mortal)["running"])
        (backend,) = mortal.backends
        os.kill(backend, signal.SIGKILL)
        began = time.monotonic()
        assert busy.result().status_code == 503
        assert time.monotonic() - began < 15
    refused = httpx.get(f"{front.url}/generate?class=1")
    assert refused.status_code == 503
    assert f"no Triton server is ready: {mortal.grpc} answers: Stub process" in refused.json()["detail"]
    assert httpx.post(f"{mortal.http}/v2/models/dsd/generate", json={"operation": "describe"}).status_code >= 400
    mortal.kill()
    assert front.stop() == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_killed_triton_leaves_no_process_behind(mortal, stopped):
    """Its backend would otherwise wait for ever, and with it the engine process, whatever that is at."""
    left = [*mortal.backends, *mortal.engines]
    assert len(left) == 2
    asked = {"operation": "generate", "label": 1, "num_steps": 1000, "max_seconds": 100}
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, f"{mortal.http}/v2/models/dsd/generate", json=asked, timeout=60)
        until(lambda: describe(mortal)["running"])
        if stopped:
            os.kill(left[1], signal.SIGSTOP)
        os.kill(mortal.pid, signal.SIGKILL)
        assert busy.exception() is not None
    mortal.process.wait(10)
    until(lambda: all(is_zombie(pid) for pid in left), 10)
    mortal.kill()
    mortal.start()


def test_a_killed_engine_is_started_again_inside_triton(mortal):
    front = front_of(mortal)
    assert health_check(mortal) == (0, "ready")
    (engine,) = mortal.engines
    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(httpx.get, f"{front.url}{LONG}&n=4", timeout=60) for _ in range(4)]
        until(lambda: describe(mortal)["running"])
        os.kill(engine, signal.SIGKILL)
        began = time.monotonic()
        for answer in (one.result() for one in busy):
            assert answer.status_code == 503, answer.text
            assert "send the request again" in answer.json()["detail"]
        assert time.monotonic() - began < 5
        status, reason = health_check(mortal)
        assert status == 1 and "the engine process" in reason
    until(lambda: httpx.get(f"{front.url}/generate?class=1&steps=2").status_code == 200)
    assert mortal.engines != [engine] and health_check(mortal) == (0, "ready")
    assert front.stop() == 0


@pytest.fixture(scope="module")
def pair(repository, tmp_path_factory):
    """A Triton with two instances."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(repository, folder / "repository")
    settings = folder / "repository" / "dsd" / "config.pbtxt"
    settings.write_text(settings.read_text().replace("KIND_CPU count: 1", "KIND_CPU count: 2"))
    try:
        server = TritonServer(folder / "repository", folder / "log")
    except TritonMissing:  # Triton 24.10 may lose a lock when it starts two instances on a busy machine, and abort
        server = TritonServer(folder / "repository", folder / "log")
    with server:
        yield server


def test_a_host_serves_while_one_of_its_instances_does(pair):
    front = front_of(pair)

    def instances() -> dict:
        (server,) = httpx.get(f"{front.url}/debug/batcher").json()["servers"]
        return {name: one["not_ready"] for name, one in server["instances"].items()}

    def statuses(count: int) -> set[int]:
        with ThreadPoolExecutor(4) as pool:
            asked = [f"{front.url}/generate?class=1&steps=4&seed={seed}" for seed in range(count)]
            return {one.status_code for one in pool.map(lambda url: httpx.get(url, timeout=60), asked)}

    until(lambda: instances() == {"dsd_0_0": None, "dsd_0_1": None})
    assert statuses(8) == {200}
    engine, other = pair.engines
    os.kill(engine, signal.SIGKILL)
    until(lambda: "NotReadyError" in refusals(pair), 5)
    assert statuses(16) == {200}, "what one instance refuses goes to the other"
    until(lambda: len(pair.engines) == 2 and instances() == {"dsd_0_0": None, "dsd_0_1": None})
    assert other in pair.engines
    dead = pair.backends[0]
    os.kill(dead, signal.SIGKILL)  # which Triton does not start again
    until(lambda: sorted(map(str, instances().values()))[1].startswith("answers: Stub process"))
    assert statuses(8) == {200}
    assert httpx.get(f"{front.url}/health/ready").status_code == 200
    assert health_check(pair)[0] == 0
    for backend in pair.backends:
        os.kill(backend, signal.SIGKILL)
    until(lambda: httpx.get(f"{front.url}/health/ready").status_code == 503)
    status, reason = health_check(pair)
    assert status == 1 and "is not healthy" in reason
    assert front.stop() == 0


def refusals(triton: TritonServer) -> str:
    asked = {"operation": "generate", "label": 1, "num_steps": 1}
    return httpx.post(f"{triton.http}/v2/models/dsd/generate", json=asked, timeout=60).text


def health_check(triton: TritonServer) -> tuple[int, str]:
    """The exit status of the image's own health check, and its last line."""
    (line,) = re.findall(r'CMD (\["python3", .*operation.*)', (ROOT / "Dockerfile").read_text())
    command = [word.replace("8000", str(triton.ports[0])) for word in json.loads(line)]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout.splitlines()[-1]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
