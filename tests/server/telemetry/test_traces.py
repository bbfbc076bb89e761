"""The OTEL_* variables that platforms set, and collectors that do not answer."""

import os
import signal
import socket
import time

import httpx
import pytest

from dsd_serve.errors import ConfigError
from server.telemetry.traces import load_traces
from tests.support.servers import QUICK, Server

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def load(monkeypatch, flag, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    traces = load_traces(flag)
    if traces.provider is not None:
        traces.provider.shutdown()
    return traces.provider is not None


@pytest.mark.parametrize(
    ("flag", "environment", "on"),
    [
        (False, {}, False),
        (False, {"OTEL_TRACES_EXPORTER": "bogus"}, False),  # traces are not requested
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, False),
        (False, ENDPOINT, True),
        (False, ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (False, ENDPOINT | {"OTEL_TRACES_EXPORTER": "NONE"}, False),
        (False, ENDPOINT | {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (False, ENDPOINT | {"OTEL_TRACES_EXPORTER": ""}, True),
        (False, ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        (False, ENDPOINT | {"OTEL_SDK_DISABLED": "false", "OTEL_EXPORTER_OTLP_PROTOCOL": ""}, True),
        (False, ENDPOINT | {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        (True, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_the_variables_are_obeyed(monkeypatch, flag, environment, on):
    assert load(monkeypatch, flag, environment) == on


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, "--otel turns traces on and OTEL_TRACES_EXPORTER=none turns them off"),
        ({"OTEL_SDK_DISABLED": "TRUE"}, "--otel turns traces on and OTEL_SDK_DISABLED=true turns them off"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER must be otlp or none, got 'zipkin'"),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, "OTEL_TRACES_EXPORTER must be otlp or none"),
        ({"OTEL_SDK_DISABLED": "1"}, "OTEL_SDK_DISABLED must be true or false, got '1'"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, "must be http/protobuf, got 'grpc'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, "must be an address like http://localhost:4318"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://"}, "must be an address like"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:99999"}, "must be an address like"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "OpenTelemetry does not take one of the variables OTEL_*: "),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "many"}, "OpenTelemetry does not take one of the variables OTEL_*: "),
    ],
)
def test_wrong_values_are_one_sentence(monkeypatch, environment, words):
    with pytest.raises(ConfigError) as error:
        load(monkeypatch, True, environment)
    assert words in str(error.value) and len(str(error.value)) < 400


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        running = Server(
            folder=tmp_path, env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        )
        assert httpx.get(running.url + "/generate", params=QUICK, timeout=30).status_code == 200
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        assert time.monotonic() - began < 6  # 30 s without a limit; 1.5 s, and what a busy machine adds
    assert "Traceback" not in running.log
