"""The state of the page when it is opened: from the browser's memory of an earlier visit, and from a link."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from dsd_serve.errors import InputError
from dsd_serve.params import API_NAMES
from ui import html, links
from ui.controls import Updates
from ui.finished import Finished
from ui.links import Link
from ui.picker import MAX_CHOSEN
from ui.requests import restored
from ui.server_info import ServerInfo
from ui.tabs import inside, walk
from ui.tabs.generate import GenerateTab, check_count
from ui.tabs.inside import InsideTab
from ui.tabs.photo import PhotoTab
from ui.tabs.walk import WalkTab
from ui.values import broken_rule

MAX_RESTORED = 160  # images of one place


@dataclass(frozen=True)
class Kept:
    """What a browser sends when it opens the page.

    link: of the address. values: of controls, by name. classes: the chosen ones. images: by the element that shows
    them, the id of each. classes_of: the mark of the classes for which its controls were fitted. opening: the number
    that it gives to this message. error: what is wrong with the link.
    """

    link: Link = field(default_factory=Link)
    values: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    images: Mapping[str, Any] = field(default_factory=dict)
    classes_of: str = ""
    opening: str = ""
    error: str = ""


def read(message: Any) -> Kept:
    """The message of the page's script (ui/memory.js); anything in it that is not as it should be is left out."""
    found = message if isinstance(message, dict) else {}
    values, images, classes = (found.get(name) for name in ("values", "images", "classes"))
    link, error = Link(), ""
    try:
        link = links.read(str(found.get("search") or ""))
    except InputError as wrong:
        error = f"this link cannot be opened: {wrong}"
    return Kept(
        link,
        values if isinstance(values, dict) else {},
        tuple(one for one in classes if type(one) is int)[:MAX_CHOSEN] if isinstance(classes, list) else (),
        images if isinstance(images, dict) else {},
        str(found.get("classes_of") or "")[:100],
        str(found.get("opening") or "")[:20],
        error,
    )


@dataclass(frozen=True)
class Opening:
    """Restores the tabs of a page."""

    info: ServerInfo
    generate: GenerateTab
    photo: PhotoTab
    walk: WalkTab
    inside: InsideTab

    @property
    def controls(self) -> dict[str, Any]:
        """The controls whose values the browser keeps, by name."""
        tabs: dict[str, Any] = {
            "generate": self.generate, "edit": self.photo.edit, "inpaint": self.photo.inpaint, "walk": self.walk,
            "way": self.inside,
        }  # fmt: skip
        return {f"{tab}.{name}": one for tab, of_tab in tabs.items() for name, one in of_tab.remembered.items()}

    @property
    def outputs(self) -> list[Any]:
        places = [
            self.generate.message,
            self.generate.chosen,
            self.generate.chips,
            self.generate.picker,
            self.generate.wanted,
        ]
        boards = [one for tab in (self.photo.edit, self.photo.inpaint) for one in (tab.board, tab.message)]
        return [*self.controls.values(), *places, *boards, self.walk.strip, self.walk.moving, self.inside.way]

    def updates(self, kept: Kept, fitted: Updates) -> Updates:
        """The page for what a browser remembers. fitted: the controls as they are for the chosen model."""
        kept = self.checked(kept)
        linked = self.linked(kept.link, fitted)
        values = self.values(kept, fitted | linked)
        return {**fitted, **linked, **values, **self.generated(kept), **self.images(kept)}

    def checked(self, kept: Kept) -> Kept:
        """Without the link, but with an error, if the chosen model cannot draw it."""
        link, known = kept.link, {one["index"] for one in self.info.classes}
        missing = [one for one in link.classes if one not in known]
        if missing:
            return replace(kept, link=Link(), error=f"this link cannot be opened: the model has no class {missing[0]}")
        most = self.info.model["limits"]["n"]
        if link.n > most:
            return replace(
                kept, link=Link(), error=f"this link cannot be opened: n must be at most {most}, got {link.n}"
            )
        return kept

    def linked(self, link: Link, fitted: Updates) -> Updates:
        """The controls of Generate with the settings of a link."""
        tab = self.generate
        controls = {"n": tab.n, "index": tab.index, "seed": tab.seed.number} | {
            API_NAMES[name]: control for name, control in vars(tab.sampling).items()
        }
        values = {"index": 0, **link.settings, "n": max(link.n, 1)} if link.draws else dict(link.settings)
        return {
            controls[name]: {**(fitted.get(controls[name]) or gr.update()), "value": value}
            for name, value in values.items()
        }

    def values(self, kept: Kept, fitted: Updates) -> Updates:
        """The controls with the values that the browser remembers; those that are impossible here are left out."""
        found = {}
        for name, control in self.controls.items():
            value = kept.values.get(name)
            if name in kept.values and not broken_rule(control, value) and offers(control, fitted.get(control), value):
                found[control] = {**(fitted.get(control) or gr.update()), "value": value}
        return found

    def generated(self, kept: Kept) -> Updates:
        """Generate for a link and the classes that were chosen."""
        tab, link, known = self.generate, kept.link, {one["index"] for one in self.info.classes}
        chosen = [one for one in (kept.classes or link.classes) if one in known] or [self.info.default_class]
        updates: Updates = {**tab.classes(self.info, chosen), tab.message: html.callout(kept.error)}
        return {**updates, tab.wanted: self.complete(link) if link.draws else None}

    def complete(self, link: Link) -> Link | None:
        """A link with all settings, from the model's recommendation where it has none; None if it is too much."""
        defaults = self.info.model["defaults"]
        settings = self.info.possible({**defaults, **link.settings})
        classes = link.classes if self.info.has_classes else ()
        named = classes or ((self.info.default_class,) if self.info.has_classes else ())
        n = max(link.n, 1)
        try:
            check_count(n, max(1, len(named)))
        except InputError:
            return None
        return Link(named, n, self.info.client.chosen.current, settings)

    def images(self, kept: Kept) -> Updates:
        """The images of the other tabs, as far as this process still has them."""
        found: Updates = {}
        for name, tab in (("edit", self.photo.edit), ("inpaint", self.photo.inpaint)):
            asked, images = self.kept_images(kept, f"{name}-board")
            if images:
                found[tab.board] = html.board(restored("", images), place=f"{name}-board")
            if len(images) < asked:
                sentence = "images are no longer on the server; the settings are kept: draw them again"
                found[tab.message] = html.callout(f"{asked - len(images)} of {asked} {sentence}")
        for place, label, control in (
            ("walk-strip", walk.LABEL, self.walk.strip), ("way", inside.LABEL, self.inside.way),
        ):  # fmt: skip
            asked, images = self.kept_images(kept, place)
            if images and len(images) == asked:
                found[control] = html.strip(images, label)
        _, images = self.kept_images(kept, "walk-animation")
        if images:
            found[self.walk.moving] = walk.animated(images[0])
        return found

    def kept_images(self, kept: Kept, place: str) -> tuple[int, list[Finished]]:
        """How many images a place had, and those that are kept."""
        ids = kept.images.get(place)
        ids = [one for one in ids if isinstance(one, str)][:MAX_RESTORED] if isinstance(ids, list) else []
        return len(ids), [image for one in ids if (image := self.info.images.get(one)) is not None]


def offers(control: Any, fitted: Any, value: Any) -> bool:
    """Whether a control has a value among its choices or in its range."""
    fitted = fitted if isinstance(fitted, dict) else {}
    if isinstance(control, gr.Dropdown | gr.Radio):
        choices = fitted.get("choices") or control.choices or []
        return value in [one[1] if isinstance(one, tuple | list) else one for one in choices]
    if isinstance(control, gr.Slider):
        return bool(control.minimum <= value <= fitted.get("maximum", control.maximum))
    return True


def mark_of(classes: list[dict[str, Any]]) -> str:
    """A short text that differs for other classes."""
    return hashlib.sha256(json.dumps(classes, sort_keys=True).encode()).hexdigest()[:16]
