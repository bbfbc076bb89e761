"""The static page when something is wrong: links, photos, connections, parts and files. Each is a sentence."""

import io
import shutil
from http.server import SimpleHTTPRequestHandler

import pytest
from PIL import Image

from tests.support.browser import REASON
from tests.support.servers import serving_folder
from tests.support.web_page import QUICK, notice, wait_until_drawn

pytestmark = pytest.mark.browser
api = pytest.importorskip("playwright.sync_api", reason=REASON)


def test_a_link_with_wrong_values_says_which_and_draws(opened, url):
    page = opened(f"{url}#draw?class=unicorn&seed=x&n=2&steps=9999&model=another&sampler=euler&guidance=nan")
    wait_until_drawn(page)
    said = notice(page)
    for part in ('"unicorn"', '"x"', '"9999"', "another model", '"nan"'):
        assert part in said
    assert page.locator("#draw-sheet canvas").count() == 2
    page = opened(f"{url}#draw?class=207&seed=007&n=2&index={2**63 - 1}&steps=1")
    wait_until_drawn(page)
    assert f"index + n - 1 must be at most 2^63 - 1, not {2**63}" in notice(page)
    assert "seed=7&" in page.url
    api.expect(page.locator("#draw-caption")).to_contain_text("Seed 7 ·")
    page.fill("#draw input[name=seed]", "0012")
    page.keyboard.press("Enter")
    api.expect(page.locator("#draw-caption")).to_contain_text("Seed 12 ·")
    assert "seed=12&" in page.url


def damaged_png():
    """Its signature and size are right, its pixels are not."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    data = file.getvalue()
    return data[:33] + bytes(byte ^ 0xFF for byte in data[33:])  # IHDR ends at 33


UNREADABLE = {
    "a.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "share it as jpeg"),
    "notes.txt": (b"no image at all", "not an image"),
    "empty.png": (b"", "is empty"),
    "cut.jpg": (b"\xff\xd8\xff\xe0" + bytes(99), "damaged, cut off"),
    "damaged.png": (damaged_png(), "damaged, cut off"),
    "damaged.webp": (b"RIFF\x63\0\0\0WEBPVP8 " + bytes(99), "damaged, cut off"),
    "cut.gif": (b"GIF89a\x40\0\x40\0", "damaged, cut off"),
}


def test_a_photo_that_cannot_be_read_is_named_and_nothing_is_lost(opened, url):
    page = opened(url + QUICK)
    wait_until_drawn(page)
    page.get_by_role("tab", name="Photo").click()
    for name, (data, words) in UNREADABLE.items():
        page.set_input_files("#photo input[type=file]", {"name": name, "mimeType": "", "buffer": data})
        page.wait_for_selector(f"#notices .notice:has-text('{name}')")
        assert words in notice(page).lower()
    assert page.locator("#history li").count() == 2


def test_a_lost_connection_is_said_and_loading_can_be_tried_again(opened, url):
    page = opened(None)
    page.route("**/model.safetensors*", lambda route: route.abort())
    page.goto(url + QUICK)
    assert "cannot be fetched" in notice(page)
    page.unroute("**/model.safetensors*")
    page.get_by_role("button", name="Try again").click()
    wait_until_drawn(page)
    assert not page.locator("#notices .notice").count()


def test_a_connection_lost_halfway_is_said(opened, url, monkeypatch):
    def send_half(self, source, target):
        data = source.read()
        target.write(data[: len(data) // 2] if "model.safetensors" in self.path else data)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", send_half)
    page = opened(url + QUICK)
    assert notice(page) == "The connection was lost while model/model.safetensors was fetched."
    monkeypatch.undo()
    page.get_by_role("button", name="Try again").click()
    wait_until_drawn(page)


def test_an_open_page_needs_no_connection(opened, url):
    page = opened(url + QUICK)
    wait_until_drawn(page)
    page.wait_for_load_state("networkidle")  # the images of the classes come last
    page.context.set_offline(True)
    page.fill("#draw input[name=seed]", "8")
    page.keyboard.press("Enter")
    api.expect(page.locator("#draw-caption")).to_contain_text("Seed 8 ·")
    page.get_by_role("tab", name="Photo").click()
    page.click("#photo-examples button >> nth=0")
    page.wait_for_selector("#kept-actions button")
    with pytest.raises(api.Error, match="ERR_INTERNET_DISCONNECTED"):
        page.reload()


def test_a_missing_part_and_a_browser_without_webassembly_are_said(opened, url):
    page = opened(None)
    page.route("**/draw_view.js", lambda route: route.abort())
    page.goto(url)
    assert "could not be fetched" in notice(page)
    page = opened(None)
    page.add_init_script("delete globalThis.WebAssembly")
    page.goto(url)
    assert "cannot run WebAssembly" in notice(page)


@pytest.mark.parametrize("part, kept", [("page/walk_view.js", 0.5), ("page/words.js", 0.5), ("page.js", 0)])
def test_a_part_that_arrives_cut_is_said(visit, url, web_folder, part, kept):
    """With the right length, so that the browser takes it for the whole."""
    text = (web_folder / part).read_text()
    cut = text[: int(kept * len(text))]
    page = visit()
    page.route(f"**/{part}", lambda route: route.fulfill(body=cut, content_type="text/javascript"))
    page.goto(url)
    assert notice(page).startswith("Part of this page is damaged.")
    page.unroute(f"**/{part}")
    page.get_by_role("button", name="Try again").click()
    wait_until_drawn(page)
    assert not page.locator("#notices .notice").count()


def test_an_error_of_an_extension_is_not_the_pages(opened, url):
    page = opened(None)
    page.add_init_script("""document.addEventListener("readystatechange", () => document.readyState === "interactive" &&
        dispatchEvent(new ErrorEvent("error", { filename: "chrome-extension://one/content.js" })))""")
    page.goto(url + QUICK)
    wait_until_drawn(page)
    assert not page.locator("#notices .notice").count()


def change_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda folder: (folder / "network.json").unlink(),
            "network.json cannot be fetched, the answer has status 404",
        ),
        (lambda folder: (folder / "network.json").write_text("<html>"), "network.json is not JSON"),
        (lambda folder: (folder / "network.json").write_text("{}"), "is not of format dsd-web-1"),
        (lambda folder: (folder / "model/model.safetensors").write_bytes(b"x"), "is not the file of"),
        (lambda folder: change_a_byte(folder / "model/model.safetensors"), "model/model.safetensors is damaged, or of"),
        (lambda folder: (folder / "runtime/ort-wasm-simd-threaded.wasm").unlink(), "the answer has status 404"),
        (lambda folder: (folder / "runtime/ort.wasm.min.js").unlink(), "runtime/ort.wasm.min.js cannot be run"),
        (lambda folder: (folder / "worker.js").unlink(), "worker.js cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_a_sentence(browser, web_folder, tmp_path, spoil, says):
    folder = shutil.copytree(web_folder, tmp_path / "site")
    spoil(folder)
    with serving_folder(folder) as url:
        name, message = loaded(browser, url)
    assert name == "LoadError" and says in message


def loaded(browser, url):
    """A new visitor loads the network: ["", ""], or name and message of the error."""
    tab = browser.new_page()
    tab.goto(f"{url}/favicon.svg")
    found = tab.evaluate(
        "(url) => import(url + '/client.js').then(({ DSD }) => DSD.load('./'))"
        ".then(() => ['', ''], (error) => [error.name, error.message])",
        url,
    )
    tab.close()
    return found
