"""The model that a visitor chooses: which calls request it, and how many choices are kept."""

import contextvars

import numpy as np

from dsd_serve import calls
from ui.chosen_model import MAX_CHOICES, VISITOR, ChosenModels, for_model


def test_where_a_call_names_its_model():
    in_json = [calls.generate_events(1, seed=2), calls.interpolate({"seed": 1}, {"seed": 2})]
    in_query = [
        calls.edit_json(b"image", class_=1),
        calls.interpolate_images(b"a", b"b"),
        calls.encode(b"image"),
        calls.decode(np.zeros((4, 8), np.float32)),
        calls.model(),
        calls.classes("dog"),
    ]
    for call in in_json:
        assert for_model(call, "b").arguments["json"] == {**call.arguments["json"], "model": "b"}
    for call in in_query:
        named = for_model(call, "b")
        assert named.arguments["params"] == {**call.arguments.get("params", {}), "model": "b"}
        assert "json" not in named.arguments
    for call in (calls.batcher(), calls.checkpoints(), calls.checkpoint(3), calls.models()):
        assert for_model(call, "b") is call
    assert for_model(in_json[0], "") is in_json[0]


def test_choices_belong_to_their_visitors_and_are_bounded():
    chosen = ChosenModels()

    def as_visitor(name, act):
        def run():
            VISITOR.set(name)
            return act()

        return contextvars.copy_context().run(run)

    as_visitor("one", lambda: chosen.choose("b"))
    assert as_visitor("one", lambda: chosen.current) == "b"
    assert as_visitor("two", lambda: chosen.current) == ""
    for number in range(MAX_CHOICES):
        as_visitor(f"visitor {number}", lambda: chosen.choose("a"))
    assert len(chosen.by_visitor) == MAX_CHOICES
    assert as_visitor("one", lambda: chosen.current) == ""
    as_visitor("visitor 5", chosen.forget)
    assert as_visitor("visitor 5", lambda: chosen.current) == ""
