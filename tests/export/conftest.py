"""The static page of the demo model, on a web server, and its visitors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export.web_folder import write_web
from tests.support.browser import MS, REASON
from tests.support.servers import serving_folder
from tests.support.web_runtime import installed_runtime


@pytest.fixture(scope="session")
def web_folder(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below the root of a web server."""
    folder = tmp_path_factory.mktemp("root") / "deep" / "down"
    write_web(demo_dir, folder, installed_runtime())
    return folder


@pytest.fixture(scope="session")
def url(web_folder: Path) -> Iterator[str]:
    with serving_folder(web_folder.parent.parent) as url:
        yield f"{url}/deep/down/"


@pytest.fixture
def opened(visit: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Opens pages, in which no script fails."""
    failed = []
    pytest.importorskip("playwright.sync_api", reason=REASON).expect.set_options(timeout=MS)

    def opened(address: str | None, **options: Any) -> Any:
        page = visit(height=800, reduced_motion="reduce", **options)
        page.on("pageerror", lambda error: failed.append(str(error)))
        if address:
            page.goto(address)
        return page

    yield opened
    assert not failed
