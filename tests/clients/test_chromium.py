"""Chromium without the Internet: OpenAI's client in another site's page, EventSource, /docs, our page below a path."""

import httpx
import pytest

from tests.clients.checks import check_events, check_openai
from tests.clients.conftest import HERE, KEY, bundled, installed

pytestmark = pytest.mark.clients

LISTEN = """
async (url) => {
  const source = new EventSource(url);
  const events = [];
  for (const name of ["preview", "image", "done", "error"]) {
    source.addEventListener(name, (event) => events.push({ name, data: event.data ?? null }));
  }
  const until = async (holds, seconds) => {
    for (const end = Date.now() + 1000 * seconds; !holds() && Date.now() < end; ) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  };
  await until(() => events.some((event) => event.name === "done"), 30);
  await until(() => source.readyState === EventSource.CLOSED, 9);
  return { events, closed: source.readyState === EventSource.CLOSED };
}
"""


@pytest.fixture(scope="module")
def bundle() -> str:
    installed("node")
    return bundled(str(HERE / "openai-browser.mjs"), "--platform=browser")


def exercise(tab, bundle, origin, server, photo):
    tab.goto(origin)
    tab.evaluate(bundle)
    options = {"baseURL": f"{server}/v1", "apiKey": KEY, "photo": list(photo.read_bytes())}
    return tab.evaluate("(options) => window.exercise(options)", options)


def test_openai_in_a_page_of_an_allowed_origin(tab, bundle, site, guarded, plain, photo):
    check_openai(exercise(tab, bundle, site, guarded, photo), plain, photo)


@pytest.mark.parametrize("how", ["default", "kept"])
def test_openai_in_a_page_of_an_allowed_origin_behind_nginx(tab, bundle, site, nginx, plain, photo, how):
    check_openai(exercise(tab, bundle, site, nginx.guarded[how], photo), plain, photo)


def test_openai_in_a_page_of_another_origin(tab, bundle, site, guarded, plain, photo):
    from playwright.sync_api import Error

    for origin, server in ((site.replace("localhost", "127.0.0.1"), guarded), (site, plain)):
        with pytest.raises(Error, match="Connection error"):
            exercise(tab, bundle, origin, server, photo)


def test_an_event_source_draws_once(tab, plain):
    tab.goto(f"{plain}/health/live")
    before = images_drawn(plain)
    check_events(plain, tab.evaluate(LISTEN, f"{plain}/generate?class=207&n=2&format=events"))
    assert images_drawn(plain) == before + 2


def images_drawn(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("dsd_images_total"))


def test_an_image_opened_in_a_tab_is_the_png_with_its_settings(tab, plain, drawn):
    answer = tab.goto(f"{plain}/generate?class=207&seed=7")
    assert answer.header_value("content-type") == "image/png"
    assert answer.body() == drawn
    tab.goto(f"{plain}/health/live")
    with tab.expect_response("**/generate*") as shown:
        tab.evaluate("new Image().src = '/generate?class=207&seed=7&index=1'")
    assert shown.value.header_value("content-type") == "image/png"


@pytest.mark.parametrize("where", ["plain", "guarded", "below"])
def test_the_docs_are_rendered(tab, request, where):
    url = f"{request.getfixturevalue('nginx').below}/dsd" if where == "below" else request.getfixturevalue(where)
    tab.goto(f"{url}/docs")
    tab.get_by_text("/v1/images/generations").first.wait_for()


def test_the_docs_send_requests_with_a_key(tab, guarded):
    tab.goto(f"{guarded}/docs")
    tab.click("button.authorize >> nth=0")
    tab.fill("input[type=text] >> nth=0", KEY)
    tab.click(".auth-container button[type=submit] >> nth=0")
    tab.click("button.btn-done >> nth=0")
    tab.get_by_text("/classes").first.click()
    tab.get_by_text("Try it out").first.click()
    with tab.expect_response("**/classes*") as answer:
        tab.click("button.execute")
    assert answer.value.status == 200


@pytest.mark.parametrize("below", [False, True], ids=["at the root", "below a path"])
def test_the_page_draws(tab, paged, request, below):
    page = f"{request.getfixturevalue('nginx').below}/ui/" if below else paged
    refused = []
    tab.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
    tab.goto(page)
    tab.wait_for_selector("#picker .class")
    tab.click("#generate-go")
    tab.wait_for_selector("#details .details img")
    assert refused == []
