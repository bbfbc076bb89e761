"""The page of a server whose models change, in Chromium: the choice of a model, and a training run. `make test-ui`."""

import httpx
import pytest

from tests.support.models import OWN, write_checkpoint
from tests.support.servers import Server, until

pytestmark = pytest.mark.browser


@pytest.fixture
def opened(browser):
    pages = []

    def opened(url, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.goto(url)
        return page

    yield opened
    for page in pages:
        page.close()


def test_a_visitor_chooses_a_model(opened, own_dir, plain_dir, tmp_path):
    running = Server(
        *("--model", f"a={own_dir}", "--model", f"b={plain_dir}", "--ui", "--threads", "1"), folder=tmp_path
    )
    page, other = opened(running.url), opened(running.url)
    for each in (page, other):
        each.wait_for_selector("#picker .class")
    page.click("#model input")
    page.get_by_role("option", name="b").click()
    page.wait_for_selector("#picker", state="hidden")  # it has no classes
    for each, name in ((page, "b"), (other, "a")):
        each.click("#generate-go")
        each.wait_for_selector("#details dd")
        assert f">{name}<" in each.inner_html("#details dl")
    page.click("#code button >> nth=0")
    page.wait_for_selector("#code pre >> nth=0")
    assert "model=b" in page.text_content("#code")
    assert other.is_visible("#picker")
    for each in (page, other):
        each.close()
    assert running.stop() == 0
    assert "Traceback" not in running.log


@pytest.mark.parametrize("width", [1280, 390])
def test_a_run_is_followed(opened, tmp_path, width):
    run = tmp_path / "run"
    run.mkdir()
    write_checkpoint(OWN, run / "checkpoint.pt", 100)
    running = Server("--watch", str(run), "--ui", "--threads", "1", folder=tmp_path)
    until(lambda: httpx.get(running.url + "/health/ready").status_code == 200, 200)  # it exported and imported gradio
    until(lambda: (run / "watched-0000100.png").exists())
    page = opened(running.url, width)
    page.wait_for_selector("#picker .class")
    page.get_by_role("tab", name="Training", exact=True).click()
    page.wait_for_selector("#training figure")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    write_checkpoint(OWN, run / "checkpoint.pt", 1200)
    page.wait_for_selector("#training figure:nth-child(2)", timeout=200_000)  # by itself
    assert page.locator("#training figcaption").all_text_contents() == ["1,200", "100"]  # the newest is on the right
    boxes = [page.locator("#training figure").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["x"] > boxes[1]["x"]
    loaded = "[...document.querySelectorAll('#training img')].every(image => image.complete && image.naturalWidth)"
    page.wait_for_function(loaded)
    page.close()
    assert running.stop() == 0
    assert "Traceback" not in running.log
