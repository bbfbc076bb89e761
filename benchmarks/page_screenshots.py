"""The screenshots of both pages in docs/ui, except training.png, taken again.

python -m benchmarks.page_screenshots PHOTO    a photo that may be published, whose reconstruction is shown

make export/npm/node_modules/.done installs the runtime of the page without a server first.
"""

import argparse
import io
import tempfile
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page

from benchmarks.page_speed import ROOT, chromium, server
from benchmarks.web_speed import host
from dsd_serve.files import demo_model
from export.web_folder import write_web

TARGET = ROOT / "docs" / "ui"


def take(photo: Path) -> None:
    """Take them all. photo: the photo to reconstruct."""
    with server() as url, chromium() as browser:
        page = opened(browser, url, "light")
        shot(page, "first.png", 760)
        for index in (967, 1):
            page.hover(f"#picker .class:has([data-value='{index}'])")
            page.click(f"#picker .more[data-value='{index}']")
            page.wait_for_selector(f"#picker .only[data-value='{index}'][aria-pressed=true]")
        drawn(page, 7)
        shot(page, "generate.png", 900)
        tab(page, "Walk")
        page.click("#walk-go")
        page.wait_for_selector("#walk-animation img")
        shot(page, "walk.png", 780)
        page = opened(browser, url, "dark")
        drawn(page, 7)
        page.click("#details [data-act=inside]")
        page.wait_for_selector("#latents [data-rank]")
        page.click("#way-go")
        page.wait_for_selector("#way figure:has-text('image')")
        shot(page, "inside.png", 820)
        tab(page, "Your photo")
        page.set_input_files("#photo input[type=file]", photo)
        page.wait_for_selector("#kept [data-psnr]")
        page.wait_for_selector("#compare .compare")
        shot(page, "photo.png", 820)
        with Image.open(TARGET / "photo.png") as taken:  # a photo makes a large PNG, and is shown small
            small = taken.resize((800, 529), Image.Resampling.LANCZOS)
        small.save(TARGET / "photo.png", optimize=True)
        page = opened(browser, url, "dark", width=390, height=844, scale=2)
        page.screenshot(path=TARGET / "phone.png")


def shot(page: Page, name: str, height: int) -> None:
    page.screenshot(path=TARGET / name, clip={"x": 20, "y": 0, "width": 1240, "height": height})


def opened(
    browser: Browser, url: str, shade: Literal["light", "dark"], width: int = 1280, height: int = 900, scale: int = 1
) -> Page:
    page = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=shade, device_scale_factor=scale
    ).new_page()
    page.goto(url)
    page.wait_for_selector("#picker .only[aria-pressed=true]")
    page.wait_for_timeout(2000)  # for the images of the classes, which are backgrounds
    return page


def drawn(page: Page, seed: int) -> None:
    page.fill("#generate-seed input", str(seed))
    page.check("#generate-lock input")
    page.click("#generate-go")
    page.wait_for_selector("#details .details")
    page.mouse.move(0, 0)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def take_without_server(photo: Path) -> None:
    """Those of the page without a server."""
    with tempfile.TemporaryDirectory() as folder:
        write_web(demo_model(), Path(folder) / "site", ROOT / "export/npm")
        with host(Path(folder) / "site") as url, chromium() as browser:
            page = without_server(browser, f"{url}#draw?class=779&seed=7&n=4", "light", 1280, 770)
            save("web-draw.webp", page)
            page.set_viewport_size({"width": 1280, "height": 1480})
            send(page, photo)
            page.get_by_role("button", name="Centre").click()
            page.get_by_role("button", name="Redraw").click()
            page.wait_for_selector("#edit-actions button")
            save("web-photo.webp", page, width=960)
            save(
                "web-dark.webp",
                without_server(browser, f"{url}#draw?class=1&seed=10&n=4", "dark", 1280, 770),
                width=960,
            )
            page = without_server(browser, f"{url}#draw", "light", 1280, 830)
            page.get_by_role("tab", name="Walk").click()
            page.get_by_role("button", name="Walk", exact=True).click()
            page.wait_for_selector("#walk-actions button")
            save("web-walk.webp", page, width=960)
            phones = [
                without_server(browser, f"{url}#draw?class={one}&seed=5&n=4", "light", 390, 904) for one in (967, 1)
            ]
            phones.append(without_server(browser, f"{url}#draw", "dark", 390, 904))
            send(phones[2], photo)
            phones[1].evaluate("document.getElementById('draw-actions').scrollIntoView({block: 'end'})")
            phones[2].evaluate("scrollTo(0, 0)")
            save("web-phone.webp", *phones)


def without_server(browser: Browser, url: str, shade: Literal["light", "dark"], width: int, height: int) -> Page:
    page = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=shade, has_touch=width < 500
    ).new_page()
    page.goto(url)
    page.wait_for_selector("#draw-actions button")
    return page


def send(page: Page, photo: Path) -> None:
    page.get_by_role("tab", name="Photo").click()
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#kept-caption :text('PSNR')")


def save(name: str, *pages: Page, width: int | None = None) -> None:
    """The pages side by side as a WebP file. width: to scale to."""
    for page in pages:
        page.wait_for_timeout(2000)  # for the measured time in the header, and images that fade in
    shots = [Image.open(io.BytesIO(page.screenshot())).convert("RGB") for page in pages]
    image = Image.new("RGB", (sum(shot.width for shot in shots), max(shot.height for shot in shots)))
    for i, one in enumerate(shots):
        image.paste(one, (sum(shot.width for shot in shots[:i]), 0))
    if width is not None:
        image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
    image.save(TARGET / name, quality=85, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page_screenshots", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photo", type=Path)
    options = parser.parse_args()
    if not options.photo.is_file():
        parser.error(f"PHOTO must be an image file, and there is none at {options.photo}")
    take(options.photo)
    take_without_server(options.photo)


if __name__ == "__main__":
    main()
