"""Memory of answers: for each format, and of a real server under the worst load that its limits allow."""

import asyncio
import re
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import yaml
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.testclient import TestClient

from dsd_serve.errors import InputError, QueueFullError
from dsd_serve.imaging import codec
from server import responses
from server.answers import LatentWalkAnswer
from server.app import ROUTERS, create_app
from server.http_heads import WITH_BODY
from server.request_memory import RequestResources, client_of, memory_bound
from server.request_model import RequestModel
from server.responses import Encoder, ImageWithSettings, encode_memory, texts_memory
from server.service import Service
from server.settings import Settings
from server.stream_events import EventQueue, Preview, PreviewMemory
from tests.support.data import ROOT
from tests.support.servers import Server

REST = 170  # megabytes of a server at rest, as the README says


def process_memory(pid: int | str, key: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024


@pytest.fixture(scope="module")
def server(demo_dir: Path) -> Iterator[Server]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the memory of a process can be measured on Linux only")
    running = Server("--model", str(demo_dir), "--max-encode-mb", "120", "--max-size", "512")
    yield running
    assert running.stop() == 0


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "plain"])
@pytest.mark.parametrize("chosen", ["png", "jpeg", "webp", "zip", "json"])
def test_encoding_takes_no_more_than_estimated(chosen, noise):
    """The peak of this process; noise is the worst case of every encoder."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the memory of a process can be measured on Linux only")
    rng = np.random.default_rng(0)
    side = 1024
    pixels = rng.integers(0, 256 if noise else 1, (3, side, side), dtype=np.uint8)
    drawn = [ImageWithSettings(pixels, {"model": "m", "fraction": 0.0}) for _ in range(4)]
    responses.encode_answer(drawn[:1], chosen, 64, {"model": "m", "size": 64}, {}, LatentWalkAnswer, None)
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("self", "VmRSS")
    common = {"model": "m", "size": side}
    body = responses.encode_answer(drawn, chosen, None, common, {}, LatentWalkAnswer, None).body
    assert process_memory("self", "VmHWM") - before < encode_memory(chosen, 4, side)
    assert len(body) < encode_memory(chosen, 4, side)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_the_best_quality_takes_no_more_than_estimated(kind):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the memory of a process can be measured on Linux only")
    image = codec.to_pil(np.random.default_rng(0).integers(0, 256, (3, 1024, 1024), dtype=np.uint8))
    Path("/proc/self/clear_refs").write_text("5")
    before = process_memory("self", "VmRSS")
    codec.encode(image, kind, quality=100)
    assert process_memory("self", "VmHWM") - before < texts_memory(kind, 1, 1024)


def test_an_answer_that_could_not_be_encoded_is_refused_before_it_is_drawn(server):
    query = {"class": 207, "n": 16, "size": 512, "steps": 250}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        refused = client.get("/generate", params={**query, "format": "webp"})
        assert refused.status_code == 422 and "up to 187 MB, this server allows 120 MB" in refused.json()["detail"]
        walk = {"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": 16, "size": 512, "format": "webp"}
        assert "--max-encode-mb" in client.post("/interpolate", json=walk).json()["detail"]
        assert client.get("/debug/batcher").json()["running"] == []


def test_many_large_answers_at_once_stay_within_the_budget(server):
    """Each of these takes up to 59 MB, twelve at once would take 700."""
    query = {"class": 207, "n": 16, "size": 512, "steps": 1}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        client.get("/generate", params={"class": 207, "size": 512})
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
        before = process_memory(server.process.pid, "VmRSS")
        with ThreadPoolExecutor(12) as pool:
            queries = [{**query, "format": kind} for kind in ("png", "jpeg", "json", "zip") * 3]
            sent = list(pool.map(lambda params: client.get("/generate", params=params), queries))
        assert {answer.status_code for answer in sent} == {200}
        assert process_memory(server.process.pid, "VmHWM") - before < 120e6 + 118e6
        metrics = client.get("/metrics").text
    assert re.search(r'dsd_memory_bytes\{budget="encode"\} 0\.0', metrics)
    assert re.search(r'dsd_memory_bytes\{budget="uploads"\} 0\.0', metrics)


def routes_with_bodies() -> set[str]:
    every = [route for router in ROUTERS for route in router.routes]
    return {route.path for route in every if isinstance(route, APIRoute) and set(WITH_BODY) & route.methods}


SETTINGS_ONLY = {"/generate", "/v1/images/generations"}  # JSON of some hundred bytes
# Latents are small: a file that decodes has at most 32 bytes a number, so the large one is refused.
REFUSED = {"/decode"}


def uploads(name: str) -> dict[str, object]:
    """A request of nine megabytes to a route, and what it draws with two steps."""
    data = codec.write_image(np.random.default_rng(0).integers(0, 256, (3, 1750, 1750), dtype=np.uint8))
    form = {"/interpolate": ("from", "to"), "/edit": ("image", "mask"), "/v1/images/edits": ("image",)}
    if name in SETTINGS_ONLY:
        return {"json": {"class": 207} if name == "/generate" else {"prompt": "207"}}
    if name in REFUSED:
        return {"content": bytes(9_000_000)}
    fields = {"data": {"prompt": "207"}} if name == "/v1/images/edits" else {}
    return {"files": {field: ("a", data) for field in form.get(name, ("image",))}, **fields}


@pytest.fixture(scope="module")
def client(demo_dir: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Service(Settings(model=(str(demo_dir),), row_budget=8)))) as made:
        yield made


def test_no_route_that_takes_a_body_is_forgotten(client):
    """The tests below have a case for each path of `routes_with_bodies`."""
    served = iter_route_contexts(client.app.routes)
    assert {route.path for route in served if set(WITH_BODY) & set(route.methods or ())} == routes_with_bodies()


@pytest.mark.parametrize("name", sorted(routes_with_bodies()))
def test_nothing_of_a_body_is_held_while_its_images_are_drawn(name, client, monkeypatch):
    service = client.app.state.service
    seen: list[int] = []
    submit = service.models.default.served.backend.submit_tasks

    def watched(*arguments, **options):
        seen.append(service.uploads.total)
        return submit(*arguments, **options)

    monkeypatch.setattr(service.models.default.served.backend, "submit_tasks", watched)
    answer = client.post(name, **uploads(name))
    assert answer.status_code == (422 if name in REFUSED else 200), answer.text[:300]
    assert service.uploads.total == service.encoder.memory.total == service.decoder.memory.total == 0
    assert service.unanswered == 0
    if name == "/v1/images/generations":  # a small text that is read before the route begins
        assert seen[0] < 1000
    elif name not in REFUSED:
        assert set(seen) == {0}


@pytest.mark.parametrize("name", sorted(routes_with_bodies() - SETTINGS_ONLY - REFUSED))
def test_the_bytes_of_a_body_are_freed_before_its_images_are_drawn(name, client, monkeypatch):
    """Freed, not only uncounted, while the tasks wait in the queue and nothing is streamed."""
    sent = httpx.Request("POST", f"http://testserver{name}", **uploads(name))
    body = sent.read()
    pieces = [(start, min(start + 65_536, len(body))) for start in range(0, len(body), 65_536)]
    traced: list[int] = []
    statuses: list[int] = []
    submit = client.app.state.service.models.default.served.backend.submit_tasks

    def watched(*arguments, **options):
        time.sleep(0.1)  # until the decoder's thread has dropped its last task
        traced.append(tracemalloc.get_traced_memory()[0])
        return submit(*arguments, **options)

    async def receive():
        if not pieces:
            await asyncio.Event().wait()
        start, end = pieces.pop(0)
        return {"type": "http.request", "body": body[start:end], "more_body": bool(pieces)}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": name, "query_string": b"", "headers": sent.headers.raw}
    scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "server": ("testserver", 80)}
    scope["headers"] = [(key.lower(), value) for key, value in sent.headers.raw]
    monkeypatch.setattr(client.app.state.service.models.default.served.backend, "submit_tasks", watched)
    tracemalloc.start()
    try:
        client.portal.call(client.app, scope, receive, send)
    finally:
        tracemalloc.stop()
    assert statuses == [200]
    assert traced and max(traced) < len(body) / 4


def test_a_client_has_at_most_half_of_the_queue(client):
    service = client.app.state.service
    one, other, again = RequestResources("the key a"), RequestResources("the key b"), RequestResources("the key a")
    model = RequestModel(service, service.models.default.served)
    model.count(one, 128)
    with pytest.raises(QueueFullError, match="the key a has 128 images under way, and half of the 256"):
        model.count(again, 1)
    model.count(other, 128)
    one.release()
    model.count(again, 128)
    for held in (other, again):
        held.release()
    assert service.unanswered == 0 and not service.shares


def test_slow_readers_lose_previews_and_no_image(monkeypatch):
    monkeypatch.setattr("server.stream_events.MAX_PREVIEWS", 100)
    memory = PreviewMemory()
    queue = EventQueue(memory)
    for step in range(5):
        queue.put(Preview(0, step, np.zeros(40, np.uint8)))
    assert [event.step for event in queue.events] == [3, 4]
    assert memory.total == 80
    queue.close()
    assert memory.total == 0


def test_clients_are_distinguished_by_address_except_on_this_machine():
    assert client_of({"client": ("192.0.2.1", 5)}) == "the address 192.0.2.1"
    assert client_of({"client": ("2001:db8::1", 5)}) == client_of({"client": ("2001:db8::9:1", 5)})
    assert client_of({"client": ("2001:db8::1", 5)}) == "the network 2001:db8::/64"
    assert client_of({"client": ("nonsense", 0)}) == "the address nonsense"  # of a proxy's header
    assert client_of({"client": ("::ffff:192.0.2.1", 5)}) == "the address 192.0.2.1"
    assert client_of({"client": ("::ffff:127.0.0.1", 5)}) is None
    assert client_of({"client": ("127.0.0.1", 5)}) is client_of({"client": ("::1", 5)}) is client_of({}) is None


def test_a_cancelled_wait_gives_its_memory_back():
    encoder = Encoder(Settings(max_encode_mb=100))
    with pytest.raises(InputError, match="takes up to"):
        encoder.check_images("webp", 16, 1024)
    done = threading.Event()

    async def gone() -> None:
        request = SimpleNamespace(scope={})
        running = asyncio.ensure_future(encoder.run(request, 1000, partial(done.wait, 10)))
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.sleep(0)
        assert encoder.memory.total == 1000  # its thread still works
        done.set()
        for _ in range(500):
            if not encoder.memory.total:
                break
            await asyncio.sleep(0.01)
        assert encoder.memory.total == 0

    asyncio.run(gone())


def test_the_documented_memory_follows_from_the_settings():
    bound = memory_bound(Settings()) / 1e6
    settings = Settings()
    readme = (ROOT / "docs/operations.md").read_text()
    assert f"Requests take at most {bound:.0f} MB of memory" in readme
    for name in ("uploads", "decode", "encode"):
        number = getattr(settings, f"max_{name}_mb")
        assert re.search(rf"{number:.0f} MB for [^(]*\(`--max-{name}-mb`", readme), name
    pod = yaml.safe_load((ROOT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    limit = pod["containers"][0]["resources"]["limits"]["memory"]
    assert int(limit.removesuffix("Gi")) * 2**30 / 1e6 > REST + bound
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["dsd"]["mem_limit"]
    assert int(re.search(r":-(\d+)g", compose)[1]) * 2**30 / 1e6 > REST + bound
