"""The browser of the tests of the page."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or a skipped test without it."""
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install '.[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the browser tests need chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()
