"""Chromium for tests, with nothing from other machines, and the page of a server as a visitor uses it."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

REASON = "the browser tests need playwright: pip install '.[dev]'"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MS = 120_000  # for which a page is waited for: tests run on busy machines too

READY = "() => document.querySelector('#told [data-classes]') && window.dsd.ready()"
REMEMBERED = "([name, value]) => JSON.parse(sessionStorage['dsd-page'] ?? '{}').values?.[name] === value"
JOIN = "/gradio_api/queue/join"
COMPONENT = "name => window.gradio_config.components.find(one => one.props.elem_id === name).id"


@contextlib.contextmanager
def chromium(flags: list[str] = FLAGS) -> Iterator[Any]:
    """Chromium, or a skipped test without it."""
    api = pytest.importorskip("playwright.sync_api", reason=REASON)
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("the browser tests need chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@contextlib.contextmanager
def visiting(browser: Any, event: str = "request") -> Iterator[Callable[..., Any]]:
    """Opens pages, each as a new visitor: visit(url, width, height). An empty url leaves the page blank; other settings
    are those of Playwright's contexts. All that the pages load must come from this machine.

    event: that counts as loading, "response" for pages whose policy blocks a part of their requests.
    """
    contexts, loaded = [], set()

    def visit(url: str = "", width: int = 1280, height: int = 900, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MS)
        page.on(event, lambda loading: loaded.add(loading.url))
        if url:
            page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert {urlsplit(url).hostname for url in loaded if not url.startswith(("data:", "blob:"))} <= {"127.0.0.1"}


def wait_until_ready(page: Any) -> None:
    """Wait until the page has set its controls."""
    page.wait_for_function(READY)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def fill(page: Any, where: str, value: int) -> None:
    """Type a number that is not there yet into a control, such as "n" or "edit-steps", until the page has it.

    A control that Gradio has just made may still lose what is typed.
    """
    place, _, name = where.rpartition("-")
    remembered = [f"{place or 'generate'}.{'num_steps' if name == 'steps' and place != 'way' else name}", value]
    field = page.locator(f"#{where} input").first

    def kept() -> bool:
        return bool(page.evaluate(REMEMBERED, remembered))

    repeated(
        page,
        lambda: (field.fill(str(value)), field.press("Tab")),
        lambda: kept() and (page.wait_for_timeout(200) or kept()),
    )


def set_steps(page: Any, value: int, place: str = "generate") -> None:
    """Set the steps of a tab, among its sampling settings."""
    if not page.is_visible(f"#{place}-steps"):
        page.click(f"#{place}-sampling button >> nth=0")
    fill(page, f"{place}-steps", value)


def press(page: Any, button: str) -> None:
    """Press a button that starts work, until it does: Gradio ignores it while the last work has not quite ended."""
    trigger = page.evaluate(COMPONENT, button)
    sent = []

    def heard(request: Any) -> None:
        if JOIN in request.url and request.post_data_json["trigger_id"] == trigger:
            sent.append(request.url)

    page.on("request", heard)
    repeated(page, lambda: page.click(f"#{button}", force=True), lambda: sent)  # a busy page does not stand still
    page.remove_listener("request", heard)


def repeated(page: Any, act: Callable[[], object], done: Callable[[], object], seconds: float = 3) -> None:
    """Act, again every few seconds, until it is done."""
    end = time.monotonic() + MS / 1000
    while True:
        act()
        again = time.monotonic() + seconds
        while time.monotonic() < again:
            if done():
                return
            page.wait_for_timeout(50)
        assert time.monotonic() < end, "the page does not react"


def sources(page: Any, board: str = "board") -> list[str]:
    """The addresses of the images on a board."""
    return page.eval_on_selector_all(f"#{board} .card img", "all => all.map(one => one.getAttribute('src'))")


def finished(page: Any, n: int, before: list[str] | tuple[str, ...] = ()) -> list[str]:
    """The addresses of n images once they are drawn. before: of the images that they replace."""
    page.wait_for_function(
        "([n, before]) => { const all = [...document.querySelectorAll('#board button.card img')]"
        ".map(one => one.getAttribute('src')); return all.length === n && String(all) !== before; }",
        arg=[n, ",".join(before)],
    )
    page.wait_for_selector("#details .details")
    return sources(page)


def draw(page: Any, n: int = 2) -> list[str]:
    """Press Generate for n images; returns their addresses."""
    if page.input_value("#n input[type=number]") != str(n):
        fill(page, "n", n)
    before = sources(page)
    press(page, "generate-go")
    return finished(page, n, before)
