"""Behind nginx and Caddy, with the files of deploy/ as they are but for addresses. Skipped where they are missing."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from dsd_serve.client import Client
from dsd_serve.imaging.codec import write_image
from tests.support.data import ROOT, sample_image
from tests.support.servers import serving

PREFIXES = ("", "/dsd")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    with serving("--ui", "--max-body-mb", "1", "--allowed-hosts", "images.example.com") as url:
        yield url


@contextlib.contextmanager
def nginx(folder: Path, server: str, port: int, config: str = "") -> Iterator[str]:
    """nginx before a server, by default with the configuration in deploy/."""
    config = config or (ROOT / "deploy/nginx.conf").read_text()
    config = config.replace("127.0.0.1:8000", server).replace("listen 80;", f"listen 127.0.0.1:{port};")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log; events {{}} "
        f"http {{ access_log off; {' '.join(f'{kind}_temp_path {folder}/{kind};' for kind in kinds)}\n{config}}}"
    )
    with running([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")], port) as url:
        yield url


@contextlib.contextmanager
def caddy(folder: Path, server: str, port: int) -> Iterator[str]:
    config = (ROOT / "deploy/Caddyfile").read_text()
    config = config.replace("127.0.0.1:8000", server)
    config = config.replace("\nimages.example.com {", f"\nhttp://127.0.0.1:{port}, http://images.example.com:{port} {{")
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + config)
    command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    with running(command, port, {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "PATH": "/usr/bin"}) as url:
        yield url


@contextlib.contextmanager
def running(command: list[str], port: int, env: dict[str, str] | None = None) -> Iterator[str]:
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 20
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/health/live")
                break
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(nginx, marks=pytest.mark.skipif(NGINX is None, reason="nginx is not installed")),
        pytest.param(caddy, marks=pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")),
    ],
    ids=["nginx", "caddy"],
)
def proxy(request, served, tmp_path_factory):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with request.param(tmp_path_factory.mktemp("proxy"), served.removeprefix("http://"), port) as url:
        yield url


@pytest.mark.parametrize("prefix", PREFIXES)
def test_links_and_documentation_stay_below_the_prefix(proxy, prefix):
    forged = {"X-Forwarded-Prefix": "/evil", "X-Forwarded-Host": "evil.example"}
    page = httpx.get(f"{proxy}{prefix}/docs", headers=forged)
    assert page.status_code == 200
    for link in re.findall(r"""(?:src|href)="([^"]*)"|url: '([^']*)'""", page.text):
        assert httpx.get(page.url.join(link[0] or link[1])).status_code == 200
    assert httpx.get(f"{proxy}{prefix}/openapi.json").json()["servers"] == [{"url": prefix or "/"}]
    slash = httpx.get(f"{proxy}{prefix}/model/")
    assert str(slash.url.join(slash.headers["location"])) == f"{proxy}{prefix}/model"
    if prefix:
        bare = httpx.get(proxy + prefix)
        assert (bare.status_code, bare.headers["location"]) == (308, f"{prefix}/")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_page_works_below_its_prefix(proxy, prefix):
    with httpx.Client(base_url=proxy + prefix, timeout=30) as visitor:
        assert visitor.get("/config").json()["root"] == proxy + prefix
        page = visitor.get("/")
        assert page.status_code == 200 and "gradio" in page.text
        for path in ("/theme.css", "/studio/state", "/gradio_api/info"):
            assert visitor.get(path).status_code == 200, path
        form = {"files": ("a.png", write_image(sample_image(207, 0)))}
        assert visitor.post("/gradio_api/upload", files=form, headers={"Origin": proxy}).status_code == 200


@pytest.mark.parametrize("prefix", PREFIXES)
def test_uploads_events_and_refusals_pass(proxy, prefix):
    png = write_image(sample_image(207, 0))
    with Client(proxy + prefix) as client:
        assert client.generate(207, seed=1, steps=1)[:4] == b"\x89PNG"
        assert client.reconstruct(png)["psnr"] > 5
        names = [event.name for event in client.generate_events(207, steps=4, preview_every=1)]
        assert names == ["preview"] * 3 + ["image", "done"] or (names[-2:] == ["image", "done"] and "preview" in names)
        assert client.http.post("/reconstruct", content=b"x" * 1_500_000).json()["status"] == 413


def test_events_arrive_as_they_come(proxy):
    """However fast the machine draws, the first preview arrives long before the last: a buffer would join them."""
    asked = time.monotonic()
    with httpx.stream(
        "GET", f"{proxy}/generate?class=207&steps=240&format=events&preview_every=15", timeout=60
    ) as answer:
        arrived = [time.monotonic() for chunk in answer.iter_text() if "event: " in chunk]
    assert len(arrived) >= 4 and arrived[-1] - arrived[0] > (arrived[-1] - asked) / 2


def test_connections_to_the_server_are_kept_and_its_name_is_known(proxy, served):
    for host, status in (("images.example.com", 200), ("images.example.com:8443", 200)):
        assert httpx.get(f"{proxy}/model", headers={"Host": host}).status_code == status
    direct = httpx.get(f"{served}/model", headers={"Host": "other.example.com"})
    assert (direct.status_code, "--allowed-hosts other.example.com" in direct.json()["detail"]) == (421, True)
