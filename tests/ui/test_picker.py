"""The search for classes, their tiles, and the chips of the chosen ones."""

from types import SimpleNamespace

import pytest

from dsd_serve.labels import all_classes
from ui import picker
from ui.server_info import ServerInfo
from ui.tiles import tiles_of

CLASSES = [one.to_dict() for one in all_classes()]
SHA = "0" * 64


def names(text):
    return [one["name"] for one in picker.search(CLASSES, text)]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("207", "Golden Retriever"),
        ("n02099601", "Golden Retriever"),
        ("retriever", "Flat-Coated Retriever"),
        ("GOLD", "goldfish"),
        ("tterfl", "monarch butterfly"),
        ("coffee", "coffee mug"),
        ("mountain", "Bernese Mountain Dog"),
    ],
)
def test_the_best_match_is_first(text, first):
    assert first in names(text)[:3]


@pytest.mark.parametrize("text", ["%", "كلب", "<b>", "no such thing", "' or 1=1"])
def test_other_texts_find_nothing(text):
    assert names(text) == []


def test_kinds_find_their_classes():
    assert {"Golden Retriever", "Chihuahua"} <= set(names("dog"))
    assert {"Golden Retriever", "Chihuahua"} <= set(names("dogs"))
    assert {"tench", "goldfish"} <= set(names("fish"))
    assert {"alp", "volcano"} <= set(names("mountain"))
    assert "espresso" in names("coffee")
    assert "monarch butterfly" in names("butterflies")
    assert len(names("")) == 1000


def info(classes, **model):
    images = {"columns": 2, "per_class": 1, "sha256": SHA}
    facts = {"name": "m", "fingerprint": SHA, "classes": [one["index"] for one in classes], "class_images": images}
    known = ServerInfo(SimpleNamespace(chosen=SimpleNamespace(current="")), None)
    known.facts[""] = SimpleNamespace(model={**facts, "image_size": 32, **model}, classes=classes)
    return known


def test_tiles_are_where_the_server_says():
    tiles = tiles_of({"class_images": {"columns": 2, "per_class": 2, "sha256": SHA}, "classes": [5, 7, 9]}, "a b")
    assert tiles.url == "studio/classes.webp?model=a+b&amp;version=0000000000000000"
    assert (tiles.columns, tiles.rows) == (2, 3)
    # Of 128 x 192 pixels a square of 62 is shown, 1 from the edge of its tile: 65 of 66, 65 and 129 of 130 are free.
    assert "background-position:1.515% 0.769%" in tiles.tile(5)
    assert "background-position:98.485% 0.769%" in tiles.tile(5, 1)
    assert "background-position:1.515% 99.231%" in tiles.tile(9)
    assert tiles_of({"class_images": None}, "") is None
    assert tiles_of({}, "") is None  # of an earlier version


def test_the_grid_needs_no_drawing_with_tiles_and_little_without():
    assert picker.grid(info(CLASSES[:200]), CLASSES[:200]).count('class="tile"') == 200
    without = picker.grid(info(CLASSES[:200], class_images=None), CLASSES[:200])
    assert without.count("<img loading") == picker.MAX_DRAWN
    assert "176 more" in without


def test_names_are_escaped_everywhere():
    evil = [{"index": 0, "name": "<img src=x onerror=alert(1)>"}]
    here = info(evil)
    for html in (picker.grid(here, evil), picker.chips(here, [0]), picker.wall(here)):
        assert "<img src=x" not in html


def press(here, chosen, act, value):
    return picker.choose(here, chosen, SimpleNamespace(_data={"act": act, "value": value}))[1]


def test_a_press_switches_and_the_last_class_stays():
    here, chosen = info(CLASSES[:30]), [0]
    press(here, chosen, "add", 1)
    press(here, chosen, "add", 2)
    assert chosen == [0, 1, 2]
    press(here, chosen, "remove", 0)
    assert chosen == [1, 2]
    press(here, chosen, "only", 5)
    assert chosen == [5]
    press(here, chosen, "remove", 5)
    assert chosen == [5]


def test_the_number_of_chosen_classes_is_limited():
    here, chosen = info(CLASSES[:30]), [0]
    for index in range(1, picker.MAX_CHOSEN):
        press(here, chosen, "add", index)
    words = press(here, chosen, "add", picker.MAX_CHOSEN)
    assert chosen == list(range(picker.MAX_CHOSEN))
    assert f"at most {picker.MAX_CHOSEN} classes" in words
    press(here, chosen, "add", 3)
    assert 3 not in chosen
