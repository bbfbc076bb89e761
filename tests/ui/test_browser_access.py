"""Access to the page, in Chromium: axe-core on every tab, keyboard, touch, small windows, less motion, forced colours,
and sentences where the browser refuses camera and clipboard. `make test-ui`."""

import json

import pytest

from dsd_serve.imaging.codec import read_image, write_image
from dsd_serve.imaging.provenance import settings_of
from tests.support.axe import violations
from tests.support.browser import fill, press, tab

pytestmark = pytest.mark.browser

FOCUSED = "document.activeElement"
STILL = "!document.getAnimations().some((one) => one instanceof CSSTransition && one.playState === 'running')"


def chosen(page):
    return page.locator("#chosen .chip .name").all_text_contents()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_tab(opened, photo, scheme):
    page = opened(color_scheme=scheme)

    def check(where):
        page.wait_for_function(STILL)
        assert violations(page) == [], where

    check("Generate, before anything is drawn")
    page.click("#picker .class:nth-child(2) .more")
    page.wait_for_selector("#chosen .chip:nth-child(2)")
    press(page, "generate-go")
    page.wait_for_selector("#details .details")
    for accordion in ("generate-sampling", "again", "code"):
        page.click(f"#{accordion} button >> nth=0")
    page.wait_for_selector("#history .old")
    check("Generate")
    tab(page, "Your photo")
    check("Your photo, without one")
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#compare .compare")
    check("Reconstruct")
    tab(page, "Edit")
    press(page, "edit-go")
    page.wait_for_selector("#edit-details .details")
    check("Edit")
    tab(page, "Inpaint")
    page.wait_for_selector("#painting canvas")
    check("Inpaint")
    tab(page, "Walk")
    press(page, "walk-go")
    page.wait_for_selector("#walk-animation img")
    check("Walk")
    tab(page, "Photos")
    check("Photos")
    tab(page, "Look inside")
    page.set_input_files("#inside-photo input[type=file]", photo)
    page.wait_for_selector("#latents [data-rank]")
    press(page, "way-go")
    page.wait_for_selector("#way figure:has-text('image')")
    check("Look inside")


def test_the_keyboard_alone_chooses_draws_and_compares(opened, photo):
    page = opened()
    page.focus("#class-search textarea")
    page.keyboard.type("dog")
    page.wait_for_function("document.querySelectorAll('#picker .class').length === 1")
    page.keyboard.press("Enter")  # the first match
    page.wait_for_selector("#chosen .chip:has-text('golden retriever')")
    page.wait_for_function("document.querySelectorAll('#picker .class').length === 10")
    page.keyboard.press("Tab")  # to the grid, which is one stop
    assert page.evaluate(f"{FOCUSED}.matches('#picker .only[aria-pressed=true]')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(f"{FOCUSED}.textContent") == "alp"
    page.keyboard.press("+")
    page.wait_for_selector("#chosen .chip:nth-child(2)")
    assert chosen(page) == ["Golden Retriever", "alp"]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chosen .chip:nth-child(2)", state="detached")
    assert chosen(page) == ["goldfish"]
    fill(page, "n", 1)
    page.focus("#generate-seed input")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details .details")
    page.focus("#details [data-act=edit]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#edit-go", state="visible")  # the tab Edit itself
    page.wait_for_function(f"{FOCUSED}.textContent.trim() === 'Your photo'")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#walk-go", state="visible")
    assert page.evaluate(f"{FOCUSED}.textContent.trim()") == "Walk"
    page.keyboard.press("ArrowLeft")
    tab(page, "Reconstruct")
    page.focus("#compare input")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#compare .stage').style.getPropertyValue('--at')") == "60%"
    page.click("#compare [data-fullscreen]")
    page.wait_for_function("document.fullscreenElement?.getBoundingClientRect().width === innerWidth")
    page.keyboard.press("Escape")


def test_a_press_switches_a_plus_adds_and_a_chip_removes(opened):
    page = opened()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.click("#picker .only[data-value='1']")
    page.wait_for_selector("#chosen .chip:has-text('goldfish')")
    assert chosen(page) == ["goldfish"]
    page.click("#picker .only[data-value='950']", modifiers=["Control"])
    page.wait_for_selector("#chosen .chip:nth-child(2)")
    page.hover("#picker .only[data-value='967']")
    page.click("#picker .only[data-value='967'] + .more")
    page.wait_for_selector("#chosen .chip:nth-child(3)")
    page.wait_for_function("document.querySelectorAll('#picker [aria-pressed=true]').length === 3")
    page.click("#chosen [aria-label='Remove orange']")
    page.wait_for_selector("#chosen .chip:nth-child(3)", state="detached")
    assert chosen(page) == ["goldfish", "espresso"]
    for text, count in (("fish", 2), ("coffee", 1), ("mountain", 1), ("tterfl", 1), ("%", 0), ("كلب", 0)):
        page.fill("#class-search textarea", text)
        page.wait_for_function(f"document.querySelectorAll('#picker .class').length === {count}")
    page.wait_for_selector("#picker .hint")
    assert not [url for url in asked if "/studio/class/" in url]  # no image of a class is drawn for the grid


def test_the_first_sight_is_a_wall_that_draws(opened):
    page = opened(height=720)
    assert page.locator("#wall .tile").count() == 40
    loaded = "performance.getEntriesByType('resource').filter((one) => one.name.includes('/studio/classes.webp?'))"
    assert page.evaluate(f"{loaded}.map((one) => one.responseStatus)") == [200]
    assert "3.2 million parameters at 32 x 32 pixels" in page.inner_text("#wall p")
    go = page.locator("#generate-go").bounding_box()
    assert go["y"] + go["height"] <= 720
    page.click("#wall [data-value='970'] >> nth=0")
    page.wait_for_selector("#details h2:has-text('alp')")
    assert page.locator("#wall .wall").is_hidden()


SIZES = [(320, 640), (640, 400), (768, 1024), (844, 390)]  # the second: 1280 x 800 at 200 % zoom


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_nothing_is_cut_off_in_a_small_window(opened, width, height):
    page = opened(width=width, height=height, has_touch=True, is_mobile=width < 900)
    for name in ("Look inside", "Walk", "Your photo", "Generate"):
        tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") == width
    fill(page, "n", 1)
    seed = page.locator("#generate-seed input").bounding_box()
    assert seed["width"] > 100
    page.tap("#generate-go")
    page.wait_for_selector("#details .details")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if height < 500:  # a telephone on its side
        page.wait_for_function("document.querySelector('#board .card').getBoundingClientRect().top < innerHeight / 2")


def test_a_swipe_over_a_slider_leaves_it(opened):
    page = opened(width=390, height=844, has_touch=True, is_mobile=True)
    track = page.locator("#n input[type=range]").bounding_box()
    page.touchscreen.tap(track["x"] + 0.8 * track["width"], track["y"] + track["height"] / 2)
    page.wait_for_timeout(300)
    assert page.input_value("#n input[type=range]") == "4"


def test_less_motion_and_forced_colours(opened):
    page = opened(reduced_motion="reduce", forced_colors="active")
    outline = "getComputedStyle(document.querySelector('#picker .only[aria-pressed=true]')).outlineStyle"
    assert page.evaluate(outline) == "solid"
    assert page.evaluate("getComputedStyle(document.querySelector('#n input[type=range]')).appearance") == "auto"
    for control in ("#generate-go", "#generate-dice", "#generate-seed input"):
        assert page.evaluate("one => getComputedStyle(document.querySelector(one)).borderTopWidth", control) == "1px"
    tab(page, "Walk")
    fill(page, "walk-n", 3)
    press(page, "walk-go")
    page.wait_for_selector("#walk-animation canvas")
    assert page.locator("#walk-animation img").is_hidden()
    page.click("#walk-animation [data-pause]")  # Play
    page.wait_for_selector("#walk-animation img", state="visible")
    assert page.locator("#walk-animation canvas").count() == 0


def test_camera_clipboard_and_pasting(opened, photo):
    page = opened()
    tab(page, "Your photo")
    page.evaluate("""() => navigator.mediaDevices.getUserMedia({video: true}).catch(() => 0)""")
    page.wait_for_selector("#refused:has-text('upload a photo')")
    page.evaluate("navigator.clipboard.read().catch(() => 0)")
    page.wait_for_selector("#refused:has-text('clipboard')")
    tab(page, "Generate")
    paste = """(bytes) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], 'pasted.png', {type: 'image/png'}));
      document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(paste, [*photo.read_bytes()])
    page.wait_for_selector("#compare .compare")  # on Your photo


def test_an_image_of_an_unknown_class_leaves_the_chosen_one(opened, tmp_path):
    page = opened()
    fill(page, "n", 1)
    press(page, "generate-go")
    page.wait_for_selector("#details .details")
    data = page.request.get(page.evaluate("document.querySelector('#details a[download]').href")).body()
    settings = {**settings_of(data), "class": {"index": 999, "name": "toilet paper"}}
    saved = tmp_path / "saved.png"
    saved.write_bytes(write_image(read_image(data), settings=json.dumps(settings)))
    page.click("#again button >> nth=0")
    page.set_input_files("#saved input[type=file]", saved)
    page.wait_for_selector("#generate-message:has-text('of class 999, which this model does not have')")
    assert chosen(page) == ["school bus"]
