"""Fixtures of the tests with third-party clients: servers, nginx before them, Chromium, Node, and a second Python."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from dsd_serve.imaging.codec import write_image
from tests.support.data import ROOT, sample_image
from tests.support.servers import serving, serving_folder

T = TypeVar("T")

HERE = Path(__file__).parent
INSTALLED = ROOT / ".clients/bin"  # by install.sh
KEY = "key-of-the-tests-0123456789abcdefghijklmnopq"
BIG = 29_000_000  # bytes of an upload that is rejected: above --max-body-mb and above the size of socket buffers


def tool(name: str, package: str) -> str:
    """The path of a system program; skips the test if it is missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    return found or pytest.skip(f"{name} was not tested, because it is not installed: apt-get install {package}")


def installed(name: str) -> str:
    """The path of a program from install.sh; skips the test if it is missing."""
    if not (INSTALLED / name).exists():
        pytest.skip(f"{name} was not tested, because it is not installed: tests/clients/install.sh")
    return str(INSTALLED / name)


def output(*command: str, **settings: Any) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stderr}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def plain() -> Iterator[str]:
    """A server with default settings and the demo model."""
    with serving() as url:
        yield url


@pytest.fixture(scope="session")
def guarded(site: str) -> Iterator[str]:
    """A server that requires an API key and allows one origin (CORS)."""
    with serving("--cors-origins", site, DSD_API_KEYS=f"tests:{KEY}") as url:
        yield url


@pytest.fixture(scope="session")
def paged() -> Iterator[str]:
    """A server with the web page."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[ui]'")
    with serving("--ui", "--grace", "10") as url:
        yield url


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The origin of another site."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<!doctype html><title>somebody's page</title>")
    with serving_folder(folder) as url:
        yield url.replace("127.0.0.1", "localhost")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    file.write_bytes(write_image(sample_image(207, 0, size=64)))
    return file


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the server rejects before it is complete."""
    file = tmp_path_factory.mktemp("big") / "big.png"
    file.write_bytes(os.urandom(BIG))
    return file


@pytest.fixture(scope="session")
def drawn(plain: str) -> bytes:
    """The PNG of class 207 and seed 7, the same from every route."""
    return httpx.get(f"{plain}/generate?class=207&seed=7").raise_for_status().content


@pytest.fixture(scope="session")
def reconstructed(plain: str, photo: Path) -> bytes:
    return httpx.post(f"{plain}/reconstruct", content=photo.read_bytes()).raise_for_status().content


@pytest.fixture(scope="session")
def node() -> Callable[..., Any]:
    """Runs a script of this folder in Node: node("openai-node.mjs", ...) is the JSON that it prints."""
    program = installed("node")
    needs_packages()

    def run(script: str, *arguments: str) -> Any:
        return json.loads(output(program, str(HERE / script), *arguments))

    return run


def in_a_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine. It runs in a thread, because Playwright's loop may be running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def needs_packages() -> None:
    if not (HERE / "node_modules").exists():
        pytest.skip("the npm packages are missing: tests/clients/install.sh could not install them")


def bundled(*arguments: str, **settings: Any) -> str:
    """The output of esbuild."""
    needs_packages()
    path = f"{INSTALLED}:{os.environ['PATH']}"  # it looks for node there
    return output(
        str(HERE / "node_modules/.bin/esbuild"), *arguments, "--bundle", env={**os.environ, "PATH": path}, **settings
    )


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A browser tab of a new visitor. Requests to other machines are blocked, and fail the test."""
    context = browser.new_context()
    elsewhere = []

    def local(route: Any) -> None:
        if re.match(r"(https?://(localhost|127\.0\.0\.1)[:/]|data:|blob:)", route.request.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", local)
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    yield tab
    context.close()
    assert elsewhere == []


@dataclass(frozen=True)
class Front:
    """Addresses of nginx, by its connection to the server: `default` (HTTP/1.0, a connection for each request), `kept`
    (HTTP/1.1 with keep-alive), `unbuffered` (the same, and bodies are forwarded as they arrive)."""

    plain: dict[str, str]
    guarded: dict[str, str]
    below: str  # the API under /dsd/, the page under /ui/


PROXYING = {
    "default": "",
    "kept": 'proxy_http_version 1.1; proxy_set_header Connection "";',
    "unbuffered": 'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off;',
}


@pytest.fixture(scope="session")
def nginx(plain: str, guarded: str, paged: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    program = tool("nginx", "nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    ports = iter(free_ports(2 * len(PROXYING) + 1))
    servers, found = [], {}
    for name, url in (("plain", plain), ("guarded", guarded)):
        for how, directives in PROXYING.items():
            found[name, how] = next(ports)
            servers.append(
                f"upstream {name}-{how} {{ server {url.removeprefix('http://')}; keepalive 8; }}\n"
                f"server {{ listen 127.0.0.1:{found[name, how]}; "
                f"location / {{ proxy_pass http://{name}-{how}; {directives} }} }}\n"
            )
    below = next(ports)
    locations = "".join(
        f"location /{name}/ {{ proxy_pass {url}/; proxy_http_version 1.1; proxy_buffering off; "
        f"proxy_set_header Host $host:$server_port; proxy_set_header X-Forwarded-Prefix /{name}; }}\n"
        for name, url in (("dsd", plain), ("ui", paged))
    )
    servers.append(f"server {{ listen 127.0.0.1:{below};\n{locations}}}\n")
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        ("user root;\n" if os.geteuid() == 0 else "")  # else it could not read its folder
        + f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        + f"events {{}}\nhttp {{\naccess_log off; client_max_body_size 50m;\n{paths}{''.join(servers)}}}\n"
    )
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(config), "-e", f"{folder}/error.log"])
    try:
        wait_for(below, folder / "error.log")
        yield Front(
            plain={how: f"http://127.0.0.1:{found['plain', how]}" for how in PROXYING},
            guarded={how: f"http://127.0.0.1:{found['guarded', how]}" for how in PROXYING},
            below=f"http://127.0.0.1:{below}",
        )
    finally:
        process.terminate()
        process.wait(10)


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, f"nothing listens on {port}:\n{log.read_text()}"
        time.sleep(0.05)
