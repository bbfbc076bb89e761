"""Memory of a server, route by route, under many of the largest requests at a time that it allows."""

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dsd_serve.imaging import codec
from server.app import ROUTERS
from server.request_memory import memory_bound
from server.settings import Settings
from tests.support.servers import Server

AT_A_TIME = 16
# Budgets that a short test can fill. `pytest -m slow` fills those that a server has by default.
SMALL = {"max_body_mb": 8.0, "max_uploads_mb": 40.0, "max_decode_mb": 80.0, "max_encode_mb": 120.0, "max_size": 512}


def photo(side: int, kind: str, channels: int = 3) -> bytes:
    """An image of noise, the worst for every decoder and encoder."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 80} if kind != "PNG" else {"compress_level": 1}))
    return buffer.getvalue()


def worst_requests(settings: Settings) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """For each route, the requests (method and arguments of httpx) that hold the most memory."""
    size, n, most = settings.max_size, settings.max_images, int(settings.max_body_mb * 1e6)
    png, webp = (photo(int((most / 3.2) ** 0.5), kind) for kind in ("PNG", "WEBP"))
    halves = [photo(int((most / 6.6) ** 0.5), kind) for kind in ("PNG", "WEBP")]  # two of them in one form
    mask = photo(int((most / 8.8) ** 0.5), "PNG", channels=4)
    drawn = {"class": 207, "steps": 1, "n": n, "size": size}
    formats = ("png", "jpeg", "webp", "zip", "json")
    ends = {"from": {"class": 207, "seed": 1}, "to": {"class": 1}, "n": n, "size": size, "steps": 1}
    latents = io.BytesIO()
    np.save(latents, np.zeros((16, 32), np.float32))
    openai = {"size": f"{size}x{size}", "num_inference_steps": 1, "n": 10}

    def form(*names: str) -> dict[str, Any]:
        return {
            "files": {name: ("a", data) for name, data in zip(names, halves if len(names) > 1 else [png], strict=False)}
        }

    return {
        "/generate": [("GET", {"params": {**drawn, "format": kind}}) for kind in (*formats, "events")]
        + [("POST", {"json": {**drawn, "format": "events", "preview_every": 1, "steps": 4}})],
        "/edit": [
            ("POST", {"params": {**drawn, "format": kind}, **form("image", "mask")}) for kind in ("json", "events")
        ],
        "/interpolate": [("POST", {"json": {**ends, "format": kind}}) for kind in ("png", "zip", "json")]
        + [("POST", {"params": {"n": n, "size": size}, **form("from", "to")})],
        "/encode": [("POST", {"content": data}) for data in (png, webp, bytes(most), b"{" * most)],
        "/decode": [
            ("POST", {"content": bytes(most), "headers": {"content-type": "application/x-npy"}}),
            ("POST", {"content": b"[" * 999_000, "headers": {"content-type": "application/json"}}),
            *(("POST", {"content": latents.getvalue(), "params": {"size": size, "format": kind}}) for kind in formats),
        ],
        "/reconstruct": [
            ("POST", {"content": data, "params": {"size": size, "format": kind}})
            for data, kind in ((png, "json"), (webp, "png"), (webp, "webp"))
        ],
        "/v1/images/generations": [
            ("POST", {"json": {"prompt": "207", **openai, "output_format": kind, "stream": stream}})
            for kind in ("png", "webp")
            for stream in (False, True)
        ],
        "/v1/images/edits": [
            ("POST", {"data": {"prompt": "207", **openai}, "files": {"image": ("a", halves[0]), "mask": ("a", mask)}}),
            ("POST", {"data": {"prompt": "207", **openai, "stream": "true"}, **form("image")}),
        ],
        "/v1/images/variations": [("POST", {"data": openai, **form("image")})],
        # Routes without a body: long queries.
        **{path: [("GET", {"params": {"q": "x" * 60_000}})] for path in paths("GET") - paths("POST")},
    }


def paths(method: str) -> set[str]:
    """Paths of the routes that take a method; those with a variable part take a name and no more."""
    every = [route for router in ROUTERS for route in router.routes]
    return {route.path for route in every if method in route.methods and "{" not in route.path}


class Measured:
    """A server, and the rise of its memory."""

    def __init__(self, settings: dict[str, Any], model: Path) -> None:
        self.settings = Settings(**settings)
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.running = Server("--model", str(model), *flags)
        self.http = httpx.Client(base_url=self.running.url, timeout=300, limits=httpx.Limits(max_connections=AT_A_TIME))
        self.rest = self.status("VmRSS")

    def status(self, key: str) -> float:
        """VmRSS or VmHWM, in bytes."""
        lines = Path(f"/proc/{self.running.process.pid}/status").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

    def peak(self, path: str, requests: list[tuple[str, dict[str, Any]]]) -> tuple[float, set[int]]:
        """The peak of memory, in bytes above rest, during AT_A_TIME of these requests at a time, and the statuses."""
        Path(f"/proc/{self.running.process.pid}/clear_refs").write_text("5")

        def send(one: tuple[str, dict[str, Any]]) -> int:
            method, arguments = one
            try:
                return self.http.request(method, path, **arguments).status_code
            except httpx.TransportError:
                return 0  # refused while it sent

        with ThreadPoolExecutor(AT_A_TIME) as pool:
            statuses = set(pool.map(send, (requests * AT_A_TIME)[: max(AT_A_TIME, 2 * len(requests))]))
        return self.status("VmHWM") - self.rest, statuses


@pytest.fixture(scope="module")
def measured(demo_dir: Path) -> Iterator[Callable[[dict[str, Any]], Measured]]:
    started: list[Measured] = []

    def start(settings: dict[str, Any]) -> Measured:
        started.append(Measured(settings, demo_dir))
        return started[-1]

    yield start
    for one in started:
        assert one.running.stop() == 0


def check(measured: Measured) -> None:
    worst = worst_requests(measured.settings)
    assert set(worst) == paths("GET") | paths("POST")  # a new route that takes a body needs its worst requests above
    for path in paths("POST"):
        assert "POST" in {method for method, _ in worst[path]}, path
    bound = memory_bound(measured.settings)
    for path, requests in worst.items():
        peak, statuses = measured.peak(path, requests)
        print(f"{path:26} {peak / 1e6:5.0f} MB above rest, of {bound / 1e6:.0f}; {sorted(statuses)}")
        assert peak <= bound, path
        assert 500 not in statuses, path
        assert 200 in statuses or path in paths("GET") - paths("POST"), path  # a body that is refused takes little


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured on Linux only")


@needs_proc
@pytest.mark.thorough
def test_no_route_takes_more_than_the_settings_make(measured):
    check(measured(SMALL))


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_route_takes_more_than_the_readme_says(measured):
    check(measured({}))


def test_images_of_noise_are_the_worst() -> None:
    """These requests fill the budgets, because their images take more memory than their files."""
    data = photo(1000, "WEBP")
    assert codec.decode_memory(codec.open_file(data), 32) > 10 * len(data)
