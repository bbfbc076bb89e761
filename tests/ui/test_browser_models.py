"""The page of a server whose models change, in Chromium: the choice of a model, and a training run. `make test-ui`."""

import httpx
import pytest

from tests.support.browser import press, tab
from tests.support.models import OWN, write_checkpoint
from tests.support.servers import running_server, until

pytestmark = pytest.mark.browser


def test_a_visitor_chooses_a_model(opened, own_dir, plain_dir):
    with running_server(*("--model", f"a={own_dir}", "--model", f"b={plain_dir}", "--ui", "--threads", "1")) as running:
        page, other = opened(running.url), opened(running.url)
        page.click("#model input")
        page.get_by_role("option", name="b").click()
        page.wait_for_selector("#picker", state="hidden")  # it has no classes
        for each, name in ((page, "b"), (other, "a")):
            press(each, "generate-go")
            each.wait_for_selector("#details dd")
            assert f">{name}<" in each.inner_html("#details dl")
        page.click("#code button >> nth=0")
        page.wait_for_selector("#code pre >> nth=0")
        assert "model=b" in page.text_content("#code")
        assert other.is_visible("#picker")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_run_is_followed(opened, tmp_path, width):
    write_checkpoint(OWN, tmp_path / "checkpoint.pt", 100)
    with running_server("--watch", str(tmp_path), "--ui", "--threads", "1") as running:
        ready = running.url + "/health/ready"
        until(lambda: httpx.get(ready).status_code == 200, 200)  # it exported and imported gradio
        until(lambda: (tmp_path / "watched-0000100.png").exists(), 60)
        page = opened(running.url, width=width)
        tab(page, "Training")
        page.wait_for_selector("#training figure")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        write_checkpoint(OWN, tmp_path / "checkpoint.pt", 1200)
        page.wait_for_selector("#training figure:nth-child(2)", timeout=200_000)  # by itself
        assert page.locator("#training figcaption").all_text_contents() == [
            "1,200",
            "100",
        ]  # the newest is on the right
        boxes = [page.locator("#training figure").nth(number).bounding_box() for number in (0, 1)]
        assert boxes[0]["x"] > boxes[1]["x"]  # the newest is on the right
        loaded = "[...document.querySelectorAll('#training img')].every(image => image.complete && image.naturalWidth)"
        page.wait_for_function(loaded)
