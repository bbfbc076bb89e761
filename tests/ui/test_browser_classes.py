"""The page in Chromium for a model with classes of its own, and for one without classes."""

import contextlib
import re
from urllib.parse import urljoin

import pytest

from dsd_serve.imaging.provenance import settings_of
from tests.support.browser import press, tab
from tests.support.models import NAMES
from tests.support.servers import running_server

pytestmark = pytest.mark.browser


@pytest.fixture
def opened_model(opened):
    """Opens the page of a server with a model: opened_model(directory, width)."""
    with contextlib.ExitStack() as stack:

        def opened_model(directory, width):
            return opened(stack.enter_context(running_server("--ui", "--model", str(directory))).url, width=width)

        yield opened_model


def saved(page):
    """The name and the settings of the selected image's file."""
    link = page.wait_for_selector("#details a[download]")
    answer = page.request.get(urljoin(page.url, link.get_attribute("href")))
    return link.get_attribute("download"), settings_of(answer.body())


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_names_own_classes(opened_model, own_dir, width):
    page = opened_model(own_dir, width)
    page.wait_for_selector("#picker .class")
    assert page.eval_on_selector_all("#picker .class .name", "all => all.map(one => one.textContent)") == list(NAMES)
    assert page.get_attribute("#class-search textarea, #class-search input", "placeholder").endswith("Grandma's cat")
    page.fill("#class-search textarea, #class-search input", "金")
    page.wait_for_function("document.querySelectorAll('#picker .class').length == 1")
    page.click("#picker .only")
    page.wait_for_selector("#chosen .chip:has-text('金毛犬')")
    press(page, "generate-go")
    name, settings = saved(page)
    assert re.fullmatch(r"金毛犬-\d+-0\.png", name)
    assert settings["class"] == {"index": 1, "name": "金毛犬"}
    page.fill("#class-search textarea, #class-search input", "dog")
    page.wait_for_selector('#picker .hint:has-text("such as Grandma\'s cat")')
    assert not re.search(r"imagenet|retriever|goldfish", page.content(), re.IGNORECASE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_model_without_classes_offers_none(opened_model, plain_dir, width):
    page = opened_model(plain_dir, width)
    page.wait_for_selector("#class-search", state="hidden")
    assert page.locator("#picker").is_hidden()
    press(page, "generate-go")
    name, settings = saved(page)
    assert re.fullmatch(r"image-\d+-0\.png", name)
    assert (settings["class"], settings["guidance"]) == (None, 1)
    page.click("#generate-sampling button")
    page.wait_for_selector("#generate-steps", state="visible")
    assert page.locator("#generate-guidance").is_hidden()
    page.click("#details [data-act=from]")
    page.wait_for_selector("#from-seed", state="visible")
    assert page.locator("#from-class").is_hidden()
    assert page.locator("#to-class").is_hidden()
    press(page, "walk-go")
    page.wait_for_selector("#walk-strip figure")
    tab(page, "Look inside")
    press(page, "way-go")
    page.wait_for_selector("#way figure:has-text('image')")
    assert page.locator("#way-class").is_hidden()
    tab(page, "Your photo")
    tab(page, "Edit")
    assert page.locator("#edit-class").is_hidden()
