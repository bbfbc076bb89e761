"""What the page remembers, in Chromium: a reload, Back, a link, a lost connection and a new server lose nothing."""

import io
import json
import shlex
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from dsd_serve.imaging.codec import write_image
from tests.support.browser import draw, fill, finished, press, repeated, set_steps, sources, tab, wait_until_ready
from tests.support.data import ROOT, sample_image
from tests.support.servers import Server, kept_busy, running_server, until

pytestmark = pytest.mark.browser


def reload(page):
    page.reload()
    wait_until_ready(page)


def settings(page):
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def wait_for_tab(page, name):
    page.wait_for_selector(f"#tabs [role=tab][aria-selected=true]:has-text('{name}')")


def test_a_reload_back_and_a_link_show_the_same_images(opened):
    page = opened()
    first = draw(page)
    page.wait_for_url("**seed=**")
    assert settings(page)["class"] == "779"
    assert settings(page)["seed"] == page.input_value("#generate-seed input")
    set_steps(page, 5)
    reload(page)
    assert finished(page, 2) == first
    assert page.inner_text("#board [role=status]").startswith("Drawn earlier")
    assert page.evaluate("JSON.parse(sessionStorage['dsd-page']).values['generate.num_steps']") == 5  # not yet drawn
    second = draw(page)
    page.wait_for_url("**steps=5**")
    assert second != first
    page.go_back()
    assert finished(page, 2, second) == first
    page.go_forward()
    assert finished(page, 2, first) == second

    tab(page, "Walk")
    page.wait_for_url("**tab=walk**")
    reload(page)
    wait_for_tab(page, "Walk")
    page.go_back()
    wait_for_tab(page, "Generate")

    page.click("#board button.card >> nth=1")
    link = page.wait_for_selector("#details [data-copy-link*='index=1']").get_attribute("data-copy-link")
    other = opened(page.evaluate("link => window.dsd.address(link)", link))  # another visitor
    assert finished(other, 1) == [second[1]]
    assert other.get_attribute("#details a[download]", "href") == second[1]


def test_a_tab_that_is_chosen_while_the_page_opens_stays(opened):
    page = opened()
    page.reload()
    tab(page, "Walk")
    page.wait_for_function("window.dsd.ready()")
    page.wait_for_url("**?tab=walk")
    assert page.get_by_role("tab", name="Walk", exact=True).get_attribute("aria-selected") == "true"


def test_a_wrong_link_says_what_is_wrong(opened, running):
    for query, sentence in (
        ("seed=x", "seed in the link must be a number"),
        ("class=999", "has no class 999"),
        ("seed=1&n=17", "n must be at most 16, got 17"),
    ):
        page = opened(f"{running.url}?{query}")
        page.wait_for_selector(f"#generate-message .callout:has-text('{sentence}')")


@pytest.mark.parametrize("query", ["class=1&seed=7", "class=1&seed=7&tab=foo", "tab=training"])
def test_back_leaves_the_page_that_a_link_opened(visit, running, query):
    page = visit(f"{running.url}/studio/icon.svg")
    page.goto(f"{running.url}?{query}")
    wait_until_ready(page)
    if "seed" in query:
        page.wait_for_url("**&steps=2**")  # the whole link
    page.wait_for_timeout(500)
    page.go_back()
    page.wait_for_url("**/icon.svg")


FORBIDDEN = """for (const kind of %s)
  Object.defineProperty(window, kind, {get() { throw new DOMException("denied", "SecurityError"); }});"""


@pytest.mark.parametrize(
    "kinds", [["sessionStorage"], ["localStorage"], ["sessionStorage", "localStorage", "indexedDB"]]
)
def test_without_storage_the_page_works(visit, running, photo, kinds):
    page = visit()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.add_init_script(FORBIDDEN % kinds)
    page.goto(running.url)
    wait_until_ready(page)
    page.wait_for_selector("#pill[data-up=true]")
    dark = page.evaluate("document.body.classList.contains('dark')")
    page.click("#shade")
    assert page.evaluate("document.body.classList.contains('dark')") is not dark
    press(page, "generate-go")
    finished(page, 4)
    page.wait_for_url("**seed=**")
    page.click("#details .enlarge")
    page.wait_for_selector("#lightbox[open]")
    page.click("#light-close")
    tab(page, "Your photo")
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#kept [data-psnr]")
    assert not errors


@pytest.mark.parametrize("damage", ["{}", "[null, 5]", '"x"', '[{"id": "%s"}]' % ("0" * 32), "{bad"])
def test_a_damaged_history_is_replaced(visit, running, damage):
    page = visit()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.add_init_script(f"localStorage['dsd-history'] ??= {json.dumps(damage)}")
    page.goto(running.url)
    wait_until_ready(page)
    draw(page, 1)
    page.wait_for_selector("#history .old")
    assert not errors


def test_a_short_loss_of_the_network_changes_nothing(opened):
    page = opened()
    shown = draw(page)
    set_steps(page, 7)
    page.context.set_offline(True)
    page.wait_for_selector("#pill[data-up=false]")
    page.context.set_offline(False)
    page.wait_for_selector("#pill[data-up=true]")
    page.wait_for_timeout(1500)
    assert page.input_value("#generate-steps input[type=number]") == "7"
    assert sources(page) == shown


@pytest.fixture
def servers(free_port):
    """Servers of one address, of which the last is running. They run one row at a time, so that work takes seconds."""
    port, servers = str(free_port()), []

    def start():
        servers.append(Server("--ui", "--port", port, "--row-budget", "1"))
        return servers[-1].url

    def kill():
        servers[-1].process.kill()
        servers[-1].process.wait()

    yield SimpleNamespace(start=start, kill=kill)
    for server in servers:
        server.process.kill()


PHOTO_IS_KEPT = """async () => (await indexedDB.databases()).length && new Promise((done) => {
  const opening = indexedDB.open("dsd-photos");
  opening.onsuccess = () => {
    const counting = opening.result.transaction("photos").objectStore("photos").count();
    counting.onsuccess = () => { opening.result.close(); done(counting.result); };
  };
})"""


def test_a_page_that_is_not_at_work_is_as_before_with_the_next_server(opened, servers, photo):
    page = opened(servers.start())
    before = draw(page)
    tab(page, "Your photo")
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#kept [data-psnr]")
    tab(page, "Edit")
    fill(page, "edit-n", 1)
    repeated(page, lambda: None, lambda: page.evaluate(PHOTO_IS_KEPT))
    page.evaluate("window.before = true")
    servers.kill()
    servers.start()
    page.wait_for_function("!window.before && window.dsd?.ready()")  # loaded again by itself
    page.wait_for_selector("#kept [data-psnr]")  # the photo was sent again
    assert sources(page) == before
    tab(page, "Edit")
    press(page, "edit-go")
    page.wait_for_selector("#edit-details .details")


def test_work_under_way_in_a_killed_server_is_done_by_the_next_one(opened, servers):
    page = opened(servers.start())
    before = draw(page)
    set_steps(page, 250)
    fill(page, "n", 16)
    press(page, "generate-go")
    page.wait_for_selector("#board .drawing img")
    page.wait_for_url("**steps=250**")
    seed = settings(page)["seed"]
    page.evaluate("window.before = true")
    servers.kill()
    page.wait_for_selector("#down:has-text('does not respond')")
    page.wait_for_selector("#board .progress", state="detached")
    page.focus("#generate-stop")
    assert page.evaluate("document.activeElement.id") != "generate-stop"  # there is nobody to stop anything
    servers.start()
    page.wait_for_function("!window.before && document.querySelector('#board .drawing img')")  # loaded again by itself
    assert settings(page)["seed"] == seed
    page.keyboard.press("Escape")
    page.wait_for_selector("#board :text('Stopped')")
    page.go_back()
    assert finished(page, 2) == before  # the new server has drawn the same bytes


def test_errors_stand_above_the_images(opened):
    page = opened()
    shown = draw(page)
    page.fill("#generate-seed input", "-5")
    page.check("#generate-lock input")
    press(page, "generate-go")
    page.wait_for_selector("#generate-message .callout:has-text('Seed must be a whole number from 0 to')")
    assert sources(page) == shown
    page.fill("#generate-seed input", "9007199254740992")
    press(page, "generate-go")
    page.wait_for_selector("#generate-message .callout:has-text('got 9007199254740992')")


def test_a_full_queue_is_waited_for(opened):
    with running_server("--ui", "--max-waiting", "8", "--row-budget", "1") as busy:
        page = opened(busy.url)
        page.set_default_timeout(300_000)  # the page waits as long as the queue was estimated to take
        shown = draw(page, 1)
        fill(page, "n", 5)
        with kept_busy(busy.url):
            press(page, "generate-go")
            page.wait_for_selector("#generate-message :text('trying again in')")
            assert sources(page) == shown
        finished(page, 5, shown)
        assert not page.inner_text("#generate-message")


def test_a_photo_waits_for_a_full_queue_too(opened, photo):
    with running_server("--ui", "--max-waiting", "8", "--row-budget", "1") as busy:
        page = opened(busy.url)
        page.set_default_timeout(300_000)
        with kept_busy(busy.url), kept_busy(busy.url, 1):
            until(lambda: len(httpx.get(f"{busy.url}/debug/batcher").json()["waiting"]) == 8)
            tab(page, "Your photo")
            page.set_input_files("#photo input[type=file]", photo)
            page.wait_for_selector("#kept :text('trying again in')")
        page.wait_for_selector("#kept [data-psnr]")


def test_images_are_sent_once(opened):
    page = opened()
    requested, received = [], [0]
    page.on("request", lambda request: requested.append(request.url) if "/studio/image/" in request.url else None)
    watching = page.context.new_cdp_session(page)
    watching.send("Network.enable")
    watching.on("Network.dataReceived", lambda event: received.__setitem__(0, received[0] + event["dataLength"]))
    shown = draw(page, 16)
    page.wait_for_function("[...document.querySelectorAll('#board img')].every(one => one.complete)")
    assert len(requested) == len(set(requested)) <= 17
    files = sum(len(httpx.get(f"{page.url.partition('?')[0]}{one}").content) for one in shown)
    assert received[0] < files + 2_500_000  # previews and all updates
    before = received[0]
    page.click("#board button.card >> nth=3")
    page.wait_for_selector(f"#details img[src='{shown[3]}']")
    assert received[0] - before < 100_000


def snippet(page, place, number):
    return page.text_content(f"#{place} pre >> nth={number}")


def execute(code, folder):
    """Run curl or Python code in a folder of its own; returns what it wrote there."""
    known = set(folder.iterdir())
    command = shlex.split(code) if code.startswith("curl") else [sys.executable, "-c", code]
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    )
    (written,) = set(folder.iterdir()) - known
    data = written.read_bytes()
    written.unlink()
    return written.name, data


def saved(page, link):
    """The name and the bytes of the file that a link saves."""
    with page.expect_download() as download:
        page.click(link)
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_code_gives_the_very_bytes_that_the_page_saves(opened, photo, tmp_path):
    page = opened()
    draw(page, 3)
    page.click("#board button.card >> nth=2")
    page.wait_for_selector("#details dd:has-text('index 2')")
    page.click("#code button >> nth=0")
    expected = saved(page, "#details a[download]")
    assert [execute(snippet(page, "code", number), tmp_path) for number in (0, 1)] == [expected] * 2

    photo = photo.rename(tmp_path / "my photo.png")
    tab(page, "Your photo")
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#kept [data-psnr]")
    tab(page, "Edit")
    fill(page, "edit-n", 2)
    press(page, "edit-go")
    page.wait_for_selector("#edit-details .details")
    page.click("#edit-board button.card >> nth=1")
    page.wait_for_selector("#edit-details dd:has-text('index 1')")
    page.click("#edit-code button >> nth=0")
    expected = saved(page, "#edit-details a[download]")
    assert "-edit-" in expected[0]
    assert [execute(snippet(page, "edit-code", number), tmp_path) for number in (0, 1)] == [expected] * 2

    # That file alone is not enough to draw it again, which is said where it is dropped.
    (tmp_path / "edit.png").write_bytes(expected[1])
    tab(page, "Generate")
    shown = sources(page)
    page.click("#again button >> nth=0")
    page.set_input_files("#saved input[type=file]", tmp_path / "edit.png")
    page.wait_for_selector("#generate-message .callout:has-text('an edit of a photo')")
    assert sources(page) == shown

    tab(page, "Walk")
    fill(page, "walk-n", 3)
    press(page, "walk-go")
    page.wait_for_selector("#walk-animation img")
    page.click("#walk-code button >> nth=0")
    expected = saved(page, "#walk-animation a[download]")
    assert execute(snippet(page, "walk-code", 1), tmp_path) == expected
    assert execute(snippet(page, "walk-code", 0), tmp_path)[0] == "walk.zip"

    # The photo, its edits and the walk are there after a reload.
    edits = sources(page, "edit-board")
    reload(page)
    page.wait_for_selector("#walk-strip figure >> nth=2")
    assert page.locator("#walk-animation img").count() == 1
    tab(page, "Your photo")
    tab(page, "Edit")
    page.wait_for_selector("#edit-board button.card >> nth=1")
    assert sources(page, "edit-board") == edits
    page.wait_for_selector("#photo img")


def test_code_of_an_inpainting_and_a_walk_between_photos_gives_the_very_bytes(opened, running, tmp_path):
    page = opened(width=420)  # a small editor: it paints with WebGL, which is slow without a GPU
    photos = [tmp_path / name for name in ("my photo.png", "photo (1).png")]
    for number, photo in enumerate(photos):
        photo.write_bytes(write_image(sample_image(207, number, size=200)))
    page.get_by_role("tab", name="Your photo", exact=True).click()
    page.set_input_files("#photo input[type=file]", photos[0])
    page.wait_for_selector("#kept [data-psnr]")
    page.get_by_role("tab", name="Inpaint", exact=True).click()
    canvas = page.locator("#painting canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)  # the editor sends its layer a moment after the stroke
    fill(page, "inpaint-n", 2)
    page.click("#inpaint-go")
    page.wait_for_selector("#inpaint-details .details")
    page.click("#inpaint-board button.card >> nth=1")
    page.wait_for_selector("#inpaint-details dd:has-text('index 1')")
    page.click("#inpaint-code button >> nth=0")
    for name in ("square.png", "mask.png"):
        written, data = saved(page, f"#inpaint-code a[download='{name}']")
        (tmp_path / written).write_bytes(data)
    expected = saved(page, "#inpaint-details a[download]")
    assert [execute(snippet(page, "inpaint-code", number), tmp_path) for number in (0, 1)] == [expected] * 2

    page.get_by_role("tab", name="Walk", exact=True).click()
    page.get_by_role("tab", name="Photos", exact=True).click()
    for end, photo in zip(("from", "to"), photos, strict=True):
        page.set_input_files(f"#{end}-photo input[type=file]", photo)
        page.wait_for_selector(f"#{end}-photo img")
    fill(page, "walk-n", 3)
    page.click("#walk-go")
    page.wait_for_selector("#walk-animation img")
    page.click("#walk-code button >> nth=0")
    assert execute(snippet(page, "walk-code", 1), tmp_path) == saved(page, "#walk-animation a[download]")
    with zipfile.ZipFile(io.BytesIO(execute(snippet(page, "walk-code", 0), tmp_path)[1])) as archive:
        images = [archive.read(name) for name in archive.namelist()]
    strip = page.eval_on_selector_all("#walk-strip img", "all => all.map(one => one.src)")
    assert images == [httpx.get(address).content for address in strip]


def test_history_stars_large_view_comparison_and_all_in_one_file(opened):
    page = opened()
    draw(page, 3)
    page.wait_for_selector("#history .old >> nth=2")
    page.click("#details .enlarge")
    page.wait_for_selector("#lightbox[open] :text('1 of 3')")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#lightbox :text('2 of 3')")
    page.click("#light-star")
    page.click("#light-compare")
    page.keyboard.press("ArrowRight")
    assert page.locator("#lightbox figure").count() == 2
    page.keyboard.press("Escape")
    page.wait_for_selector("#lightbox", state="hidden")
    with page.expect_download() as download:
        page.click("[data-all=board]")
    names = subprocess.run(["unzip", "-Z1", download.value.path()], capture_output=True, text=True, check=True).stdout
    assert len(names.split()) == 3
    starred = page.wait_for_selector("#history .old.star").get_attribute("data-image")
    draw(page, 1)
    reload(page)
    page.wait_for_selector("#history .old >> nth=3")
    page.click("#history #only-stars")
    page.wait_for_function("document.querySelectorAll('#history .old').length === 1")
    page.click("#history .old.star")
    page.wait_for_selector(f"#details .details[data-image='{starred}']")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_head_is_our_own_in_any_language(opened, running):
    page = opened(f"{running.url}?class=207&seed=7&steps=4", locale="ar")
    assert page.get_attribute("html", "lang") == "en"
    image = page.get_attribute("meta[property='og:image']", "content")
    assert image.startswith(f"{running.url}/studio/image/link.png?class=207&seed=7")
    assert httpx.get(image).content == httpx.get(f"{running.url}/{finished(page, 1)[0]}").content
    assert "Gradio" not in page.inner_html("head meta[property='og:title']") + page.content().split("<script")[0]
    assert httpx.get(f"{running.url}/favicon.ico").headers["content-type"] == "image/svg+xml"
