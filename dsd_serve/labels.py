"""ImageNet-1k labels: index <-> wnid <-> name, and search."""

import csv
import difflib
import heapq
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise

from dsd_serve.errors import InputError, shown

MAX_TEXT = 200  # characters of the name of a class in a request
LIKELY = 16  # candidates that a misspelling is compared with letter by letter


@dataclass(frozen=True, slots=True)
class ImageClass:
    """One class: `index` 0 to 999 in ImageNet-1k order, `wnid` like n02099601, `name` like Golden Retriever."""

    index: int
    wnid: str
    name: str


@dataclass(frozen=True, slots=True)
class Spelling:
    """A class's name, prepared for comparison with the input of users."""

    whole: str
    words: tuple[str, ...]  # without accents
    pairs: frozenset[str]  # of adjacent letters


@cache
def all_classes() -> tuple[ImageClass, ...]:
    """The 1000 classes in the order of their index."""
    text = resources.files("dsd_serve").joinpath("imagenet1k.csv").read_text(encoding="utf-8")
    return tuple(ImageClass(int(row["index"]), row["wnid"], row["name"]) for row in csv.DictReader(text.splitlines()))


@cache
def spellings() -> tuple[Spelling, ...]:
    """The spelling of every class, in the order of their index."""
    found = []
    for c in all_classes():
        whole = spelled(c.name)
        found.append(Spelling(whole, without_accents(words(whole)), pairs_of(whole)))
    return tuple(found)


@cache
def by_code() -> dict[str, ImageClass]:
    """All classes by index and by wnid."""
    return {code: c for c in all_classes() for code in (str(c.index), c.wnid)}


@cache
def by_name() -> dict[str | tuple[str, ...], list[ImageClass]]:
    """All classes by name, by its words, and by its words without accents; some share a name."""
    found: dict[str | tuple[str, ...], list[ImageClass]] = {}
    for c in all_classes():
        for key in dict.fromkeys(keys(c.name)):
            found.setdefault(key, []).append(c)
    return found


def search(query: str, among: Iterable[int] | None = None) -> list[ImageClass]:
    """The classes whose index, wnid or name matches `query`: exact matches first, then names with all its words.

    A word matches the beginning of one in the name. An empty query matches all classes; one of more than MAX_TEXT
    characters, or without a letter or digit, matches none.
    """
    classes = [all_classes()[index] for index in (range(len(all_classes())) if among is None else among)]
    if not query:
        return classes
    exact = exactly(query)
    first = [c for c in classes if c in exact]
    return first + [c for c in partly(query, classes) if c not in first]


def partly(text: str, classes: Iterable[ImageClass]) -> list[ImageClass]:
    """The classes whose names have, for each word of `text`, a word that begins with it."""
    queries = set(without_accents(words(spelled(text)))) if len(text) <= MAX_TEXT else ()
    if not queries:
        return []
    names, rarest = spellings(), sorted(queries, key=len, reverse=True)
    return [c for c in classes if all(any(w.startswith(q) for w in names[c.index].words) for q in rarest)]


def exactly(text: str) -> list[ImageClass]:
    """The classes of which `text` is the index, the wnid, the name or all words of the name.

    An index or a wnid is in ASCII; full-width or superscript digits are words. Fast, because every request calls it.
    """
    if len(text) > MAX_TEXT:
        return []
    if found := by_code().get(text.strip().lower()):
        return [found]
    return next((by_name()[key] for key in keys(text) if key in by_name()), [])


def resolve(text: str, among: Sequence[int], what: str = "class") -> ImageClass:
    """The class that `text` names: an index, a wnid or a name, which must be one of `among`.

    what: the name of the parameter. Raises InputError with a sentence that begins with it, and names candidates when
    the class is unknown, ambiguous or not among them.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"{what} must have at most {MAX_TEXT} characters, got {len(text):,}: {shown(text)}", what)
    text = text.strip()
    exact = exactly(text)
    allowed = set(among)
    usable = [c for c in exact if c.index in allowed]
    if not exact and text:
        usable = partly(text, [all_classes()[index] for index in among])
    if len(usable) == 1:
        return usable[0]
    if len(usable) > 1:
        raise InputError(f"{what} {shown(text)} is ambiguous: it may mean {listed(usable)}; give the index", what)
    if exact:
        raise InputError(
            f"{what} {shown(text)} is {exact[0].name}, which this model was not trained on; {offer(among)}",
            what,
        )
    close = nearest(text, among)
    hint = f"did you mean {listed(close)}?" if close else offer(among)
    raise InputError(f"{what} must be an index, a wnid like n02099601 or a name, got {shown(text)}; {hint}", what)


def nearest(text: str, among: Iterable[int]) -> list[ImageClass]:
    """Up to three classes whose names are similar to `text`, the most similar first."""
    names, whole = spellings(), spelled(text)
    pairs = pairs_of(whole)
    likely = heapq.nlargest(LIKELY, among, key=lambda index: len(pairs & names[index].pairs))
    close = difflib.get_close_matches(whole, [names[index].whole for index in likely], n=3)
    return [all_classes()[index] for name in dict.fromkeys(close) for index in likely if names[index].whole == name]


def offer(among: Sequence[int]) -> str:
    """A part of a sentence: the classes that a model can draw."""
    if len(among) > 12:
        return f"it knows {len(among)} classes, see /classes"
    return f"it knows {listed([all_classes()[index] for index in among])}"


def listed(classes: Sequence[ImageClass]) -> str:
    names = ", ".join(f"{c.index} ({c.name})" for c in classes[:12])
    return names if len(classes) <= 12 else f"{names} and {len(classes) - 12} more"


def keys(name: str) -> tuple[str | tuple[str, ...], ...]:
    """The keys under which a name is looked up, from the strictest to the loosest; none is empty."""
    whole = spelled(name)
    found = words(whole)
    return tuple(key for key in (whole, found, without_accents(found)) if key)


def spelled(text: str) -> str:
    """A text without differences of case, width, invisible characters and spaces.

    Any script is kept (NFKC, case folded).
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())


def words(whole: str) -> tuple[str, ...]:
    """The words of a `spelled` text in any script: runs of letters, digits and the marks on them."""
    return tuple("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in whole).split())


def without_accents(found: Iterable[str]) -> tuple[str, ...]:
    """Words without the accents of European scripts; vowel signs of other scripts stay, because they are letters."""
    return tuple(
        unicodedata.normalize("NFC", "".join(c for c in unicodedata.normalize("NFD", word) if not is_accent(c)))
        for word in found
    )


def is_accent(character: str) -> bool:
    return "\u0300" <= character <= "\u036f"


def pairs_of(text: str) -> frozenset[str]:
    return frozenset(map("".join, pairwise(text)))
