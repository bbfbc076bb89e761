"""Content negotiation, as RFC 9110 section 12.5.1 has it."""

import time

import pytest
from fastapi import HTTPException, Request
from hypothesis import example, given
from hypothesis import strategies as st

from server.responses import ANSWERS, EVENTS, choose

OFFERED = EVENTS


def chosen(*accept, offered=OFFERED, requested=None):
    """The choice for these Accept headers; None for 406."""
    headers = [(b"accept", value.encode("latin-1")) for value in accept]
    try:
        return choose(Request({"type": "http", "headers": headers}), requested, offered)
    except HTTPException as error:
        assert error.status_code == 406
        return None


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "png"),
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("image/webp", "webp"),
        ("IMAGE/WebP", "webp"),
        ("image/png;q=0, image/*", "jpeg"),
        ("image/*, image/png;q=0", "jpeg"),
        ("image/png;q=0, */*", "jpeg"),
        ("image/*;q=0, */*", "json"),
        ("*/*;q=0", None),
        ("image/png;q=0", None),
        ("*/*, image/*;q=0, application/*;q=0", "events"),
        ("image/webp, image/png;q=0.9", "webp"),
        ("image/png;q=0.1, */*;q=0.2", "jpeg"),  # RFC 9110: the more specific range sets png to 0.1
        ("application/json, text/plain, */*", "json"),  # what axios sends
        # Browsers name all that they can show: Chrome of an <img>, of a page, Firefox of an <img>, and without PNG
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "png"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8", "png"),
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "png"),
        ("image/avif,image/webp", "webp"),
        ("image/avif,image/webp,image/png;q=0,*/*;q=0.8", "webp"),
        ("image/avif,application/json,*/*;q=0.8", "json"),
        ("image/webp,*/*;q=0.1", "webp"),
        ("application/octet-stream", "png"),  # clients without support for images
        ("application/octet-stream;q=0.5, application/json", "json"),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "jpeg"),  # Java
        ("text/html,application/xhtml+xml", None),
        ("image/webp,image/png", "webp"),
        ("application/json; charset=utf-8", "json"),
        ('image/webp;x="a,b;q=0", image/png;q=0.5', "webp"),
        ('image/webp;x="\\",image/png", image/jpeg;q=0.1', "webp"),
        ("image/webp ; q=0.5 , image/jpeg ; Q=0.6", "jpeg"),
        ("image/webp;q=x, image/jpeg;q=0.1", "jpeg"),
        ("image/webp;q=nan", None),
        ("image/webp;q=-1", None),
        ("image/webp;q=5, image/png", "webp"),
        ("image/webp;q=0.0001", "webp"),
        ("image/webp;q=0.000", None),
        (",,;;, ,image/webp,", "webp"),
        ("imagé/png", None),
        ("/", None),
        ("image/", None),
        ("*/png", None),
    ],
)
def test_known_headers(accept, expected):
    assert chosen(*([] if accept is None else [accept])) == expected


def test_the_parameter_wins_and_headers_add_up():
    assert chosen("image/webp", requested="png") == "png"
    assert chosen("text/html", "image/webp") == "webp"
    assert chosen("text/event-stream", offered=ANSWERS) is None


KINDS = {media.split("/")[0] + "/*" for media in OFFERED}
ranges = st.sampled_from([*OFFERED, *sorted(KINDS), "*/*", "text/html", "video/*"])
weights = st.integers(0, 1000)
entries = st.lists(st.tuples(ranges, weights), min_size=1, max_size=6, unique_by=lambda entry: entry[0])


def written(entries):
    return ", ".join(f"{media};q={weight / 1000:.3f}" for media, weight in entries)


def weight_of(media, entries):
    """The weight of a media type by RFC 9110, in the plainest way."""
    given = dict(entries)
    for name in (media, media.split("/")[0] + "/*", "*/*"):
        if name in given:
            return given[name]
    return 0


@given(entries)
def test_the_choice_has_the_highest_weight(entries):
    weights_of = {name: weight_of(media, entries) for media, name in OFFERED.items()}
    choice = chosen(written(entries))
    assert (choice is None) == (max(weights_of.values()) == 0)
    assert choice is None or weights_of[choice] == max(weights_of.values())


@given(entries, st.randoms(use_true_random=False))
def test_only_types_of_equal_weight_depend_on_the_order(entries, random):
    shuffled = random.sample(entries, len(entries))
    one, other = chosen(written(entries)), chosen(written(shuffled))
    weights_of = {name: weight_of(media, entries) for media, name in OFFERED.items()}
    assert one == other or weights_of[one] == weights_of[other]


@given(entries, st.integers(0, 6))
def test_headers_may_be_split(entries, place):
    parts = [written(part) for part in (entries[:place], entries[place:]) if part]
    assert chosen(*parts) == chosen(written(entries))


@given(st.text(st.characters(max_codepoint=255)) | st.text(st.sampled_from('image/png*,;q=01."\\ '), max_size=60))
@example('"' * 100)
@example("\\" * 100)
def test_garbage_gives_an_offered_type_or_406(accept):
    assert chosen(accept) in {*OFFERED.values(), None}


@pytest.mark.parametrize("piece", ['"', '\\"', '"\\', ",", ";", "image/png,", "q=", ";q=0.1", "*/*,"])
def test_long_headers_are_quick(piece):
    began = time.process_time()
    chosen(piece * (60_000 // len(piece)))
    assert time.process_time() - began < 1
