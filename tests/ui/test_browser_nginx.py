"""The page behind nginx, in Chromium: with the configuration in deploy/, and with one that forwards no headers."""

import io

import pytest
from PIL import Image

from tests.server.test_proxies import NGINX, nginx
from tests.support.servers import find_free_port, serving

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light"),
]
BARE = "server { listen 80; location / { proxy_pass http://127.0.0.1:8000; } }"
# Below paths: one of which the server is not told, one whose last slash is not required.
PATHS = """server {
  listen 80;
  location /untold/ { proxy_pass http://127.0.0.1:8000/; }
  location /told {
    rewrite ^/told/?(.*)$ /$1 break;
    proxy_set_header X-Forwarded-Prefix /told;
    proxy_pass http://127.0.0.1:8000;
  }
}"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The addresses of nginx, with the configuration in deploy/, with BARE and with PATHS."""
    with serving("--ui") as url:
        server = url.removeprefix("http://")
        with (
            nginx(tmp_path_factory.mktemp("nginx"), server, find_free_port()) as deployed,
            nginx(tmp_path_factory.mktemp("bare"), server, find_free_port(), BARE) as bare,
            nginx(tmp_path_factory.mktemp("paths"), server, find_free_port(), PATHS) as paths,
        ):
            yield {"deployed": deployed, "bare": bare, "paths": paths}


@pytest.mark.parametrize(
    ("host", "prefix"),
    [("deployed", "/"), ("deployed", "/dsd/"), ("bare", "/"), ("paths", "/told"), ("paths", "/told/")],
)
def test_the_page_draws_saves_links_and_reloads(browser, hosts, host, prefix):
    url = hosts[host] + prefix
    context = browser.new_context()
    elsewhere, refused = [], []
    context.on(
        "request", lambda one: elsewhere.append(one.url) if not one.url.startswith((url, "data:", "blob:")) else 0
    )
    context.on("response", lambda one: refused.append(one.url) if one.status >= 400 else 0)

    def shown(page):
        """The addresses of the images on the board of a page that has finished opening or drawing."""
        page.wait_for_selector("#details .details")
        page.wait_for_function("window.dsd.ready()")
        page.wait_for_function("[...document.querySelectorAll('#board img')].every(one => one.naturalWidth)")
        return page.eval_on_selector_all("#board button.card img", "all => all.map(one => one.src)")

    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{url}?class=207&n=2&seed=7&steps=1&sampler=euler&guidance=1")
    first = shown(page)
    page.click("#generate-go")
    page.wait_for_url(lambda now: "seed=7&" not in now)
    drawn = shown(page)
    assert len(drawn) == 2 and not set(drawn) & set(first)
    with page.expect_download() as download:
        page.click("#details a[download]")
    assert Image.open(io.BytesIO(download.value.path().read_bytes())).size == (256, 256)
    assert page.evaluate("window.dsd.address(document.querySelector('#board .board').dataset.link)") == page.url
    page.reload()
    assert shown(page) == drawn
    assert not elsewhere
    assert not refused
    context.close()


def test_a_proxy_that_does_not_tell_its_path_is_named(browser, hosts):
    page = browser.new_page()
    page.goto(hosts["paths"] + "/untold/")
    page.wait_for_selector("#down:has-text('the proxy must send it the header X-Forwarded-Prefix: /untold')")
    assert page.inner_text("#pill") == "not connected"
    page.close()
