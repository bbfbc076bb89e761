"""dsd-serve and dsd-ui as real processes: start, addresses, signals, and proxies in front."""

import contextlib
import json
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dsd_serve.errors import ConfigError
from dsd_serve.imaging.codec import write_image
from server import front
from server.settings import Settings, descriptors, parse_settings
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server, until
from tests.support.sockets import OFFERS, read_all, read_answer

PROGRAMS = {"dsd-serve": ["server.main"], "dsd-ui": ["ui.main"]}
KEYS = "first:first-key-0123456789\nsecond:second-key-0123456789:1\n"


def command(program, *arguments):
    return [sys.executable, "-m", *PROGRAMS[program], *arguments]


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*arguments, **options):
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Server(*arguments, folder=folder, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A server that tests share."""
    server = Server("--max-body-mb", "1", "--head-timeout", "1", "--row-budget", "32")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


def address(server):
    url = httpx.URL(server.url)
    return url.host, url.port


def ended(arguments, **options):
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


# Listening.


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.thorough
def test_an_unusable_address_is_reported_before_anything_is_loaded(program):
    model = ["--model", "/nowhere"] if program == "dsd-serve" else ["--server", "nonsense"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            (["--port", str(port)], f"port {port} of '127.0.0.1' is in use by another program"),
            (["--host", "no.such.host.invalid"], "host must be an address of this machine, or a name of one"),
            (["--host", "192.0.2.1"], "host must be an address of this machine"),
            (["--host", "a" * 100 + "." + "b" * 300], "host must be an address"),
            (["--host", "a..b"], "host must be an address"),
            (["--port", "99999"], "port must be an integer from 0 to 65535"),
            (["--keep-alive", "nan"], "keep_alive must be a number from 0.001"),
            (["--max-connections", "1000000"], "max_connections must be an integer from 1 to"),
        ):
            done = ended(command(program, *model, *arguments))
            assert done.returncode == 1
            assert done.stderr.startswith(f"{program}: ") and words in done.stderr
            assert "Traceback" not in done.stderr and "b" * 100 not in done.stderr


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
        tried.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize("host", ["::", ""])
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_are_those_of_both_families(host):
    sockets = front.listen(host, 0)
    try:
        assert {one.family for one in sockets} == {socket.AF_INET, socket.AF_INET6}
        assert len({one.getsockname()[1] for one in sockets}) == 1
    finally:
        front.close(sockets)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_server_on_all_addresses_answers_on_both_and_logs_plain_ones(launch):
    server = launch("--host", "::")
    port = httpx.URL(server.url).port
    for host in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{host}:{port}/health/live").status_code == 200
    until(lambda: "client=127.0.0.1" in server.stdout.read_text() and "client=::1" in server.stdout.read_text())


def test_an_address_that_is_taken_in_one_family_is_taken(free_port):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match="in use"):
        front.listen("::", port)


def test_connections_leave_descriptors_for_files():
    assert Settings().max_connections <= descriptors() // 2
    assert parse_settings(["--max-connections", "100"]).max_connections == 100
    with pytest.raises(ConfigError, match="max_connections must be an integer from 1 to"):
        parse_settings(["--max-connections", str(descriptors())])


# Signals.


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_while_it_starts_is_silent(program):
    for delay in (0.15, 0.3, 0.6):
        process = subprocess.Popen(command(program, "--port", "0"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        # Before the first line of ours has run, Python itself answers the signal.
        until(lambda process=process: caught(process, signal.SIGINT) or process.poll() is not None)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, written = process.communicate(timeout=30)
        assert process.returncode in (130, 0)  # 0: it was running by then
        assert "Traceback" not in written


def caught(process, number):
    """True if a process has a handler of its own for a signal, and has begun to run our code."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        mask = int(status.partition("SigCgt:")[2].split()[0], 16)
        # Python itself catches SIGINT; ours, SIGHUP too.
        return mask >> (number - 1) & 1 and mask >> (signal.SIGHUP - 1) & 1
    return False


def test_sighup_reads_the_keys_again(launch, tmp_path):
    file = tmp_path / "keys"
    file.write_text(KEYS)
    file.chmod(0o600)
    server = launch("--api-keys", str(file))

    def status(key):
        return httpx.get(server.url + "/model", headers={"X-API-Key": key}).status_code

    def hang_up(words):
        already = server.log.count(words)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log.count(words) > already)

    assert [status(key) for key in ("first-key-0123456789", "third-key-0123456789")] == [200, 401]
    assert status("second-key-0123456789") == 200  # one a minute
    file.write_text(KEYS.replace("first", "third"))
    hang_up("2 API keys were reloaded")
    assert [status(key) for key in ("first-key-0123456789", "third-key-0123456789")] == [401, 200]
    assert status("second-key-0123456789") == 429  # a reload is not a new minute
    for broken in ("nonsense", "", "a:short"):
        file.write_text(broken)
        hang_up("the API keys are unchanged")
        assert status("third-key-0123456789") == 200
    file.unlink()
    hang_up("the API keys are unchanged")
    os.mkfifo(file)  # opening it would wait for a writer, for ever
    hang_up("can be read again from a regular file only")
    assert [status("third-key-0123456789"), status("")] == [200, 401]
    assert server.stop() == 0


def test_sighup_without_keys_has_no_effect(launch):
    server = launch()
    for _ in range(3):
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.15)
    assert httpx.get(server.url + "/generate", params={"class": 207, "steps": 1}).status_code == 200
    assert server.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
def test_a_terminal_that_closes_ends_the_server_after_its_requests(tmp_path):
    """The terminal's hang-up comes as SIGHUP to the process that it belongs to; what it draws must not be lost."""
    log = tmp_path / "log"
    pid, terminal = pty.fork()
    if pid == 0:
        written = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.chdir(ROOT)
        os.execv(sys.executable, command("dsd-serve", "--port", "0", "--row-budget", "32"))
    try:
        until(lambda: log.exists() and "running on" in log.read_text(), 60)
        url = httpx.URL(log.read_text().partition("running on ")[2].split()[0])
        with socket.create_connection((url.host, url.port), timeout=60) as opened:
            opened.sendall(b"GET /generate?class=207&steps=100&n=4 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.2)
            os.close(terminal)
            assert read_answer(opened)[0] == 200
        assert os.waitstatus_to_exitcode(until(lambda: os.waitpid(pid, os.WNOHANG)[0] and (pid, 0), 30)[1]) == 0
    finally:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    assert "shutting down" in log.read_text() and "Traceback" not in log.read_text()


def test_the_page_takes_signals_and_has_the_same_bounds(launch):
    page = launch("--server", "http://127.0.0.1:9", "--head-timeout", "1", module="ui.main")
    page.process.send_signal(signal.SIGHUP)
    with socket.create_connection(address(page), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        assert read_all(opened).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(address(page), timeout=30) as opened:
        body = b"x" * 100
        opened.sendall(
            b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n" + OFFERS[0] + b"Content-Length: 100\r\n\r\n" + body
        )
        assert read_answer(opened)[0] in (404, 405)
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(20) == 0
    assert "Traceback" not in page.log


# Descriptors.


def test_a_server_with_few_descriptors_outlives_half_heads(launch, tmp_path):
    limited = (
        f"import os, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)); os.execv({sys.executable!r}, "
    )
    script = tmp_path / "limited.py"
    script.write_text(limited + repr(command("dsd-serve", "--port", "0", "--head-timeout", "30")) + ")")
    log = tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen([sys.executable, script], cwd=ROOT, stderr=err)
    try:
        until(lambda: "running on" in log.read_text(), 60)
        url = log.read_text().partition("running on ")[2].split()[0]
        parsed = httpx.URL(url)
        with contextlib.ExitStack() as stack:
            for _ in range(250):
                held = stack.enter_context(socket.create_connection((parsed.host, parsed.port), timeout=10))
                held.sendall(b"GET / HTTP/1.1\r\nX-A: ")
            assert httpx.get(url + "/health/live", timeout=10).status_code == 200
            assert httpx.get(url + "/generate", params={"class": 207, "steps": 1}, timeout=30).status_code == 200
        assert "64 connections are open" in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux only")
def test_a_server_that_runs_out_of_descriptors_says_so_and_recovers(launch):
    server = launch()
    before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (8, before[1]))
    until(lambda: "no file descriptor is left" in server.log)
    time.sleep(2.5)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)
    assert httpx.get(server.url + "/health/live").status_code == 200
    assert server.log.count("no file descriptor is left") == 1
    assert server.stop() == 0


# Requests.


PNG = write_image(sample_image(207, 0, size=24))
FORM = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + PNG + b"\r\n--B--\r\n"
JSON, FORM_TYPE = b"application/json", b"multipart/form-data; boundary=B"
WALK = json.dumps({"from": {"class": 207}, "to": {"class": 1}, "n": 2, "steps": 1}).encode()
POSTS = {
    "/generate": (JSON, b'{"class": 207, "steps": 1}'),
    "/interpolate": (JSON, WALK),
    "/encode": (b"image/png", PNG),
    "/reconstruct": (FORM_TYPE, FORM),
    "/edit?class=207&steps=1": (FORM_TYPE, FORM),
    "/v1/images/generations": (JSON, b'{"prompt": "golden retriever", "num_inference_steps": 1}'),
    "/v1/images/variations": (FORM_TYPE, FORM),
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("chunked", [False, True])
def test_every_route_reads_the_body_of_a_request_that_offers_http2(one, path, chunked):
    kind, body = POSTS[path]
    framing = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    with socket.create_connection(address(one), timeout=60) as opened:
        opened.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % path.encode() + OFFERS[0] + framing)
        opened.sendall(b"Content-Type: " + kind + b"\r\n\r\n" + sent)
        status, answered = read_answer(opened)
    assert status == 200, answered[:300]


def test_requests_refused_before_the_application_are_counted(one):
    before = one.metrics()
    with socket.create_connection(address(one), timeout=30) as opened:
        opened.sendall("GET /classes?q=größe HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        read_all(opened)
    with socket.create_connection(address(one), timeout=30) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nX: ")
        read_all(opened)
        after = one.metrics()
    for reason in ("refused", "slow_head"):
        name = ("dsd_connections_cut_total", reason)
        assert after[name] == before[name] + 1
    assert after[("dsd_connections",)] >= 1 and after[("dsd_unsent_bytes",)] == 0
    assert "No supported WebSocket library" not in one.log


def test_a_half_closed_request_is_drawn(one):
    with socket.create_connection(address(one), timeout=60) as opened:
        opened.sendall(b"GET /generate?class=207&steps=60 HTTP/1.0\r\n\r\n")
        opened.shutdown(socket.SHUT_WR)
        assert b"\r\n\r\n\x89PNG" in read_all(opened)


# Proxies.

NGINX = """
{user} daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{port}; client_max_body_size 100m; location / {{ proxy_pass {url}; }} }}
  server {{
    listen 127.0.0.1:{other}; client_max_body_size 100m; proxy_request_buffering off;
    location / {{ proxy_pass {url}; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@contextlib.contextmanager
def behind_nginx(server, folder, free_port):
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed")
    ports = free_port(), free_port()
    file = folder / "nginx.conf"
    file.write_text(
        NGINX.format(
            folder=folder, port=ports[0], other=ports[1], url=server.url, user="user root;" * (os.getuid() == 0)
        )
    )
    started = subprocess.Popen([binary, "-p", str(folder), "-c", str(file)], stderr=subprocess.PIPE, text=True)
    try:

        def up():
            assert started.poll() is None, started.stderr.read()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[1]), timeout=1):
                return True

        until(up)
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        started.terminate()
        started.wait(20)


def test_early_refusals_behind_nginx(launch, tmp_path, free_port):
    """With its defaults nginx speaks HTTP/1.0 to us and sends all of a body, whatever is answered."""
    server = launch("--max-body-mb", "1", env={"DSD_API_KEYS": "somebody:0123456789abcdef"})
    body = os.urandom(1_000_000) * 29
    key = {"X-API-Key": "0123456789abcdef"}
    with behind_nginx(server, tmp_path, free_port) as urls:
        for url in urls:
            for headers, status, words in (
                (key, 413, "larger than 1 MB"),
                ({}, 401, "needs an API key"),
                ({**key, "Content-Encoding": "gzip"}, 415, "content-encoding"),
            ):
                for _ in range(2):
                    answer = httpx.post(url + "/reconstruct", content=body, headers=headers, timeout=60)
                    assert (answer.status_code, words in answer.text) == (status, True), answer.text
            assert httpx.get(url + "/generate", params={"class": 207, "steps": 1}, headers=key).status_code == 200
    assert server.stop() == 0
