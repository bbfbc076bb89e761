"""Values of parameters: whatever is sent where something else belongs, the answer is one short sentence."""

import json
import re
import socket
import time
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd_serve.errors import InputError, shown
from dsd_serve.imaging.codec import MAX_SIDES, check_fits, grid, read_image, write_image
from dsd_serve.strict_json import read_json
from server.error_responses import MAX_SENTENCES, sentences, validated
from server.openai_schemas import EditForm, GenerationRequest, VariationForm
from server.schemas import (
    ClassesQuery,
    EditQuery,
    EncodeQuery,
    GenerateRequest,
    ImageQuery,
    InterpolateRequest,
    WalkQuery,
)
from tests.support.data import sample_image
from tests.support.servers import Server

# A request that is right, for each model; and whether its values come as JSON.
RIGHT: dict[Any, tuple[dict[str, Any], bool]] = {
    GenerateRequest: ({"class": 1}, True),
    InterpolateRequest: ({"from": {"class": 1}, "to": {"class": 207}}, True),
    GenerationRequest: ({"prompt": "1", "stream": True}, True),
    EditQuery: ({}, False),
    ImageQuery: ({}, False),
    EncodeQuery: ({}, False),
    WalkQuery: ({}, False),
    ClassesQuery: ({}, False),
    VariationForm: ({}, False),
    EditForm: ({"prompt": "1", "stream": "true"}, False),
}
# What no field takes as JSON, and no number as text; what reads badly, or costs much, where it is not foreseen.
LONG = "1" * 100_000 + "x"  # which a careless pattern would take minutes to refuse
WRONG_JSON = [
    True,
    [],
    [207],
    {},
    {"a": [{}]},
    207.5,
    -1,
    10**400,
    2**63,
    float("inf"),
    "",
    "x" * 100_000,
    LONG,
    "1_0",
    "\ud800",
]
WRONG_TEXT = [
    "1_0",
    " 7 ",
    "+7",
    "0x7",
    "٧",
    "７",
    "1e999",
    "nan",
    "-inf",
    "9" * 5000,
    "",
    "1,5",
    "x" * 100_000,
    LONG,
    "\ud800",
]
UNREADABLE = re.compile(
    r"Input should|instance of|None|\bstr\b|\bint\b|dictionary|Unable|validator|must be [A-Z]|Value error"
)


def fields(model: Any):
    for name, field in model.model_fields.items():
        yield (field.alias or name,), field
        if name in ("from_", "to"):
            for inner, one in field.annotation.model_fields.items():
                yield (field.alias or name, one.alias or inner), one


def cases():
    for model, (_, strict) in RIGHT.items():
        for place, field in fields(model):
            yield pytest.param(model, strict, place, str(field.annotation), id=f"{model.__name__}-{'.'.join(place)}")


def sentence_for(model: Any, values: dict[str, Any], strict: bool) -> str | None:
    """The sentence that a client gets for these values; None if they are accepted."""
    try:
        validated(model, values, strict=strict)
    except RequestValidationError as error:
        return sentences(error.errors())
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("model", "strict", "place", "kind"), list(cases()))
def test_a_wrong_value_of_any_field_is_one_short_sentence(model, strict, place, kind):
    name = ".".join(place)
    for value in WRONG_JSON if strict else WRONG_TEXT:
        values = json.loads(json.dumps(RIGHT[model][0]))
        (values if len(place) == 1 else values[place[0]])[place[-1]] = value
        sentence = sentence_for(model, values, strict)
        if sentence is None and ("Any" in kind or ("End" in kind and value == {})):
            continue  # a class, or an end without one, of which the model decides; see test_classes.py
        if sentence is None:  # then the field is for such values, or leaves out what is empty
            fitting = {str: "str", bool: "bool", int: "int", float: "float", type(None): "None"}.get(
                type(value), "dict"
            )
            assert value in ("", None) or fitting in kind, f"{name} takes {shown(value)}"
            assert len(shown(value)) < 80, f"{name} takes {shown(value)}"
            continue
        assert sentence.startswith((f"{name} must be ", f"{name} is missing", "there is no parameter ")), sentence
        assert len(sentence) < 250, sentence
        assert sentence.count(f"{name} must be") <= 1, sentence
        assert not UNREADABLE.search(sentence), sentence
        sentence.encode()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=90), inner, max_size=4),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.sampled_from(list(RIGHT)), st.data())
def test_any_value_is_accepted_or_refused_in_a_short_sentence(model, data):
    right, strict = RIGHT[model]
    names = [place[0] for place, _ in fields(model)]
    value = anything if strict else st.text(max_size=300)
    values = {**right, **data.draw(st.dictionaries(st.sampled_from(names) | st.text(max_size=90), value, max_size=6))}
    sentence = sentence_for(model, values, strict)
    if sentence is not None:
        assert len(sentence) < 300 * (MAX_SENTENCES + 1)
        assert "Input should" not in sentence


@settings(derandomize=True, deadline=None)
@given(anything)
def test_a_value_of_any_size_is_shown_in_a_line(value):
    assert len(shown(value)) <= 80
    assert shown(value).isprintable()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        ([None, {"a": False}], "[null, {'a': false}]"),
        ("x" * 10**6, "..."),
        (10**5000, "a number of 5001 digits"),
        (1.5, "1.5"),
    ],
    ids=range(6),
)
def test_values_are_shown_as_they_were_sent(value, words):
    assert words in shown(value)


# JSON.


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the body is empty"),
        (b" \n", "the body is empty"),
        (b"{", "not valid JSON: Expecting property name"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number of JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice; give it once"),
        (b"[" * 9000, "nested too deeply"),
        (b'{"a":' * 9000, "nested too deeply"),
        (b"[" * 900_000, "at most 10,000 values"),
        (b"[" + b"1," * 400_000 + b"1]", "at most 10,000 values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b"\xff", "must be in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "must be in UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not valid JSON"),
        ('{"a": 1}'.encode("utf-32"), "must be in UTF-8"),
        (b'{"' + b"x" * 10**6 + b'": 1, "' + b"x" * 10**6 + b'": 1}', "is given twice"),
    ],
)
def test_invalid_json_gets_a_sentence(data, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_json(data)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("path", "body"), [("/generate", {"class": 1, "steps": 1}), ("/v1/images/generations", {"prompt": "1"})]
)
def test_json_may_begin_with_a_byte_order_mark(http, path, body):
    data, kind = json.dumps(body).encode(), {"content-type": "application/json"}
    assert http.post(path, content=b"\xef\xbb\xbf" + data, headers=kind).status_code == 200
    for wrong in (data.decode().encode("utf-16"), data[:-1] + b', "n": 1, "n": 2}', b'{"n": NaN}'):
        answer = http.post(path, content=wrong, headers=kind)
        assert answer.status_code in (400, 422)
        assert "the body is not valid JSON" in answer.text


def test_latents_in_json_may_begin_with_a_byte_order_mark(http):
    latents = http.post("/encode", params={"format": "json"}, content=write_image(sample_image(1, 0))).content
    for kind in ("application/json", "application/octet-stream"):
        answers = [
            http.post("/decode", content=data, headers={"content-type": kind})
            for data in (latents, b"\xef\xbb\xbf" + latents)
        ]
        assert answers[0].content == answers[1].content
        assert answers[0].headers["content-type"] == "image/png"


# Requests, of a real server.


def detail(answer: httpx.Response) -> str:
    """The sentence of a refusal, which is never long."""
    assert answer.status_code in (400, 404, 406, 415, 422), answer.text
    assert len(answer.content) < 1500
    body = answer.json()
    return body["error"]["message"] if "error" in body else body["detail"]


BIG = "x" * 900_000


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/generate", {"class": "golden " * 120_000}, "class must be at most 200 characters long, got 'golden"),
        ("/generate", {"class": None}, "class must be an index, a wnid like n02099601 or a name, got null"),
        ("/generate", {"class": True}, "class must be an index, a wnid like n02099601 or a name, got true"),
        ("/generate", {"class": [207]}, "class must be an index, a wnid like n02099601 or a name, got [207]"),
        ("/generate", {"class": 207.5}, "class must be an index, a wnid like n02099601 or a name, got 207.5"),
        (
            "/generate",
            {"class": "金"},
            "class must be an index, a wnid like n02099601 or a name, got '金'; the model has",
        ),
        ("/generate", {"class": 1, BIG: 1}, "there is no parameter 'xxx"),
        ("/generate", {"class": 1, "sampler": BIG}, "sampler must be at most 200 characters long, got 'xxx"),
        (
            "/generate",
            {"class": 1, "n": 10**400},
            "n must be less than or equal to 2147483647, got a number of 401 digits",
        ),
        (
            "/generate",
            {"class": 1, "guidance": 10**400},
            "guidance must be a finite number, got a number of 401 digits",
        ),
        ("/generate", {"class": 1, **{f"p{i}": 1 for i in range(5000)}}, "and 4,995 more errors"),
        ("/generate", [BIG], "the body must be a JSON object"),
        ("/interpolate", {"from": {"class": None}, "to": {"class": 1}}, "from.class must be an index"),
        ("/interpolate", {"from": {"class": 1}, "to": {"class": "???"}}, "to.class must be an index"),
        ("/interpolate", {"from": {"class": 1}, "to": {"class": 3}}, "to.class '3' is tiger shark"),
        ("/interpolate", {"from": {"class": 1}, "to": 207}, "to must be a JSON object, got 207"),
        ("/interpolate", {"from": {"class": 1}, "to": {}}, "to.class is missing"),
        ("/interpolate", {"from": {"class": 1}, "to": {"class": 1, BIG: 1}}, "xx' in to; /docs lists them"),
        ("/interpolate", {"from": {"class": 1}, "to": {"class": 1}, "seed": 1}, "seed must be left out: each end has"),
        ("/v1/images/generations", {"prompt": BIG}, "prompt must be at most 1000 characters long"),
        ("/v1/images/generations", {"prompt": "a " * 400}, "the prompt must name a class"),
        ("/v1/images/generations", {"prompt": "1", "model": "y" * 999}, "there is no model 'yyy"),
        ("/v1/images/generations", {"prompt": "1", "user": BIG}, "user must be at most 1000 characters long"),
        ("/v1/images/generations", {"prompt": "1", "n": True}, "n must be a valid integer, got true"),
        ("/v1/images/generations", {"prompt": "1", "n": "1"}, "n must be a valid integer, got '1'"),
        ("/v1/images/generations", {"prompt": "1", "seed": True}, "seed must be a valid integer, got true"),
        ("/v1/images/generations", {"prompt": "1", "class_id": True}, "class_id must be a valid integer, got true"),
        (
            "/v1/images/generations",
            {"prompt": "1", "stream": 1},
            "stream must be a valid boolean, true or false, got 1",
        ),
        (
            "/v1/images/generations",
            {"prompt": "1", "guidance_interval": {"0.2": 1, "0.8": 2}},
            "must be two times from 0",
        ),
        ("/v1/images/generations", {"prompt": "1", "guidance_interval": [10**400, 1]}, "must be two times from 0"),
        ("/v1/images/generations", {"prompt": "1", "guidance_interval": [False, True]}, "must be two times from 0"),
        ("/v1/images/generations", {"prompt": "1", "guidance_interval": "0.2,0.5,0.8"}, "must be two times from 0"),
        ("/v1/images/generations", {"prompt": "1", "guidance_interval": "1_0,nan"}, "must be two times from 0"),
        ("/v1/images/generations", {"prompt": "1", BIG: 1}, "there is no parameter 'xxx"),
    ],
)
def test_wrong_json_gets_a_short_sentence(http, path, body, words):
    assert words in detail(http.post(path, json=body))


@pytest.mark.parametrize(
    "value", ids=shown, argvalues=["1_000", " 7 ", "+7", "0x7", "٧", "７", "1e1", "7.5", "", "9" * 5000, "\u00a07"]
)
@pytest.mark.parametrize("name", ["seed", "n", "steps", "size", "index", "preview_every"])
def test_whole_numbers_in_a_query_string_are_plain(http, name, value):
    assert detail(http.get(f"/generate?class=1&{name}={quote(value)}")).startswith(f"{name} must be a")


@pytest.mark.parametrize("value", ["1_0", " 1 ", "+1", "٧", "inf", "NaN", "0x1p3", "", "1e999"])
@pytest.mark.parametrize("name", ["guidance", "guidance_start", "guidance_stop", "timeout"])
def test_numbers_in_a_query_string_are_plain(http, name, value):
    assert detail(http.get(f"/generate?class=1&{name}={quote(value)}")).startswith(f"{name} must be a finite number")


def test_plain_numbers_are_taken_in_every_form(http):
    for query in ("steps=2&guidance=.5", "steps=02&guidance=5e-1", "steps=2.0&guidance=0.50", "steps=2&guidance=0.5"):
        answer = http.get(f"/generate?class=1&seed=1&{query}")
        assert (answer.status_code, answer.headers["x-dsd-guidance"]) == (200, "0.5")


@pytest.mark.parametrize("q", ["金", "２０７", "²", "???", "💥"])
def test_a_search_without_a_word_finds_nothing(http, q):
    assert http.get("/classes", params={"q": q}).json() == []
    assert "class must be an index" in detail(http.get("/generate", params={"class": q}))


def test_only_an_empty_search_finds_all(http):
    assert [c["index"] for c in http.get("/classes?q=").json()] == [1, 207, 950]
    assert http.get("/classes?q=%20").json() == []
    assert "q must be at most 200 characters long" in detail(http.get("/classes", params={"q": "a" * 201}))


def test_seeds_that_javascript_rounds_may_be_text(http):
    seed = 2**53 + 1
    body = {"class": 1, "steps": 1, "format": "png"}
    number, text = (http.post("/generate", json={**body, "seed": one}) for one in (seed, str(seed)))
    assert number.content == text.content
    assert number.headers["x-dsd-seed"] == text.headers["x-dsd-seed"] == str(seed)
    drawn = http.post("/v1/images/generations", json={"prompt": "1", "seed": str(seed), "num_inference_steps": 1})
    assert drawn.json()["data"][0]["seed"] == seed
    walk = {"from": {"class": 1, "seed": str(seed)}, "to": {"class": 1}, "n": 2, "steps": 1, "format": "json"}
    assert http.post("/interpolate", json=walk).json()["from"]["seed"] == seed
    for wrong in ("1e3", "", "-1", "0x1", str(2**63), "9" * 4000):
        assert detail(http.post("/generate", json={**body, "seed": wrong})).startswith("seed must be")
    assert "steps must be a valid integer" in detail(http.post("/generate", json={**body, "steps": "2"}))


def test_what_is_empty_under_v1_is_left_out(http):
    empty = dict.fromkeys(("model", "size", "response_format", "output_format", "user", "sampler", "quality"), "")
    answer = http.post("/v1/images/generations", json={"prompt": "1", **empty, "guidance_interval": ""})
    assert (answer.status_code, answer.json()["size"]) == (200, "16x16")
    files = {"image": ("a.png", write_image(sample_image(1, 0)), "image/png")}
    numbers = dict.fromkeys(("n", "seed", "num_inference_steps", "strength", "stream", "output_compression"), "")
    form = {"prompt": "1", **empty, **numbers, "guidance_scale": "", "class_id": "", "guidance_interval": ""}
    assert http.post("/v1/images/edits", data=form, files=files).status_code == 200
    del numbers["stream"]
    assert http.post("/v1/images/variations", data={**numbers, "model": ""}, files=files).status_code == 200
    assert "prompt is missing" in detail(http.post("/v1/images/edits", data={"prompt": ""}, files=files))
    for value in ("1_0", " 1", "+1", "٧"):
        assert "n must be a valid integer" in detail(http.post("/v1/images/variations", data={"n": value}, files=files))


def test_types_of_bodies_are_compared_in_any_case(http):
    png = write_image(sample_image(1, 0))
    request = httpx.Request("POST", "http://x", data={"prompt": "1"}, files={"image": ("a.png", png, "image/png")})
    boundary = request.headers["content-type"].partition("boundary=")[2]
    form = {
        "content": request.read(),
        "headers": {"content-type": f"Multipart/Form-Data; Boundary={boundary}; charset=UTF-8"},
    }
    assert http.post("/v1/images/edits", **form).status_code == 200
    request = httpx.Request("POST", "http://x", files={"image": ("a.png", png, "image/png")})
    boundary = request.headers["content-type"].partition("boundary=")[2]
    form = {"content": request.read(), "headers": {"content-type": f"MULTIPART/form-data;boundary={boundary}"}}
    for path in ("/v1/images/variations", "/edit", "/encode", "/reconstruct"):
        assert http.post(path, **form).status_code == 200, path
    for kind in ("Application/JSON", "application/json;charset=utf-8", "APPLICATION/vnd.api+Json ; x=y"):
        for path, body in (("/generate", b'{"class": 1}'), ("/v1/images/generations", b'{"prompt": "1"}')):
            assert http.post(path, content=body, headers={"content-type": kind}).status_code == 200, (kind, path)
    assert http.post("/reconstruct", content=png, headers={"content-type": "IMAGE/PNG; x=y"}).status_code == 200


def raw(url: str, target: bytes, headers: bytes = b"") -> bytes:
    """The answer to a GET with a head that httpx would not send."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n"
        )
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_heads_of_many_parts_get_short_answers(server_url):
    many = b"&".join(b"%x" % number for number in range(10_000))
    answer = raw(server_url, b"/generate?class=1&" + many)
    assert b"the query string must have at most 100 parameters, got 10,001" in answer
    answer = raw(server_url, b"/generate?class=1&" + b"&".join(b"p%d=1" % number for number in range(90)))
    assert b"and 85 more errors" in answer and len(answer) < 2000
    answer = raw(server_url, b"/generate?class=1", b"Accept: " + b'"x",' * 10_000 + b"\r\n")
    assert b"406" in answer[:20] and b"the header Accept must have at most 2,000 characters" in answer
    answer = raw(server_url, b"/generate?class=1&seed=1&steps=1", b"If-None-Match: " + b"a," * 20_000 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    for target in (b"/" + b"x" * 50_000, b"/v1/models/" + b"x" * 50_000):
        answer = raw(server_url, target)
        assert b" 404 " in answer[:20] and len(answer) < 1500


def test_the_worst_texts_do_not_block_other_requests(server_url):
    """The slowest of these once took half a minute, in which nothing else was answered."""
    began = time.monotonic()
    with httpx.Client(base_url=server_url, timeout=60) as client:
        for value in ("a " * 40_000, "golden " * 60_000, "\ufdfa" * 50_000):
            assert client.post("/generate", json={"class": value}).status_code == 422
            ends = {"from": {"class": value}, "to": {"class": value}}
            assert client.post("/interpolate", json=ends).status_code == 422
    assert time.monotonic() - began < 10


# What parameters make together.


@pytest.fixture(scope="module")
def large_url(tiny_dir):
    running = Server("--model", str(tiny_dir), "--max-size", "70000", "--max-images", "64")
    yield running.url
    assert running.stop() == 0


WALK = {"from": {"class": 1, "seed": 1}, "to": {"class": 207}, "steps": 1}


@pytest.mark.parametrize(
    ("method", "path", "query", "words"),
    [
        (
            "POST",
            "/interpolate",
            {**WALK, "n": 16, "size": 1024, "format": "webp"},
            "16 x 1 images of 1,024 pixels side by side; ask for format=zip or a smaller size",
        ),
        (
            "POST",
            "/interpolate",
            {**WALK, "n": 64, "size": 1024, "format": "jpeg"},
            "a jpeg file must be at most 65,500",
        ),
        ("GET", "/generate", {"class": 1, "n": 17, "size": 4000, "format": "webp"}, "5 x 4 images of 4,000 pixels"),
        (
            "GET",
            "/generate",
            {"class": 1, "size": 16384, "format": "webp"},
            "a webp file must be at most 16,383 pixels wide and high, got 16,384; ask for png or a smaller size",
        ),
        ("GET", "/generate", {"class": 1, "size": 65501, "format": "jpeg"}, "a jpeg file must be at most 65,500"),
        ("HEAD", "/generate", {"class": 1, "size": 65501, "format": "jpeg"}, ""),
        ("POST", "/reconstruct", {"size": 16384, "format": "webp"}, "a webp file must be at most 16,383 pixels"),
        ("POST", "/decode", {"size": 16384, "format": "webp"}, "a webp file must be at most 16,383 pixels"),
        ("POST", "/edit", {"n": 2, "size": 8192, "format": "webp"}, "2 x 1 images of 8,192 pixels"),
        (
            "POST",
            "/v1/images/generations",
            {"prompt": "1", "size": "16384x16384", "output_format": "webp"},
            "a webp file",
        ),
        ("POST", "/v1/images/variations", {"size": "16384x16384", "output_format": "webp"}, "a webp file"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_drawing(large_url, method, path, query, words):
    with httpx.Client(base_url=large_url, timeout=60) as client:
        before = client.get("/debug/batcher").json()["rows"]
        if path in ("/interpolate", "/v1/images/generations"):
            answer = client.post(path, json=query)
        elif path == "/v1/images/variations":
            answer = client.post(path, data=query, files={"image": ("a.png", write_image(sample_image(1, 0)))})
        else:
            content = write_image(sample_image(1, 0)) if method == "POST" else None
            answer = client.request(method, path, params=query, content=content)
        assert answer.status_code == (400 if path.startswith("/v1") else 422)
        if method != "HEAD":
            assert words in detail(answer)
        assert client.get("/debug/batcher").json()["rows"] == before


def test_a_walk_between_images_is_refused_before_they_are_read(large_url):
    files = {name: ("a.png", b"no image", "image/png") for name in ("from", "to")}
    query = {"n": 16, "size": 1024, "format": "webp"}
    assert "a webp file must be" in detail(
        httpx.post(f"{large_url}/interpolate", params=query, files=files, timeout=60)
    )


def test_what_a_format_can_hold_is_drawn(large_url):
    query = {"n": 63, "size": 260, "format": "webp"}  # a strip of 16,380 pixels
    answer = httpx.post(f"{large_url}/interpolate", json={**WALK, **query}, timeout=60)
    assert read_image(answer.content).shape == (3, 260, 63 * 260)
    for media in ("png", "zip", "json", "events"):
        check_fits(media, 1000, 1024, columns=1000)


@pytest.mark.parametrize("media", list(MAX_SIDES))
def test_the_limits_of_formats_are_those_of_their_encoders(media):
    most = MAX_SIDES[media]
    line = grid([sample_image(1, 0, size=1)] * most, columns=most)
    assert write_image(line, media)
    check_fits(media, most, 1, columns=most)
    with pytest.raises(Exception, match=r".*"):
        write_image(grid([sample_image(1, 0, size=1)] * (most + 1), columns=most + 1), media)
    with pytest.raises(InputError, match=f"at most {most:,} pixels"):
        check_fits(media, most + 1, 1, columns=most + 1)
