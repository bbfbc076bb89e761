"""The screenshots of the page in docs/ui, but training.png and those of the page without a server, taken again.

python -m benchmarks.page_screenshots PHOTO    a photo that may be published, whose reconstruction is shown
"""

import argparse
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page

from benchmarks.page_speed import ROOT, chromium, server

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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/page_screenshots.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("photo", type=Path)
    options = parser.parse_args()
    if not options.photo.is_file():
        parser.error(f"PHOTO must be an image file, and there is none at {options.photo}")
    take(options.photo)


if __name__ == "__main__":
    main()
