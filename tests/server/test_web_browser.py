"""The API from pages in a browser: its documentation, events, and requests from other origins."""

import pytest

from tests.support.browser import visiting
from tests.support.servers import serving, serving_folder

pytestmark = pytest.mark.browser

KEY = "a-key-of-this-test-0123"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The origin of another web site with one empty page."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<title>a page</title>")
    with serving_folder(folder) as url:
        yield url


@pytest.fixture(scope="module")
def url(site, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"a:{KEY}\n")
    with serving("--api-keys", str(keys), "--cors-origins", site) as url:
        yield url


@pytest.fixture
def page(browser):
    with visiting(browser, "response") as visit:  # /redoc asks for a logo elsewhere, which its policy blocks
        yield visit()


def test_the_documentation_works_without_the_internet_and_takes_a_key(page, url):
    page.goto(f"{url}/docs")
    page.get_by_role("button", name="Authorize").first.click()
    page.get_by_label("auth-bearer-value").fill(KEY)
    page.locator(".modal-ux button.authorize").first.click()
    page.locator(".modal-ux .btn-done").first.click()
    operation = page.locator("#operations-default-model")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    assert "fingerprint" in operation.locator(".live-responses-table").inner_text()
    page.goto(f"{url}/redoc")
    page.get_by_text("/v1/images/generations").first.wait_for(state="attached")


CALL = """async ([url, key]) => {
    const headers = {"authorization": "Bearer " + key, "content-type": "application/json", "x-stainless-os": "Unknown",
        "x-stainless-retry-count": "0", "x-something-new": "1"};
    const body = JSON.stringify({prompt: "golden retriever", num_inference_steps: 1});
    const answer = await fetch(url + "/v1/images/generations", {method: "POST", headers, body});
    const refused = await fetch(url + "/model", {headers: {"x-api-key": "wrong", "x-stainless-lang": "js"}});
    return [answer.status, (await answer.json()).data.length, answer.headers.get("x-dsd-steps"),
        refused.status, (await refused.json()).detail];
}"""


def test_a_page_of_an_allowed_origin_uses_the_api(page, site, url):
    page.goto(site)
    status, images, steps, refused, detail = page.evaluate(CALL, [url, KEY])
    assert (status, images, steps) == (200, 1, "1")
    assert (refused, "is unknown" in detail) == (401, True)


LISTEN = """([url]) => new Promise(end => {
    let done = 0, errors = 0;
    const source = new EventSource(url + "/generate?class=207&steps=2&format=events");
    source.addEventListener("done", () => done++);
    source.addEventListener("error", event => {
        errors += event.data === undefined ? 1 : 0;
        if (source.readyState === EventSource.CLOSED) end([done, errors]);
    });
    setTimeout(() => end([done, errors, "still open"]), 100000);
})"""


def test_an_event_source_draws_once(page):
    with serving("--cors-origins", "*") as url:
        page.goto(f"{url}/docs")
        # The stream ends, which is an error to EventSource; it connects again, is answered 204, and gives up.
        assert page.evaluate(LISTEN, [url]) == [1, 2]
