"""The static page in a browser: drawing, links, photos, walks, keys, narrow screens and WCAG."""

import json
import re

import pytest
from PIL import Image

import dsd_serve
from dsd_serve.shell.redraw import compare
from tests.support.axe import violations
from tests.support.browser import REASON
from tests.support.firefox import firefox
from tests.support.web_page import QUICK, notice, wait_until_drawn

pytestmark = pytest.mark.browser
api = pytest.importorskip("playwright.sync_api", reason=REASON)


def images(page, selector="#draw-sheet"):
    """The pixels of the images at a place, as data: addresses."""
    page.get_by_label("Sharp pixels").check()
    return page.evaluate("where => [...document.querySelectorAll(`${where} canvas`)].map(c => c.toDataURL())", selector)


def test_it_draws_at_once_and_a_link_or_a_file_draws_the_same(opened, url, tmp_path):
    page = opened(url)
    wait_until_drawn(page)  # nothing was pressed
    assert page.inner_text("#draw-caption strong") == "School bus"
    assert re.search(r"(WebAssembly|WebGPU).*\d\sMB fetched.*s an image", page.inner_text("#engine"))
    first = images(page)
    assert len(set(first)) == 4
    page.fill("#draw input[name=n]", "2")
    page.fill("#draw input[name=seed]", "9007199254740993")  # beyond 2^53, where a float would lose a digit
    page.click("#draw summary")
    page.fill("#draw input[name=steps]", "3")
    page.get_by_role("radio", name="Espresso").check()
    page.keyboard.press("Enter")
    api.expect(page.locator("#draw-caption")).to_contain_text("9007199254740993")
    wait_until_drawn(page)
    drawn, link = images(page), page.url
    page.get_by_label("True size").check()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    download.value.save_as(tmp_path / "saved.png")
    with dsd_serve.load() as model:
        assert compare(model, (tmp_path / "saved.png").read_bytes()).difference <= 1
    assert "class=967&seed=9007199254740993&n=2&steps=3" in link
    other = opened(link)
    wait_until_drawn(other)
    assert images(other) == drawn
    assert other.input_value("#draw input[name=steps]") == "3"

    other.reload()
    wait_until_drawn(other)
    assert images(other) == drawn
    api.expect(other.locator("#history li")).to_have_count(2 + 2)  # those of before are kept

    page.go_back()
    api.expect(page).to_have_title(re.compile("School bus"))
    assert images(page) == first
    assert page.locator("#history li").count() == 4 + 2  # none was drawn again


def test_stop_keeps_what_is_drawn(opened, url):
    page = opened(url + QUICK.replace("n=2", "n=16").replace("steps=2", "steps=100"))
    page.wait_for_selector("#history li >> nth=0", state="attached")
    page.keyboard.press("Escape")
    page.wait_for_selector("#draw-form .stop", state="hidden")
    count = page.locator("#history li").count()
    assert 1 <= count < 16
    page.wait_for_timeout(500)
    assert page.locator("#history li").count() == count


def test_a_photo_is_compared_edited_and_walked_to(opened, url, tmp_path):
    photos = []
    for name, colour in (("a.png", (250, 140, 20)), ("b.jpg", (20, 60, 200))):
        photos.append(tmp_path / name)
        Image.new("RGB", (300, 200), colour).save(photos[-1])
    page = opened(url + QUICK)
    wait_until_drawn(page)
    page.get_by_role("tab", name="Photo").click()
    page.set_input_files("#photo input[type=file]", photos[0])
    page.wait_for_selector("#kept-actions button")
    assert "512 numbers" in page.inner_text("#kept-caption")

    page.get_by_role("button", name="Left half").click()
    page.click("#edit-class button")
    page.locator("dialog[open]").get_by_role("radio", name="Jellyfish").click()
    page.keyboard.press("Enter")
    api.expect(page.locator("#edit-class .name")).to_have_text("Jellyfish")
    page.click("#edit-form summary")
    page.fill("#edit-form input[name=steps]", "2")
    page.click("#edit-form button.primary")
    page.wait_for_selector("#edit-actions button")
    page.get_by_label("Sharp pixels").check()
    sides = page.evaluate("""() => {
        const context = document.querySelector("#edit-image canvas").getContext("2d");
        return [0, 16].map(x => [...context.getImageData(x, 0, 16, 32).data].filter((_, i) => i % 4 === 0));
    }""")
    assert set(sides[1]) == {250}  # the half that was not painted keeps its pixels
    assert set(sides[0]) != {250}

    page.get_by_role("tab", name="Walk").click()
    page.get_by_label("Photos").check()
    page.click("#walk-form button.primary")
    assert notice(page) == "Photo 1 is missing: choose, drop or take one."
    for number, photo in enumerate(photos):
        page.set_input_files(f"#walk-ends input[type=file] >> nth={number}", photo)
    page.wait_for_selector("#walk-ends dsd-image.thumb:not([data-empty]) >> nth=1")
    page.click("#walk-form button.primary")
    page.wait_for_selector("#walk-actions button")
    frames = images(page, "#walk-player .strip")
    assert len(set(frames)) == 12
    shown = page.get_attribute("#walk-player input", "aria-valuetext")
    page.wait_for_timeout(500)
    assert page.get_attribute("#walk-player input", "aria-valuetext") == shown  # less motion is wanted, so it stands
    page.get_by_role("button", name="Play").click()
    api.expect(page.locator("#walk-player input")).not_to_have_attribute("aria-valuetext", shown)


def test_it_is_used_by_keys_alone(opened, url):
    page = opened(url + QUICK)
    wait_until_drawn(page)
    press, focused = (
        page.keyboard.press,
        lambda: page.evaluate("document.activeElement.id || document.activeElement.value"),
    )
    press("Tab")
    assert focused() == "tab-draw"
    press("ArrowLeft")
    assert focused() == "tab-walk" and page.is_visible("#walk")
    press("Home")
    press("Tab")
    press("Tab")
    assert focused() == "145"  # the chosen class
    press("ArrowRight")
    press("Enter")
    api.expect(page.locator("#draw-caption")).to_contain_text("Golden Retriever")
    wait_until_drawn(page)
    press("Shift+Tab")
    press("Shift+Tab")
    press("ArrowRight")
    assert focused() == "tab-photo"
    page.locator("#photo-examples button").first.focus()
    press("Enter")
    page.wait_for_selector("#kept-actions button")
    page.get_by_label(re.compile("Border between")).focus()
    press("ArrowLeft")
    assert page.evaluate("document.activeElement.ariaValueText") == "49 % from the left"
    page.get_by_role("application", name="Area to redraw").focus()
    press("Space")
    brush = page.locator("#brush [role=status]")
    api.expect(brush).to_have_text(re.compile(r"\d+ % of the image will be redrawn"))
    press("Delete")
    api.expect(brush).to_have_text("")


def test_a_thousand_classes_are_a_list_to_search(opened, url):
    page = opened(None)
    names = [f"thing number {i}" for i in range(998)] + ["crème brûlée", "corkscrew"]
    classes = [{"index": i, "name": name} for i, name in enumerate(names)]

    def more(route):
        values = route.fetch().json()
        route.fulfill(body=json.dumps({**values, "classes": classes, "classImages": None}))

    page.route("**/network.json", more)
    page.goto(f"{url}#draw?class=5&seed=7&n=1&steps=1&guidance=1")
    wait_until_drawn(page)
    search = page.get_by_role("searchbox")
    search.fill("BRULEE")
    api.expect(page.locator("#draw-class .class:visible")).to_have_text(["Crème brûlée"])
    search.fill("screw")
    press = page.keyboard.press
    press("Enter")
    api.expect(page.locator("#draw-caption")).to_contain_text("Corkscrew")
    search.fill("platypus")
    api.expect(page.locator("#draw-class [role=status]")).to_contain_text("No class")
    assert page.locator("#draw-class canvas[width='128']").count() == 0  # no image was made for the list


VIEWS = ("draw", "photo", "walk", "choose", "lightbox")


def show(page, view):
    page.keyboard.press("Escape")
    if view in ("draw", "photo", "walk"):
        page.get_by_role("tab", name=view.title()).click()
    if view == "photo" and page.is_hidden("#kept"):
        page.click("#photo-examples button >> nth=0")
        page.wait_for_selector("#kept-actions button")
    if view == "choose":
        page.get_by_role("tab", name="Walk").click()
        page.click("#walk-ends .opener >> nth=0")
    if view == "lightbox":
        page.click("#history li button >> nth=0")


SMALL = """() => [...document.querySelectorAll("button, select, summary, input:not(.hidden)")].filter(one => {
    const {width, height} = one.getBoundingClientRect();
    return width && Math.min(width, height) < 24 && !one.closest("label");
}).map(one => one.outerHTML)"""


def test_every_view_keeps_wcag_and_fits_every_width(opened, url):
    page = opened(url + QUICK)
    wait_until_drawn(page)
    for details in page.locator("summary").all():
        details.evaluate("summary => summary.click()")
    found = {}
    for view in VIEWS:
        show(page, view)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            found[view, scheme] = violations(page, "region")  # everything is in a landmark
        for width in (320, 390, 640, 768, 1280):  # 640 is 1280 at 200 %
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (view, width)
            assert page.evaluate(SMALL) == [], (view, width)
    assert len(found) == 10
    assert not [line for lines in found.values() for line in lines]


def test_it_draws_in_firefox(url, tmp_path):
    with firefox(tmp_path / "profile") as page:
        page.goto(url + QUICK)
        caption = page.evaluate("""async () => {
            for (let i = 0; i < 900 && !document.querySelector("#draw-actions button"); i++)
                await new Promise(resolve => setTimeout(resolve, 100));
            return document.querySelector("#draw-caption").innerText + document.querySelector("#notices").innerText;
        }""")
        assert caption.startswith("King penguin")
        assert page.evaluate("() => document.querySelector('#draw-sheet canvas').width") == 256
