"""The OpenAPI document against the real server: schemathesis, and every example and curl command in it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, Running

SMALL = ("--max-steps", "8", "--max-images", "4", "--max-size", "64", "--max-body-mb", "1")
METHODS = ("get", "post")


@pytest.fixture(scope="module")
def small_url(tiny_dir: Path) -> Iterator[str]:
    """A real server of the tiny model whose limits keep every call short."""
    running = Running("--model", str(tiny_dir), *SMALL)
    yield running.url
    assert running.stop() == 0


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    running = Running("--max-steps", "8")
    yield running.url
    assert running.stop() == 0


@pytest.fixture(scope="module")
def document(small_url: str):
    return httpx.get(f"{small_url}/openapi.json").json()


def operations(document):
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS and not path.startswith("/v1")
    ]


def test_schemathesis_finds_nothing(small_url, tmp_path):
    """No 5xx, no undocumented answer, no valid request refused, no invalid one taken. schemathesis.toml says more."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/schemathesis.toml")),
        *("run", f"{small_url}/openapi.json", "--no-color", "--phases", "examples,coverage,fuzzing"),
        *("--seed", "1", "--generation-deterministic", "--max-examples", "12"),
    ]
    environment = {"SCHEMATHESIS_HOOKS": str(ROOT / "tests/schemathesis_hooks.py"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = re.search(r"Test cases:\s+(\d+) generated", done.stdout)
    assert tested and int(tested[1]) > 500, done.stdout
