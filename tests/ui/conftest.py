"""Fixtures of the tests of the page: servers with it, its visitors, and a photo."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsd_serve.imaging.codec import write_image
from tests.support.browser import wait_until_ready
from tests.support.data import sample_image
from tests.support.servers import Server, running_server


@pytest.fixture(scope="session")
def running() -> Iterator[Server]:
    """A server with the page of the demo model."""
    with running_server("--ui", "--grace", "20") as running:
        yield running


@pytest.fixture(scope="session")
def slow() -> Iterator[Server]:
    """Another, on which 8 images of 250 steps take seconds on any machine: it runs one row at a time."""
    with running_server("--ui", "--grace", "20", "--row-budget", "1") as running:
        yield running


@pytest.fixture
def opened(visit: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Opens the page as a new visitor and waits for its controls: opened(url, width=...), by default of `running`."""

    def opened(url: str = "", **settings: Any) -> Any:
        page = visit(url or request.getfixturevalue("running").url, **settings)
        wait_until_ready(page)
        return page

    return opened


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    file.write_bytes(write_image(sample_image(207, 0, size=200)))
    return file
