"""The OpenAPI document against the real server: schemathesis, and every example and curl command in it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from dsd_serve.imaging.codec import write_image
from tests.support.data import ROOT, sample_image
from tests.support.servers import serving

SMALL = ("--max-steps", "8", "--max-images", "4", "--max-size", "64", "--max-body-mb", "1")
METHODS = ("get", "post")


@pytest.fixture(scope="module")
def small_url(tiny_dir: Path) -> Iterator[str]:
    """A real server of the tiny model whose limits keep every call short."""
    with serving("--model", str(tiny_dir), *SMALL) as url:
        yield url


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    """A real server of the demo model, for which the examples are written."""
    with serving("--max-steps", "4") as url:
        yield url


@pytest.fixture(scope="module")
def document(small_url: str):
    return httpx.get(f"{small_url}/openapi.json").json()


def operations(document):
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS and not path.startswith("/v1")
    ]


@pytest.mark.thorough
def test_schemathesis_finds_nothing(small_url, tmp_path):
    """No 5xx, no undocumented answer, no valid request refused, no invalid one taken. schemathesis.toml says more."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/support/schemathesis.toml")),
        *("run", f"{small_url}/openapi.json", "--no-color", "--phases", "examples,coverage,fuzzing"),
        *("--seed", "1", "--generation-deterministic", "--max-examples", "12"),
    ]
    environment = {"SCHEMATHESIS_HOOKS": str(ROOT / "tests/support/schemathesis_hooks.py"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = re.search(r"Test cases:\s+(\d+) generated", done.stdout)
    assert tested and int(tested[1]) > 500, done.stdout


def test_the_document_says_what_this_server_takes(document):
    query = {p["name"]: p["schema"] for p in document["paths"]["/generate"]["get"]["parameters"]}
    assert query["n"]["maximum"] == 4
    assert query["steps"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 8}
    schemas = document["components"]["schemas"]
    assert (schemas["InterpolateRequest"]["properties"]["n"]["default"], query["n"]["default"]) == (4, 1)
    assert schemas["LatentsAnswer"]["properties"]["latents"]["minItems"] == 4
    assert {"type": "integer", "enum": [1, 207, 950]} in query["class"]["anyOf"]


def test_the_document_is_valid_and_names_its_operations(document):
    assert document["openapi"].startswith("3.1")
    assert "itemSchema" not in json.dumps(document)  # which belongs to 3.2
    assert not list(OPENAPI_31_VALIDATOR.iter_errors(document))
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names) > 15
    assert all(len(name) <= 20 and name.isidentifier() for name in names)
    assert {"generate_get", "generate_post", "generations", "model"} < set(names)


def test_generated_clients_find_a_type_for_each_answer(document):
    """They take the first media type that they support. It must have a schema, one that fits the answer."""

    def first(path, method, known):
        content = document["paths"][path][method]["responses"]["200"]["content"]
        return next((kind, content[kind]["schema"]) for kind in content if kind in known)

    known = ("application/json", "text/event-stream", "text/plain", "text/markdown", "application/octet-stream")
    answer = {"$ref": "#/components/schemas/ImagesAnswer"}
    for path in ("generations", "variations", "edits"):
        assert first(f"/v1/images/{path}", "post", known) == ("application/json", answer)
    for path in ("/edit", "/interpolate", "/encode", "/decode", "/reconstruct", "/generate"):
        assert first(path, "post", known)[0] == "application/octet-stream"  # without format the answer is not JSON
    assert first("/generate", "get", ("image/png", *known))[0] == "image/png"
    assert first("/model", "get", known) == ("application/json", {"$ref": "#/components/schemas/ModelAnswer"})


def test_the_document_says_which_operations_need_a_key(document, tmp_path):
    assert "securitySchemes" not in document["components"]
    (tmp_path / "keys").write_text("a:a-key-of-this-test\n")
    with serving("--api-keys", str(tmp_path / "keys")) as url:
        document = httpx.get(f"{url}/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert [(one["type"], one.get("scheme"), one.get("name")) for one in schemes.values()] == [
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    ]
    assert document["security"] == [{name: []} for name in schemes]
    assert not list(OPENAPI_31_VALIDATOR.iter_errors(document))
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation.get("security") == ([] if path.startswith("/health/") else None)
            assert {"401", "default"} & set(operation["responses"]) or path.startswith("/health/")


def test_every_operation_says_what_can_go_wrong(document):
    for method, path, operation in operations(document):
        answers = operation["responses"]
        needed = {"200"} | ({"422", "429", "500", "503", "504"} if "406" in answers else set())
        needed |= {"400", "408", "413", "415"} if method == "post" else set()
        assert needed <= set(answers), path
        for status, answer in answers.items():
            assert answer["description"]
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"]
                assert "Retry-After" in answer.get("headers", {}) or status not in ("429", "503")
                example = answer["content"]["application/problem+json"]["example"]
                assert example["status"] == int(status)


def test_json_answers_and_events_are_as_described(small_url, document):
    """Every JSON answer and event against its own schema; nothing else may be in them."""
    png = write_image(sample_image(207, 0))

    def check(model, value):
        jsonschema_rs.validator_for({**document, "$ref": f"#/components/schemas/{model}"}).validate(value)

    with httpx.Client(base_url=small_url, timeout=30) as client:
        drawn = {"class": 207, "n": 2, "steps": 2, "seed": 1}
        check("DrawnAnswer", client.post("/generate", json={**drawn, "format": "json"}).json())
        check("EditedAnswer", client.post("/edit", params={**drawn, "format": "json"}, content=png).json())
        check("ReconstructedAnswer", client.post("/reconstruct", params={"format": "json"}, content=png).json())
        latents = client.post("/encode", params={"format": "json"}, content=png).json()
        check("LatentsAnswer", latents)
        check("DecodedAnswer", client.post("/decode", params={"format": "json"}, json=latents).json())
        walk = {"from": {"class": 207}, "to": {"class": 1}, "format": "json", "steps": 2}
        check("WalkAnswer", client.post("/interpolate", json=walk).json())
        ends = {"from": ("a.png", png), "to": ("b.png", png)}
        check("LatentWalkAnswer", client.post("/interpolate", params={"format": "json"}, files=ends).json())
        check("ModelAnswer", client.get("/model").json())
        models = {"preview": "PreviewEvent", "image": "ImageEvent", "error": "ErrorEvent", "done": "DoneEvent"}
        for path, more in (("/generate", {}), ("/edit", {"content": png})):
            method = "POST" if more else "GET"
            stream = client.request(method, path, params={**drawn, "format": "events"}, **more).text
            events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", stream)
            assert [name for name, _ in events].count("image") == 2
            for name, data in events:
                check(models[name], json.loads(data))


def test_every_example_works_with_the_demo_model(demo_url):
    document = httpx.get(f"{demo_url}/openapi.json").json()
    tried = 0
    with httpx.Client(base_url=demo_url, timeout=60) as client:
        for method, path, operation in operations(document):
            parameters = operation.get("parameters", [])
            query = {p["name"]: p["schema"]["examples"][0] for p in parameters if "examples" in p["schema"]}
            query = {name: min(value, 4) if name == "steps" else value for name, value in query.items()}
            if method == "get":
                assert client.get(path, params=query).status_code == 200
                tried += 1
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for name, example in body.get("examples", {}).items():
                answer = client.post(path, json=example["value"])
                assert answer.status_code == 200, (path, name, answer.text)
                tried += 1
        latents = document["components"]["schemas"]["LatentsAnswer"]["examples"][0]
        assert client.post("/decode", json=latents).status_code == 200
    assert tried >= 11


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_curl_command_in_the_document_works(demo_url, tmp_path):
    document = httpx.get(f"{demo_url}/openapi.json").json()
    for name in ("dog.jpg", "cat.jpg"):
        (tmp_path / name).write_bytes(write_image(sample_image(207, 0, size=64), "jpeg"))
    commands = [
        command
        for _, _, operation in operations(document)
        for command in re.findall(r"`(curl [^`]*)`", operation["description"])
    ]
    assert len(commands) >= 8
    for command in sorted(commands, key=lambda command: "@dog.npy" in command):  # which /encode writes
        arguments = shlex.split(command.replace("localhost:8000", demo_url))
        subprocess.run([*arguments, "--fail-with-body", "-sS", "-m", "60"], cwd=tmp_path, check=True)
        if "-o" in arguments:
            written = tmp_path / arguments[arguments.index("-o") + 1]
            assert written.read_bytes()[:6] in (b"\x89PNG\r\n", b"\x93NUMPY"), command


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("class=1&class=207", "class is given 2 times"),
        ("class=%00", "class"),
        ("class=%ff%fe", "class"),
        ("class=%", "class"),
        ("class=1&guidance=NaN", "finite"),
        ("class=1&guidance=1e999", "finite"),
        ("class=1&seed=" + "9" * 5000, "seed"),
        ("class=1&timeout=-0", "timeout"),
        ("class=1&%ff=%ff", "there is no parameter"),
    ],
)
def test_odd_query_strings_are_422(small_url, query, words):
    answer = httpx.get(f"{small_url}/generate?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"null",
        b"[" * 100_000,
        b'{"class": 1, "steps": ' + b"9" * 5000 + b"}",
        b'{"class": 1, "guidance": NaN}',
        b'{"class": 1, "guidance": Infinity}',
        b'{"class": "\\ud800"}',
        b'{"class": 1, "\\ud800": 1}',
        b'{"class": "\\u0000"}',
        b'{"class": 1, "steps": "2"}',
        b'{"class": 1, "steps": true}',
        b'{"class_": 1}',
        '{"class": 1}'.encode("utf-16"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/interpolate"])
def test_odd_json_is_422(small_url, path, body):
    answer = httpx.post(small_url + path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json"), answer.text


def test_json_bodies_have_a_type_and_a_size(small_url):
    form = "multipart/form-data; boundary=x"
    for kind in ("text/plain", "application/x-www-form-urlencoded", form, "json", ";", "é"):
        headers = {"content-type": kind.encode()}
        assert httpx.post(f"{small_url}/generate", content=b'{"class": 1}', headers=headers).status_code == 415
    assert httpx.post(f"{small_url}/interpolate", content=b"{}").status_code == 415
    assert httpx.post(f"{small_url}/generate", json={"class": 1, "x": "x" * 1_000_001}).status_code == 413
    answer = httpx.post(f"{small_url}/generate?seed=1", json={"class": 1})
    assert "nothing may be in the query string" in answer.json()["detail"]
    assert httpx.post(f"{small_url}/generate", json={"class": 1, "steps": 2.0}).status_code == 200


def test_head_options_and_other_methods(small_url):
    query = "/generate?class=207&seed=1"
    got, head = httpx.get(small_url + query), httpx.head(small_url + query)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-type", "x-dsd-seed", "vary", "cache-control"):
        assert head.headers[name] == got.headers[name]
    assert "content-length" not in head.headers
    assert httpx.head(small_url + query, headers={"if-none-match": got.headers["etag"]}).status_code == 304
    assert httpx.head(f"{small_url}/generate?class=nothing").status_code == 422
    for path in ("/model", "/classes", "/health/ready", "/"):
        assert (
            httpx.head(small_url + path).headers["content-length"]
            == httpx.get(small_url + path).headers["content-length"]
        )
    for path, methods in (("/generate", "GET, HEAD, POST, OPTIONS"), ("/edit", "POST, OPTIONS")):
        options = httpx.options(small_url + path)
        assert (options.status_code, options.headers["allow"]) == (204, methods)
        wrong = httpx.request("DELETE", small_url + path)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, methods)
        assert f"only {methods}" in wrong.json()["detail"]
    slash = httpx.get(f"{small_url}/generate/?class=207")
    assert (slash.status_code, slash.headers["location"]) == (307, "../generate?class=207")


def test_etags_in_all_forms(small_url):
    url = f"{small_url}/generate?class=207&seed=1&steps=1"
    etag = httpx.get(url).headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*", f'"a,b",,{etag},'):
        answer = httpx.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert httpx.get(url, headers=[("if-none-match", '"x"'), ("if-none-match", etag)]).status_code == 304
    for unknown in ("", '"', ",,", etag[1:-1], etag[:-2], "W/", b"\xff", "x" * 10_000):
        assert httpx.get(url, headers={"if-none-match": unknown}).status_code == 200


def test_events_have_no_etag(small_url):
    answer = httpx.get(f"{small_url}/generate?class=207&seed=1&steps=1&format=events", headers={"if-none-match": "*"})
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    assert "etag" not in answer.headers


HEADERS = ("accept", "if-none-match", "range", "expect", "cookie", "accept-encoding", "x-forwarded-for", "content-type")
values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(HEADERS), values), min_size=1, max_size=4), st.booleans())
def test_odd_and_repeated_headers_give_no_5xx(small_url, headers, post):
    encoded = [(name, value.strip().encode("latin-1")) for name, value in headers]
    body = {"method": "POST", "content": b'{"class": 1, "steps": 1}'} if post else {"method": "GET"}
    query = "" if post else "?class=1&seed=1&steps=1"
    answer = httpx.request(url=f"{small_url}/generate{query}", headers=encoded, **body)
    assert answer.status_code in (200, 304, 400, 406, 415, 417)


def test_a_model_may_have_any_name(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "name": "模型 ü"}))
    with serving("--model", str(folder)) as url:
        answer = httpx.get(f"{url}/generate?class=207&steps=1&format=json")
    assert (answer.status_code, answer.json()["model"]) == (200, "模型 ü")
    assert unquote(answer.headers["x-dsd-model"]) == "模型 ü"
