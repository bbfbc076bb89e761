"""The static page of the demo model as a visitor uses it."""

from typing import Any

# Few steps, since drawing in a browser is slow while other tests run.
QUICK = "#draw?class=145&seed=7&n=2&steps=2&sampler=euler&guidance=1"


def wait_until_drawn(page: Any) -> None:
    page.wait_for_selector("#draw-actions button")
    page.wait_for_selector("#draw-form .stop", state="hidden")


def notice(page: Any) -> str:
    page.wait_for_selector("#notices .notice")
    return str(page.inner_text("#notices p"))
