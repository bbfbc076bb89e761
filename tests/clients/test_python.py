"""Other Python clients: LiteLLM, and a client that openapi-python-client generates from /openapi.json."""

import base64
import json
import re

import httpx
import pytest

from tests.clients.checks import native
from tests.clients.conftest import HERE, KEY, installed, output

pytestmark = pytest.mark.clients


def test_litellm(guarded, plain, photo):
    printed = output(installed("python"), str(HERE / "litellm-images.py"), f"{guarded}/v1", KEY, str(photo))
    found = json.loads(printed.splitlines()[-1])
    assert found["drawn"] == [native(plain, **{"class": 207, "index": index}) for index in (0, 1)]
    assert found["sized"] == native(plain, **{"class": 207, "size": 64})
    assert found["edited"] == native(plain, photo, **{"class": 1})
    assert "class must be" in found["refused"]


def test_a_generated_client(guarded, plain, drawn, tmp_path):
    document, package = tmp_path / "openapi.json", tmp_path / "generated"
    document.write_text(httpx.get(f"{guarded}/openapi.json", headers={"x-api-key": KEY}).text)
    written = output(
        *(installed("openapi-python-client"), "generate", "--path", str(document)),
        *("--output-path", str(package), "--meta", "none"),
    )
    assert not re.search(r"unable to parse|will not be generated", written, re.IGNORECASE), written
    found = json.loads(output(installed("python"), str(HERE / "generated.py"), str(package), guarded, KEY))
    assert found["drawn"] == native(plain, **{"class": 207})
    assert base64.b64decode(found["bytes"]) == drawn
    assert found["classes"] and all("Retriever" in name for name in found["classes"])
    assert found["type"] not in ("NoneType", "dict")
    assert found["wrong"] not in ("NoneType", "dict")
