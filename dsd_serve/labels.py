"""ImageNet-1k labels: index <-> wnid <-> name, and search."""

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from dsd_serve.errors import InputError


@dataclass(frozen=True, slots=True)
class ImageClass:
    """One class: `index` 0 to 999 in ImageNet-1k order, `wnid` like n02099601, `name` like Golden Retriever."""

    index: int
    wnid: str
    name: str


@cache
def all_classes() -> tuple[ImageClass, ...]:
    """The 1000 classes in the order of their index."""
    text = resources.files("dsd_serve").joinpath("imagenet1k.csv").read_text(encoding="utf-8")
    return tuple(ImageClass(int(row["index"]), row["wnid"], row["name"]) for row in csv.DictReader(text.splitlines()))


def search(query: str, among: Sequence[int] | None = None) -> list[ImageClass]:
    """The classes whose index, wnid or name matches `query`: exact ones first, then names that hold all its words."""
    classes = all_classes() if among is None else [all_classes()[index] for index in among]
    wanted = words(query)
    if not wanted:
        return list(classes)
    exact = [c for c in exactly(query) if c in classes]
    partial = [c for c in classes if all(any(w.startswith(q) for w in words(c.name)) for q in wanted)]
    return exact + [c for c in partial if c not in exact]


def exactly(text: str) -> list[ImageClass]:
    """The classes of which `text` is the index, the wnid or all words of the name. Every request asks this."""
    found = [*by_key().get(text.strip().lower(), ()), *by_key().get(words(text), ())]
    return sorted(set(found), key=lambda c: c.index)


@cache
def by_key() -> dict[str | tuple[str, ...], list[ImageClass]]:
    """All classes by index, wnid and words of the name; some have the same name."""
    found: dict[str | tuple[str, ...], list[ImageClass]] = {}
    for c in all_classes():
        for key in (str(c.index), c.wnid, words(c.name)):
            found.setdefault(key, []).append(c)
    return found


def resolve(text: str, among: Sequence[int]) -> ImageClass:
    """The class that `text` names: an index, a wnid or a name, which must be one of `among`.

    Raises InputError with a sentence that names candidates when it is unknown, ambiguous or not among them.
    """
    text = str(text).strip()
    exact = exactly(text)
    allowed = set(among)
    usable = [c for c in exact if c.index in allowed]
    if not exact and text:
        usable = search(text, among)
    if len(usable) == 1:
        return usable[0]
    if len(usable) > 1:
        raise InputError(f"class {text!r} is ambiguous: it may mean {listed(usable)}; give the index")
    if exact:
        raise InputError(f"class {text!r} is {exact[0].name}, which this model was not trained on; {offer(among)}")
    return no_such_class(text, among)


def no_such_class(text: str, among: Sequence[int]) -> ImageClass:
    """Raise the InputError for a text that names no class, with the nearest names if there are any."""
    names = {c.name.lower(): c for c in (all_classes()[index] for index in among)}
    close = [names[name] for name in difflib.get_close_matches(text.lower(), names, n=3)]
    hint = f"did you mean {listed(close)}?" if close else offer(among)
    raise InputError(f"class must be an index, a wnid like n02099601 or a name, got {text[:80]!r}; {hint}")


def offer(among: Sequence[int]) -> str:
    """A sentence part that says what a model can draw."""
    if len(among) > 12:
        return f"it knows {len(among)} classes, see /classes"
    return f"it knows {listed([all_classes()[index] for index in among])}"


def listed(classes: Sequence[ImageClass]) -> str:
    shown = ", ".join(f"{c.index} ({c.name})" for c in classes[:12])
    return shown if len(classes) <= 12 else f"{shown} and {len(classes) - 12} more"


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))
