"""The choice of classes on Generate: search, a grid of their images, and the chosen ones, which can be removed.

A press on an image switches to its class; its + adds the class to the chosen ones, as a press with Shift or Ctrl does.
"""

import json
from collections.abc import Collection, Sequence
from html import escape
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from dsd_serve.labels import spelled, without_accents
from ui import html
from ui.class_words import words_for
from ui.server_info import NO_CLASS, ServerInfo
from ui.tiles import tiles_of
from ui.values import number_of, pressed

MAX_DRAWN = 24  # classes in the grid whose images are drawn when they come into view
MAX_TILES = 300  # if their images are in one file
MAX_CHOSEN = 16  # classes
MAX_WALL = 60  # images that a page shows before anything is drawn
MAX_WORDS = 200  # characters of a search


def search(classes: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The classes that a text names: by index, wnid or a part of the name; then those that are of such a kind, as
    "dog". An empty text names all."""
    query = spelled((text or "")[:MAX_WORDS])
    if not query:
        return list(classes) if not (text or "").strip() else []
    parts = without_accents(tuple(query.split()))

    def rank(one: dict[str, Any]) -> int:
        """0 for an exact match, 1 where words begin so, 2 for parts of words, 3 for a kind; 4 for no match."""
        name = " ".join(without_accents(tuple(spelled(one["name"]).split())))
        if query in (str(one["index"]), one.get("wnid"), spelled(one["name"])):
            return 0
        if all(f" {part}" in f" {name}" for part in parts):
            return 1
        if all(part in name for part in parts):
            return 2
        kinds = words_for(one.get("wnid") or "")
        return 3 if all(any(singular(part) == kind or part in name for kind in kinds) for part in parts) else 4

    ranks = [rank(one) for one in classes]
    return [one for wanted in range(4) for one, found in zip(classes, ranks, strict=True) if found == wanted]


def singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def grid(info: ServerInfo, classes: Sequence[dict[str, Any]]) -> str:
    """Buttons for classes, each with an image. The page's script marks the chosen ones."""
    if not classes:
        example = f", such as {info.search_example}" if info.search_example else ""
        return html.hint("No such class", f"Try part of its name{example}.")
    tiles = tiles_of(info.model, info.client.chosen.current)
    most = MAX_TILES if tiles else MAX_DRAWN
    shown = "".join(
        class_button(one, tiles.tile(one["index"]) if tiles and one["index"] in tiles.places else drawn(info, one))
        for one in classes[:most]
    )
    more = f'<p class="line">{len(classes) - most} more: search by name.</p>' if len(classes) > most else ""
    style = f' style="{tiles.style}"' if tiles else ""
    return f'<div class="picker" role="group" aria-label="Classes"{style}>{shown}</div>{more}'


def class_button(one: dict[str, Any], image: str) -> str:
    index, name = int(one["index"]), escape(one["name"])
    return (
        f'<div class="class"><button type="button" class="only" data-act="only" data-more="add" data-value="{index}" '
        f'aria-pressed="false" title="{name}, {index}">{image}<span class="name">{name}</span></button>'
        f'<button type="button" class="more" tabindex="-1" data-act="add" data-value="{index}" '
        f'aria-label="Add {name}" title="Add to the chosen classes">+</button></div>'
    )


def drawn(info: ServerInfo, one: dict[str, Any]) -> str:
    """An image that the server draws when it comes into view."""
    version = {"version": str(info.model.get("fingerprint", ""))[:12]}
    name = info.client.chosen.current
    query = escape(urlencode({"model": name, **version} if name else version))
    return f'<img loading="lazy" alt="" src="studio/class/{int(one["index"])}.png?{query}">'


def chips(info: ServerInfo, chosen: Collection[int], error: str = "") -> str:
    """The chosen classes; all but the last one can be removed."""
    named = [index for index in chosen if index != NO_CLASS]
    remove = (
        '<button type="button" data-act="remove" data-value="{0}" aria-label="Remove {1}">×</button>'
        if len(named) > 1
        else ""
    )
    one_by_one = "".join(
        f'<span class="chip"><span class="name">{escape(info.name_of(index))}</span>'
        f"{remove.format(index, escape(info.name_of(index)))}</span>"
        for index in named
    )
    kept = escape(json.dumps(list(chosen)))
    return (
        f'<div class="chips" role="group" aria-label="Chosen classes" data-chosen="{kept}">{one_by_one}</div>'
        f"{html.callout(error)}"
    )


def choose(info: ServerInfo, chosen: list[int], event: gr.EventData) -> tuple[list[int], str]:
    """Switch to a class, add or remove one; the last one stays. The list is changed in place and before anything is
    awaited, because the next press may come before this one ends."""
    one = number_of(event, {one["index"] for one in info.classes}.union(chosen))
    act, others = pressed(event).get("act"), [index for index in chosen if index != one]
    if act == "only":
        chosen[:] = [one]
    elif one in chosen:
        chosen[:] = others or [one]
    elif len(chosen) >= MAX_CHOSEN:
        return chosen, chips(info, chosen, f"at most {MAX_CHOSEN} classes can be drawn at once: remove one first")
    else:
        chosen[:] = [*others, one]
    return chosen, chips(info, chosen)


def wall(info: ServerInfo) -> str:
    """What Generate shows before anything is drawn: images of many classes, if the server has them ready."""
    tiles = tiles_of(info.model, info.client.chosen.current)
    if tiles is None:
        return html.hint("Nothing drawn yet", "Press Generate to draw.")
    labels = [one["index"] for one in info.classes if one["index"] in tiles.places]
    every = [(label, number) for number in range(tiles.per_class) for label in labels]
    shown = [every[i * len(every) // MAX_WALL] for i in range(MAX_WALL)] if len(every) > MAX_WALL else every
    images = "".join(
        f'<button type="button" data-act="only" data-value="{label}" aria-label="Draw {escape(info.name_of(label))}" '
        f'title="{escape(info.name_of(label))}">{tiles.tile(label, number)}</button>'
        for label, number in shown
    )
    return (
        f'<section class="wall" aria-label="Images of this model"><div class="images" style="{tiles.style}">{images}'
        f"</div><p>{about(info)} Press an image to draw more of its class.</p></section>"
    )


def about(info: ServerInfo) -> str:
    """Why the images are soft."""
    size, weights = info.model["image_size"], info.model.get("parameters")
    millions = f"{weights / 1e6:.1f} million parameters" if weights else "one network"
    small = ", then enlarged: they are meant to look soft at this size" if size <= 64 else ""
    return f"Drawn by a network of {millions} at {size} x {size} pixels{small}."
