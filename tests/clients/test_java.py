"""The HTTP clients of Java's standard library."""

import base64
import json
from collections import defaultdict

import pytest

from tests.clients.conftest import HERE, output, tool

pytestmark = pytest.mark.clients


def test_the_clients_of_java(plain, guarded, photo, drawn, reconstructed):
    program = tool("java", "default-jdk-headless")
    found = defaultdict(list)
    for line in output(program, str(HERE / "Client.java"), plain, guarded, str(photo)).splitlines():
        name, status, *body = line.split(" ")
        found[name].append((int(status), base64.b64decode("".join(body))))
    assert found["get"] == found["json"] == [(200, drawn)] * 2
    assert found["together"] == [(200, drawn)] * 8
    for name in ("form", "raw", "chunked", "old", "old-chunked"):
        assert found[name] == [(200, reconstructed)] * 2, name
    for status, body in found["openai"]:
        assert (status, base64.b64decode(json.loads(body)["data"][0]["b64_json"])) == (200, drawn)
    assert [status for status, _ in found["edits"]] == [200] * 2
    assert found["events"] == [(200, b"event: image,event: image,event: done")]
    for name, refused in (("large", 413), ("large-chunked", 413), ("key", 401)):
        assert [status for status, _ in found[name]] == [refused] * 2, name
        assert all(json.loads(body)["status"] == refused for _, body in found[name])
