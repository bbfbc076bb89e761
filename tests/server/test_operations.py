"""Operation of real server processes: metrics, logs, keys, CORS, traces, the dashboard, an orderly end."""

import asyncio
import http.server
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from dsd_serve.errors import CancelledError, ConfigError
from server import error_responses
from server.keys import ApiKey, find, load_keys
from server.middleware import request_id
from server.settings import GROUPS, HELP, Settings, parse_settings
from server.site import parse_origins
from server.telemetry import logs
from server.telemetry.metrics import Metrics
from tests.support.data import ROOT
from tests.support.servers import QUICK, Server, until

ADMIN, SLOW, FEW = "admin-key-0123456789", "slow-key-0123456789", "few-key-0123456789"


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP/HTTP receiver that keeps spans."""

    spans: list = []  # noqa: RUF012 one receiver per module

    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in sent.resource_spans:
            service = {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.spans += [(self.path, service, span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with everything switched on."""
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys"
    keys.write_text(f"# who: key: requests a minute: images at once\nadmin:{ADMIN}\nslow:{SLOW}:2\n")
    keys.chmod(0o644)
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    running = Server(
        *("--row-budget", "32", "--api-keys", str(keys), "--cors-origins", "https://a.example", "--log-format", "json"),
        folder=folder,
        env={
            "DSD_API_KEYS": f"few:{FEW}:0:2",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        },
    )
    yield running
    assert running.stop() == 0
    collector.shutdown()
    for text in (running.stdout.read_text(), running.log):
        assert not [key for key in (ADMIN, SLOW, FEW) if key in text], "a key is in the log"
        assert "never-log-this" not in text
        for line in text.splitlines():
            json.loads(line)


@pytest.fixture
def admin(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60) as client:
        yield client


# Request ids and logs.


def access_line(server, number):
    def look():
        lines = [json.loads(line) for line in server.stdout.read_text().splitlines()]
        return [line for line in lines if line["request_id"] == number]

    (line,) = until(look)
    return line


def test_every_answer_has_a_request_id(server, admin):
    answer = admin.get("/generate", params=QUICK)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert admin.get("/model", headers={"X-Request-ID": "my.id-1_2"}).headers["x-request-id"] == "my.id-1_2"
    for bad in ("has space", "x" * 129, "semi;colon", ""):
        assert re.fullmatch("[0-9a-f]{32}", admin.get("/model", headers={"X-Request-ID": bad}).headers["x-request-id"])
    for answer, status in (
        (admin.get("/nothing"), 404),
        (admin.get("/generate", params={"class": 3}), 422),
        (admin.post("/reconstruct", content=b"x" * 20_000_001), 413),
        (httpx.get(server.url + "/model"), 401),
    ):
        assert answer.status_code == status
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_one_access_line_per_request_without_secrets(server, admin):
    answer = admin.get("/generate", params={**QUICK, "seed": 5}, headers={"cookie": "never-log-this"})
    line = access_line(server, answer.headers["x-request-id"])
    assert {name: line[name] for name in ("level", "logger", "method", "path", "status", "client")} == {
        "level": "info",
        "logger": "server.access",
        "method": "GET",
        "path": "/generate",
        "status": 200,
        "client": "127.0.0.1",
    }
    assert (line["seed"], line["steps"], line["class"]) == ("5", "1", "207")
    assert 0 < line["duration_ms"] < 10_000
    answer = admin.get("/generate", params={"class": "never-log-this"})
    assert access_line(server, answer.headers["x-request-id"])["path"] == "/generate"
    answer = admin.post("/reconstruct", content=b"never-log-this")
    assert access_line(server, answer.headers["x-request-id"])["status"] == 422
    assert "every user of this machine can read the API keys" in server.log


def test_a_path_cannot_write_lines_or_fields(server, admin):
    answer = admin.get('/x%0D%0A{"level":"error"}%E2%80%A8%1b[31m')
    assert access_line(server, answer.headers["x-request-id"])["path"] == '/x\r\n{"level":"error"}\u2028\x1b[31m'
    pretty = logs.PrettyFormatter()
    fields = {"path": "/x\r\n12:00 ERROR\x1b[31m\u2028\x85 status=200"}
    record = logging.makeLogRecord({"name": "a", "msg": "m\nn", "levelno": 20, "levelname": "INFO", "fields": fields})
    line = pretty.format(record)
    assert line.isprintable() and len(line.splitlines()) == 1
    assert r'm\nn path="/x\r\n12:00 ERROR\u001b[31m\u2028\u0085 status=200"' in line
    try:
        raise ValueError("first\nsecond 12:00:00 INFO fake")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert all(line.startswith("    ") for line in pretty.format(record).splitlines()[1:])


def test_an_internal_error_is_a_problem_with_the_id(caplog):
    app = FastAPI()
    error_responses.install(app)
    seen = []
    request_id.install(app, seen.append)

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("details for the log only")

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
            return await client.get("/broken", headers={"X-Request-ID": "abc"})

    answer = asyncio.run(send())
    assert (answer.status_code, answer.headers["x-request-id"], answer.json()["request_id"]) == (500, "abc", "abc")
    assert "for the log only" not in answer.text
    assert "details for the log only" in caplog.text
    assert [(record.route, record.status) for record in seen] == [("/broken", 500)]


# Metrics and the dashboard.


def test_metrics_count_what_happened(server, admin):
    key = {"X-API-Key": ADMIN}
    before = server.metrics(**key)
    admin.get("/generate", params={"class": 1, "n": 2, "steps": 3, "sampler": "heun", "guidance": 2})
    image = admin.get("/generate", params=QUICK).content
    admin.post("/reconstruct", content=image)
    for i in range(5):
        admin.get(f"/made-up-{i}")
    admin.delete("/generate")
    after = server.metrics(**key)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[("dsd_requests_total", "200", "/generate")] == 2
    assert grown[("dsd_requests_total", "405", "/generate")] == 1
    assert grown[("dsd_requests_total", "404", "none")] == 5
    assert not [name for name in after if "made-up" in str(name)]
    assert grown[("dsd_images_total",)] == 4
    assert grown[("dsd_network_rows_total", "denoise")] == 2 * 2 * 5 + 1
    assert grown[("dsd_network_rows_total", "decode")] == 4
    assert grown[("dsd_network_rows_total", "encode")] == 1
    assert grown[("dsd_ticks_total",)] == grown[("dsd_tick_duration_seconds_count",)] >= 5 + 1 + 2 + 2
    assert grown[("dsd_tick_rows_sum",)] == 21 + 4 + 1
    assert grown[("dsd_queue_duration_seconds_count",)] == 4
    assert grown[("dsd_request_duration_seconds_count", "/generate")] == 3
    assert grown[("dsd_key_requests_total", "admin")] == 10  # and the /metrics before
    assert after[("dsd_ready",)] == 1
    assert after[("dsd_images_running",)] == after[("dsd_images_waiting",)] == after[("dsd_seconds_ahead",)] == 0
    assert after[("process_resident_memory_bytes",)] > 1e7
    info = next(name for name in after if name[0] == "dsd_model_info")
    model = admin.get("/model").json()
    assert {model["name"], model["fingerprint"], "CPUExecutionProvider", "onnx", "cpu", "fp32"} == set(info[1:])
    accept = {"accept": "application/openmetrics-text; version=1.0.0", **key}
    assert admin.get("/metrics", headers=accept).text.endswith("# EOF\n")


def test_a_client_that_goes_away_is_counted(server):
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(
            server.url + "/generate", params={"class": 1, "steps": 250}, headers={"X-API-Key": ADMIN}, timeout=0.05
        )
    until(lambda: server.metrics(**{"X-API-Key": ADMIN})[("dsd_requests_cancelled_total", "disconnect")] == 1)
    assert server.metrics(**{"X-API-Key": ADMIN})[("dsd_requests_total", "499", "/generate")] == 1


def test_a_request_cancelled_by_shutdown_is_counted():
    metrics = Metrics()
    metrics.answered(request_id.RequestRecord({"type": "http", "state": {"error": CancelledError("x")}}, status=503))
    metrics.answered(request_id.RequestRecord({"type": "http", "state": {}}, status=503))
    count = metrics.registry.get_sample_value
    assert count("dsd_requests_cancelled_total", {"reason": "shutdown"}) == 1
    assert count("dsd_requests_total", {"route": "none", "code": "503"}) == 2


def test_the_dashboard_uses_existing_metrics(server, admin):
    dashboard = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    assert dashboard["schemaVersion"] >= 39 and dashboard["uid"] and dashboard["title"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) == 23
    admin.get("/generate", params=QUICK)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(admin.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    variables = {item["name"] for item in dashboard["templating"]["list"]}
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [item["definition"] for item in dashboard["templating"]["list"] if "definition" in item]
    for query in queries:
        names = re.findall(r"\b(?:dsd|process)_\w+", query)
        assert names and set(names) <= set(labels), query
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(group.split(", ")) <= set.union(*(labels[name] for name in names)), query
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}


# Keys, limits, CORS.


def test_keys(server):
    with httpx.Client(base_url=server.url) as client:
        for path in ("/health/live", "/health/ready", "/health"):
            assert client.get(path).status_code == 200
        for path in ("/docs", "/redoc", "/openapi.json", "/docs/assets/swagger-ui.css"):  # a key is entered there
            assert client.get(path).status_code == 200
        for path in ("/model", "/metrics", "/docs/", "/docs/assets", "/", "/nothing", "/generate?class=1"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="dsd"')
            assert "needs an API key" in answer.json()["detail"]
        for headers in (
            {"Authorization": f"Bearer {ADMIN}x"},
            {"Authorization": f"Basic {ADMIN}"},
            {"X-API-Key": ADMIN[:-1]},
            {"X-API-Key": b"\xff" * 20},
        ):
            assert client.get("/model", headers=headers).status_code == 401
        for headers in ({"Authorization": f"bearer {ADMIN}"}, {"X-API-Key": ADMIN}, {"X-API-Key": FEW}):
            assert client.get("/model", headers=headers).status_code == 200


def test_a_key_has_a_rate(server):
    answers = [httpx.get(server.url + "/model", headers={"X-API-Key": SLOW}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert "the key slow may send 2 requests a minute" in answers[2].json()["detail"]
    metrics = server.metrics(**{"X-API-Key": ADMIN})
    assert metrics[("dsd_requests_rejected_total", "rate_limit")] == 1
    assert metrics[("dsd_key_requests_total", "slow")] == 3
    key = ApiKey("a", b"", per_minute=60)
    key.tokens, key.filled = 1, 0.0
    assert (key.take(0.0), key.take(0.25), key.take(1.0)) == (0.0, 0.75, 0.0)
    assert key.take(1e6) == 0 and key.tokens == 59


def test_a_key_has_a_number_of_images_at_once(server):
    with httpx.Client(base_url=server.url, headers={"X-API-Key": FEW}, timeout=60) as client:
        answer = client.get("/generate", params={**QUICK, "n": 3})
        assert (answer.status_code, "may have 2 images at once" in answer.json()["detail"]) == (422, True)
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(client.get, "/generate", params={"class": 1, "n": 2, "steps": 60})
            until(lambda: server.metrics(**{"X-API-Key": ADMIN})[("dsd_images_running",)] == 2)
            answer = client.get("/generate", params=QUICK)
            assert (answer.status_code, "2 are under way" in answer.json()["detail"]) == (429, True)
            assert long.result().status_code == 200
        assert client.get("/generate", params={**QUICK, "n": 2}).status_code == 200


def test_cors_is_for_the_origins_that_were_named(server, admin):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = httpx.options(server.url + "/generate", headers={"Origin": "https://a.example", **preflight})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    answer = httpx.options(server.url + "/generate", headers={"Origin": "https://evil.example", **preflight})
    assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
    answer = admin.get("/model", headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-origin" not in admin.get("/model", headers={"Origin": "https://b.example"}).headers
    refused = httpx.get(server.url + "/model", headers={"Origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("only-a-name", "line 1 of FILE must be name:key"),
        ("a:short-secret", "the key in line 1 of FILE must have at least 16"),
        ("# no\n\na b:long-enough-secret", "the name in line 3 of FILE must be 1 to 64"),
        ("a:long-enough-secret:fast", "line 1 of FILE must be name:key"),
        ("a:long-enough-secret\nb:long-enough-secret", "the keys of API keys must differ"),
        ("a:long-enough-secret\na:long-enough-secre2", "the names of API keys must differ"),
        ("# nothing", "FILE holds no API key"),
    ],
)
def test_wrong_keys_are_reported_without_repeating_them(tmp_path, lines, words):
    path = tmp_path / "keys"
    path.write_text(lines)
    with pytest.raises(ConfigError) as error:
        load_keys(str(path), {})
    assert words in str(error.value).replace(str(path), "FILE")
    assert "secre" not in str(error.value).replace("import secrets; print(secrets.", "")
    with pytest.raises(ConfigError, match="the file that api_keys names cannot be read") as error:
        load_keys("name:a-secret-in-the-wrong-place", {})
    assert "a-secret" not in str(error.value)


def test_keys_from_the_environment():
    first, second = load_keys("", {"DSD_API_KEYS": " a:0123456789abcdef , b:fedcba9876543210:60:4,"})
    assert (second.name, second.per_minute, second.images_at_once) == ("b", 60, 4)
    assert find([first, second], "0123456789abcdef") is first
    assert find([first, second], "") is None
    assert "0123456789abcdef" not in repr(first)
    assert load_keys("", {}) == []


# Traces.


def test_spans_arrive(server, admin):
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    answer = admin.get("/generate", params={**QUICK, "n": 2}, headers={"traceparent": f"00-{trace_id}-{parent}-01"})

    def ours():
        found = [item for item in Collector.spans if item[2].trace_id.hex() == trace_id]
        return found if len(found) >= 5 else None

    spans = until(ours)
    assert {(path, service) for path, service, _ in spans} == {("/v1/traces", "dsd-serve")}
    (request,) = (span for *_, span in spans if span.name == "GET /generate")
    assert request.parent_span_id.hex() == parent
    below = [span for *_, span in spans if span is not request]
    assert sorted(span.name for span in below) == ["network", "network", "queue", "queue"]
    for span in below:
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    assert access_line(server, answer.headers["x-request-id"])["trace_id"] == trace_id
    assert not [span for *_, span in Collector.spans if "health" in span.name or "metrics" in span.name]


# Settings.


def test_help_documents_every_setting():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(HELP) == sorted(vars(Settings()))
    secret = {"DSD_API_KEYS": "a:secret-secret-secret"}
    command = [sys.executable, "-m", "server.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **secret})
    assert "secret-secret" not in done.stdout
    words = " ".join(done.stdout.split())
    for title in GROUPS:
        assert f"{title}:" in words
    for name in HELP:
        assert f"--{name.replace('_', '-')}" in words
        assert f"[DSD_{name.upper()}{'_FILE' if name in ('api_keys', 'admin_key') else ''}]" in words


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--log-format", "xml"], {}, "log_format must be one of pretty, json, got 'xml'"),
        (["--colour"], {}, "unrecognized arguments: --colour; dsd-serve --help lists the flags"),
        (["--cors-origins", "a.example"], {}, "cors_origins must be like https://a.example"),
        (["--cors-origins", "https://a.example/"], {}, "no slash at the end"),
        (["--cors-origins", "*,https://a.example"], {}, "either * or a list"),
        (["--allowed-hosts", "https://a.example"], {}, "allowed_hosts must be names like images.example.com"),
        ([], {"DSD_ROOT_PATH": "//a.example"}, "root_path must be a path like /dsd"),
        (["--api-keys", "/nowhere"], {}, "the API keys in /nowhere cannot be read: No such file"),
        ([], {"DSD_OTEL": "maybe"}, "DSD_OTEL must be true or false, got 'maybe'"),
        (["--otel"], {"OTEL_SDK_DISABLED": "true"}, "OTEL_SDK_DISABLED=true turns them off"),
        ([], {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
    ],
)
def test_wrong_settings_are_one_sentence(monkeypatch, arguments, environment, words):
    from server.telemetry.traces import load_traces

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        settings = parse_settings(arguments)
        load_keys(settings.api_keys, {})
        parse_origins(settings.cors_origins)
        load_traces(settings.otel)
    assert words in str(error.value)


def test_traces_without_their_extra_are_a_sentence():
    code = (
        "import sys; sys.modules['opentelemetry.sdk.resources'] = None\n"
        "from server.main import main; main(['--otel', '--port', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "pip install '.[otel]'" in done.stderr and "Traceback" not in done.stderr


# The end.


@pytest.fixture
def launch(tmp_path):
    """Starts a server of the test's own; one that a failed test leaves behind is killed."""
    started = []

    def start(*arguments):
        started.append(Server("--row-budget", "32", *arguments, folder=tmp_path))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()


def running_images(server):
    metrics = server.metrics()
    return metrics[("dsd_images_running",)] + metrics[("dsd_images_waiting",)]


def test_sigterm_with_twenty_requests_in_flight(launch):
    """All twenty finish, new ones are refused with a sentence, readiness is false at once, and the exit code is 0."""
    server = launch()
    query = {"class": 207, "steps": 60, "sampler": "euler", "guidance": 1}

    def draw(seed):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            # a slow first tick makes the server expect that 20 images take too long
            while (status := client.get("/generate", params={**query, "seed": seed}).status_code) == 429:
                time.sleep(0.1)
            return status

    with ThreadPoolExecutor(20) as pool, httpx.Client(base_url=server.url, timeout=60) as old:
        old.get("/model")  # a connection from before
        answers = [pool.submit(draw, seed) for seed in range(20)]
        until(lambda: running_images(server) == 20)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.metrics()[("dsd_ready",)] == 0, 1)
        assert not any(answer.done() for answer in answers)
        assert httpx.get(server.url + "/health/live").status_code == 200
        for answer in (
            httpx.get(server.url + "/generate", params=query),
            old.get("/generate", params=query),
            httpx.get(server.url + "/health/ready"),
            httpx.get(server.url + "/health"),
        ):
            assert answer.status_code == 503
            assert (answer.headers["retry-after"], answer.headers["connection"]) == ("5", "close")
            assert "the server is shutting down" in answer.json()["detail"]
        assert server.metrics()[("dsd_requests_rejected_total", "draining")] == 2
        assert [answer.result() for answer in answers] == [200] * 20
    assert server.process.wait(5) == 0
    assert "have 30 s to finish" in server.log
    assert "Traceback" not in server.log


def test_after_the_grace_what_runs_is_cancelled_with_an_answer(launch):
    server = launch("--grace", "0.3", "--max-steps", "1000")
    with ThreadPoolExecutor(1) as pool:
        query = {"class": 207, "steps": 1000, "n": 4}
        answer = pool.submit(httpx.get, server.url + "/generate", params=query, timeout=60)
        until(lambda: running_images(server) == 4)
        began = time.monotonic()
        assert server.stop(5) == 0
        assert time.monotonic() - began < 2
        assert (answer.result().status_code, answer.result().headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(launch, second):
    server = launch("--max-steps", "1000")
    with ThreadPoolExecutor(1) as pool:
        query = {"class": 207, "steps": 1000, "n": 4}
        answer = pool.submit(httpx.get, server.url + "/generate", params=query, timeout=60)
        until(lambda: running_images(server) == 4)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.metrics()[("dsd_ready",)] == 0)
        server.process.send_signal(second)
        assert server.process.wait(1) == -second
        assert isinstance(answer.exception(), httpx.RemoteProtocolError)
