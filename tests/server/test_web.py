"""The server to web pages and reverse proxies: host names, CORS, prefixes, HEAD, /docs, wrong paths."""

import json
import re

import httpx
import pytest

from dsd_serve.errors import ConfigError
from server.middleware.hosts import AllowedHosts
from server.site import is_sane, parse_hosts, parse_prefix
from tests.support.servers import serving

KEY = "a-key-of-this-test-0123"
ORIGIN = "https://a.example"


@pytest.fixture(scope="module")
def url():
    with serving("--max-body-mb", "1", "--allowed-hosts", "images.example,*.b.example") as url:
        yield url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """With keys and CORS."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"a:{KEY}\n")
    arguments = ("--api-keys", str(keys), "--cors-origins", ORIGIN, "--max-body-mb", "1", "--max-uploads-mb", "2")
    with serving(*arguments) as url:
        yield url


@pytest.fixture(scope="module")
def prefixed():
    with serving("--allowed-hosts", "*", "--root-path", "/dsd") as url:
        yield url


def counted(url, code, route, **headers):
    found = re.search(rf'dsd_requests_total{{code="{code}",route="{re.escape(route)}"}} (\d+)', metrics(url, **headers))
    return int(found[1]) if found else 0


def metrics(url, **headers):
    return httpx.get(f"{url}/metrics", headers=headers).raise_for_status().text


# Names of the server.

OURS = (
    *("localhost", "LOCALHOST:8000", "localhost.", "a.localhost", "127.0.0.1:80", "10.1.2.3", "[::1]:8000", "[::]"),
    *("[fe80::1%25eth0]", "", "dsd", "dsd-front_1:8000", "dsd.default.svc", "dsd.default.svc.cluster.local"),
    *("host.docker.internal:8000", "images.example", "Images.Example.:443", "x.b.example", "x.y.b.example"),
)
OF_OTHERS = (
    *(
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.localhost.example",
    ),
    *("images.example.evil.example", "ximages.example", "b.example", "xb.example", "127.0.0.1.nip.io", "evil.local"),
    *("localhost@evil.example", "evil.example/localhost", "a,localhost", "localhost evil", "[evil.example]", "[::1"),
    *("::1", "[::1]x", ".svc", "x..svc", ".b.example", "svc.evil", "xsvc.", "1.2.3.4.5", "é", "a" * 300 + ".example"),
)


@pytest.mark.parametrize(("hosts", "answered"), [(OURS, True), (OF_OTHERS, False)])
def test_hosts(hosts, answered):
    rules = AllowedHosts(None, parse_hosts("images.example, *.B.example"))
    for host in hosts:
        # "xsvc." is a name without a dot: no page can be there
        assert rules.allows(host) is (answered or host == "xsvc."), host


@pytest.mark.parametrize(
    "text", ["https://a.example", "a.example:80", "a.example/x", "*a.example", "*.", "a b", "*,a.example"]
)
def test_wrong_lists_of_hosts_are_a_sentence(text):
    with pytest.raises(ConfigError, match="allowed_hosts must be"):
        parse_hosts(text)


def test_a_page_cannot_reach_the_server_by_a_name_of_its_own(url):
    host = {"Host": "evil.example:8000"}
    for method, path in (("GET", "/model"), ("GET", "/metrics"), ("POST", "/edit"), ("GET", "/"), ("GET", "/nothing")):
        answer = httpx.request(method, url + path, headers=host)
        assert answer.status_code == 421
        assert "--allowed-hosts evil.example" in answer.json()["detail"]
    answer = httpx.get(f"{url}/v1/models", headers=host)
    assert (answer.status_code, "--allowed-hosts" in answer.json()["error"]["message"]) == (421, True)
    assert httpx.get(f"{url}/health/live", headers=host).status_code == 200
    assert httpx.get(f"{url}/health/ready", headers=host).status_code == 200
    assert len(httpx.get(f"{url}/model", headers={"Host": "x" * 5000 + ".example"}).json()["detail"]) < 400
    assert httpx.get(f"{url}/model", headers={"Host": "www.b.example"}).status_code == 200
    assert counted(url, 421, "/edit") == 1


def test_any_host_where_the_operator_says_so(prefixed):
    assert httpx.get(f"{prefixed}/model", headers={"Host": "evil.example"}).status_code == 200


# Pages of other origins.


def test_a_page_of_an_allowed_origin_may_send_any_header_and_read_every_refusal(guarded):
    requested = "authorization,content-type,x-stainless-os,x-stainless-arch,x-stainless-retry-count,traceparent"
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": requested}
    answer = httpx.options(f"{guarded}/v1/images/generations", headers=preflight)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert set(requested.split(",")) <= set(answer.headers["access-control-allow-headers"].split(","))
    assert "Origin" in answer.headers["vary"]
    private = httpx.options(f"{guarded}/model", headers={**preflight, "Access-Control-Request-Private-Network": "true"})
    assert (private.status_code, private.headers["access-control-allow-private-network"]) == (200, "true")

    page = {"Origin": ORIGIN}
    known = {**page, "X-API-Key": KEY}
    refusals = (
        (401, httpx.get(f"{guarded}/model", headers=page)),
        (413, httpx.post(f"{guarded}/reconstruct", content=b"x" * 1_200_000, headers=known)),
        (415, httpx.post(f"{guarded}/reconstruct", content=b"x", headers={**known, "Content-Encoding": "gzip"})),
        (404, httpx.get(f"{guarded}/nothing", headers=known)),
        (405, httpx.delete(f"{guarded}/model", headers=known)),
        (421, httpx.get(f"{guarded}/model", headers={**known, "Host": "evil.example"})),
        (422, httpx.get(f"{guarded}/generate?class=nothing", headers=known)),
    )
    for status, answer in refusals:
        assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, ORIGIN), status
        assert answer.headers["access-control-expose-headers"] == "*"
        assert "Origin" in answer.headers["vary"]
    other = httpx.options(f"{guarded}/model", headers={**preflight, "Origin": "https://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Origin": "https://evil.example", "Content-Type": FORM}, True),
        ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, True),
        ({"Origin": "https://evil.example"}, True),  # a Blob without a type
        ({"Origin": "null", "Content-Type": FORM}, True),
        ({"Origin": "https://a.example.evil.example"}, True),
        ({"Origin": "https://a.example:8443"}, True),
        ({"Origin": "http://HOST:1"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "same-site", "Origin": "https://other.example"}, True),
        ({"Origin": "https://a.example"}, False),
        ({"Origin": "http://HOST:PORT", "Content-Type": FORM}, False),
        ({"Origin": "https://HOST:PORT"}, False),  # TLS that a proxy adds
        ({"Origin": "https://www.example", "Sec-Fetch-Site": "same-origin"}, False),  # a proxy that changes Host
        ({"Origin": "http://www.example", "X-Forwarded-Host": "www.example"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Origin": "https://evil.example", "Content-Type": "image/png"}, False),  # which needs a preflight request
        ({}, False),
    ],
)
def test_pages_of_others_send_no_forms(guarded, headers, refused):
    host, port = guarded.removeprefix("http://").split(":")
    headers = {name: value.replace("HOST", host).replace("PORT", port) for name, value in headers.items()}
    answer = httpx.post(f"{guarded}/edit?class=1", content=b"x", headers={"X-API-Key": KEY, **headers})
    assert (answer.status_code == 403) == refused, answer.text
    if refused:
        assert "--cors-origins" in answer.json()["detail"]


def test_a_refusal_before_the_routes_is_counted_for_its_route(guarded):
    key = {"X-API-Key": KEY}
    httpx.post(f"{guarded}/encode", content=b"x", headers={**key, "Content-Encoding": "br"})
    httpx.post(f"{guarded}/decode")
    httpx.get(f"{guarded}/v1/models/some-name")
    httpx.get(f"{guarded}/made/up/{'x' * 50}")
    assert counted(guarded, 415, "/encode", **key) == 1
    assert counted(guarded, 401, "/decode", **key) == 1
    assert counted(guarded, 401, "/v1/models/{model:path}", **key) == 1
    assert "made/up" not in metrics(guarded, **key)


# Reverse proxies.


def test_links_stay_below_the_prefix_of_the_proxy(url, prefixed):
    forwarded = {"X-Forwarded-Prefix": "/dsd/", "X-Forwarded-Host": "evil.example"}
    check_prefix(url, "", forwarded)
    assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/"}]
    for taken_off in ("", "/dsd"):  # by a proxy that takes it off, and one that does not
        check_prefix(prefixed, taken_off, {"X-Forwarded-Prefix": "/other"})
    assert httpx.get(f"{prefixed}/dsd/v1/models").json()["object"] == "list"
    assert httpx.get(f"{prefixed}/dsdx/model").status_code == 404


def check_prefix(url, prefix, headers):
    index = httpx.get(f"{url}{prefix}/", headers=headers)
    assert set(index.json().values()) == {f"{url}/dsd/generate?class=207", f"{url}/dsd/docs", f"{url}/dsd/model"}
    assert httpx.get(f"{url}{prefix}/openapi.json", headers=headers).json()["servers"] == [{"url": "/dsd"}]
    slash = httpx.get(f"{url}{prefix}/generate/?class=207&seed=1", headers=headers)
    assert slash.headers["location"] == "../generate?class=207&seed=1"
    for path in ("/docs", "/redoc"):
        page = httpx.get(f"{url}{prefix}{path}", headers=headers).text
        for link in re.findall(r"""(?:src|href|spec-url)="([^"]*)"|url: '([^']*)'""", page):
            assert not any(part.startswith(("/", "http")) for part in link)
            assert httpx.get(f"{url}{prefix}/{link[0] or link[1]}").status_code == 200


SANE = ("/dsd", "/a/b-c_d.e~f", "/.well", "/a..b")
NOT_SANE = (
    *("dsd", "//evil.example", "/a//b", "https://evil.example", "/../x", "/a/..", "/.", "/a b", "/a?b", "/a#b"),
    *("/a\\b", '/"><script>', "/%2e%2e", "/é", "/a\n", "/" + "a" * 300, ""),
)


def test_only_paths_are_prefixes(url):
    assert all(map(is_sane, SANE)) and not any(map(is_sane, NOT_SANE))
    assert parse_prefix("/dsd/") == "/dsd" and parse_prefix("/") == ""
    for text in NOT_SANE:
        if text and text.isascii() and text.isprintable():
            with pytest.raises(ConfigError, match="root_path must be a path like /dsd"):
                parse_prefix(text)
            links = httpx.get(f"{url}/", headers={"X-Forwarded-Prefix": text}).json()
            assert links["docs"] == f"{url}/docs"


def test_a_slash_too_many_redirects_to_no_other_host(url):
    for path in ("/generate/", "/generate//", "/v1/models//", "//evil.example/", "//evil.example//generate/"):
        answer = httpx.get(url + path, headers={"Host": "images.example"})
        assert "evil" not in answer.headers.get("location", "") and "example" not in answer.headers.get("location", "")
    answer = httpx.get(f"{url}/model//", follow_redirects=True)
    assert (answer.status_code, answer.json()["samplers"] != []) == (200, True)


# HEAD, wrong paths, the documentation.


def test_head_is_as_get_on_every_route(url):
    document = httpx.get(f"{url}/openapi.json").json()
    gets = {path for path, item in document["paths"].items() if "get" in item}
    assert len(gets) >= 9
    for path in (*gets, "/", "/metrics", "/docs", "/redoc", "/openapi.json", "/docs/assets/swagger-ui.css"):
        path = path.replace("{model}", "tiny")
        query = {"class": 207, "seed": 1} if path == "/generate" else {}
        got, head = httpx.get(url + path, params=query), httpx.head(url + path, params=query)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path not in ("/generate", "/metrics", "/debug/batcher"):  # there the length is not known, or varies
            assert head.headers["content-length"] == got.headers["content-length"], path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/images/generations", "did you mean /v1/images/generations? The base URL"),
        ("/v1/v1/images/edits", "did you mean /v1/images/edits? The base URL"),
        ("/api/v1/models", "did you mean /v1/models? The base URL"),
        ("/models/Some-Name", "did you mean /v1/models/Some-Name?"),
        ("/chat/completions", "of OpenAI's API this server has /v1/images/generations"),
        ("/v1/chat/completions", "of OpenAI's API this server has /v1/images/generations"),
    ],
)
def test_clients_of_openai_read_what_is_wrong_with_their_address(url, path, words):
    answer = httpx.post(url + path, json={})
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (404, True), answer.text


def test_wrong_paths(url):
    for path, words in (
        ("/Generate", "there is no /Generate here; did you mean /generate?"),
        ("//generate", "there is no //generate here; did you mean /generate?"),
        ("/v1/generate", "did you mean /generate?"),
        ("/nothing", "/docs lists what there is"),
        ("/" + "x" * 5000, "/docs lists what there is"),
    ):
        detail = json.loads(httpx.get(url + path).content)
        detail = detail.get("detail") or detail["error"]["message"]
        assert words in detail and len(detail) < 300


def test_the_documentation_loads_nothing_from_elsewhere(guarded):
    """And a browser, which has no key yet, can open it."""
    for path in ("/docs", "/redoc"):
        answer = httpx.get(guarded + path).raise_for_status()
        page = answer.text
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert not re.findall(r"""["'](?:https?:)?//""", page)
        assets = re.findall(r"docs/assets/[\w.-]+", page)
        assert assets
        for asset in assets:
            assert len(httpx.get(f"{guarded}/{asset}").raise_for_status().content) > 1000
    for path in ("/docs/assets/", "/docs/assets/../../pyproject.toml", "/docs/assets/..%2f..%2fpyproject.toml"):
        assert httpx.get(guarded + path, headers={"X-API-Key": KEY}).status_code == 404


# EventSource.


def test_a_stream_is_drawn_once_for_a_client_that_connects_again(url):
    query = {"class": 207, "seed": 1, "steps": 2, "format": "events"}
    text = httpx.get(f"{url}/generate", params=query, timeout=30).text
    numbers = [int(number) for number in re.findall(r"^id: (.*)$", text, re.MULTILINE)]
    assert numbers == list(range(1, text.count("event: ") + 1))
    last = {"Last-Event-ID": str(numbers[-1]), "Accept": "text/event-stream"}
    drawn = re.search(r"^dsd_images_total (.*)$", metrics(url), re.MULTILINE)[1]
    for again in (
        httpx.get(f"{url}/generate", params=query, headers=last),
        httpx.get(f"{url}/generate", params={"class": 207}, headers=last),
        httpx.post(f"{url}/generate", json=query, headers=last),
    ):
        assert (again.status_code, again.content, again.headers["cache-control"]) == (204, b"", "no-store")
    assert re.search(r"^dsd_images_total (.*)$", metrics(url), re.MULTILINE)[1] == drawn
    png = httpx.get(f"{url}/generate", params={"class": 207, "steps": 1}, headers={"Last-Event-ID": "1"}, timeout=30)
    assert (png.status_code, png.headers["content-type"]) == (200, "image/png")
