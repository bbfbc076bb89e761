"""The classes of a model: each has an index, a name in any script and perhaps a wnid, and is found by any of these.

A text names a class by, in this order, its index, its wnid, its name letter by letter, its name without differences of
case and width, the words of its name, those without accents, and the beginnings of some words. The first of these that
any class has decides; where several classes have it, the text is ambiguous and refused. An index comes first, so that
every class can be named: a class called "7" that is not number 7 is named by its own index.
"""

import csv
import difflib
import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import resources
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsd_serve.config import ModelConfig
from dsd_serve.errors import InputError, shown

MAX_TEXT = 200  # characters of the name of a class in a request
LIKELY = 16  # candidates that a misspelling is compared with letter by letter
LISTED = 12  # classes in a sentence
MAX_LABEL = 2**31 - 1  # of a number that names a class
LAST = "\U0010ffff"  # after every character of a word
GOLDEN_RETRIEVER, GOLDFISH = 207, 1  # the examples of ImageNet-1k


@dataclass(frozen=True, slots=True)
class ImageClass:
    """One class: `index` is its label, `wnid` its WordNet id like n02099601 or "", `name` like Golden Retriever."""

    index: int
    wnid: str
    name: str

    def to_dict(self) -> dict[str, Any]:
        """As in answers and in the settings of an image; a class without a wnid has no key for it."""
        return {"index": self.index, **({"wnid": self.wnid} if self.wnid else {}), "name": self.name}


@cache
def all_classes() -> tuple[ImageClass, ...]:
    """The 1000 classes of ImageNet-1k in the order of their index."""
    text = resources.files("dsd_serve").joinpath("imagenet1k.csv").read_text(encoding="utf-8")
    return tuple(ImageClass(int(row["index"]), row["wnid"], row["name"]) for row in csv.DictReader(text.splitlines()))


class ClassTable:
    """The classes of a model, and those of them that it was trained on: only these can be drawn.

    is_imagenet: the indices are the labels of ImageNet-1k. Lookups take milliseconds for 100,000 classes; `prepare`
    builds their indices, which takes seconds then.
    """

    def __init__(self, classes: Iterable[ImageClass], trained: Iterable[int], is_imagenet: bool = False) -> None:
        self.classes = tuple(classes)
        self.trained = tuple(self.classes[index] for index in trained)
        self.is_imagenet = is_imagenet
        self.labels = np.array([c.index for c in self.trained], np.int64)
        self.drawable = frozenset(c.index for c in self.trained)

    # What sentences and examples say.

    @property
    def kinds(self) -> tuple[str, ...]:
        """The ways to name a class of this model."""
        named = self.classes[GOLDEN_RETRIEVER : GOLDEN_RETRIEVER + 1] if self.is_imagenet else self.trained
        wnid = next((c.wnid for c in named if c.wnid), "")
        return ("an index", f"a wnid like {wnid}", "a name") if wnid else ("an index", "a name")

    @property
    def rule(self) -> str:
        """What a class must be: an index, a wnid like n02099601 or a name."""
        *kinds, last = self.kinds
        return f"{', '.join(kinds)} or {last}"

    @cached_property
    def example(self) -> ImageClass | None:
        """A class to begin with; None if there is none."""
        return self.preferred(GOLDEN_RETRIEVER, 0)

    @cached_property
    def other_example(self) -> ImageClass | None:
        """A second one, or the same if there is only one."""
        return self.preferred(GOLDFISH, -1)

    def preferred(self, label: int, position: int) -> ImageClass | None:
        if self.is_imagenet and label in self.drawable:
            return self.classes[label]
        return self.trained[position] if self.trained else None

    @cached_property
    def warning(self) -> str:
        """A sentence about names that are read as the index or the wnid of another class; empty if there are none."""
        taken = [c for c in self.trained if any(other.index != c.index for other in self.coded(c.name))]
        if not taken:
            return ""
        return f"these names are an index or a wnid of another class, so give the index for {listed(taken)}"

    @cached_property
    def has_wnids(self) -> bool:
        return any(c.wnid for c in self.trained)

    # Lookup.

    def prepare(self) -> None:
        """Build all indices now, so that the first request does not wait for them."""
        _ = self.by_wnid, self.by_text, self.by_name, self.beginnings, self.letters, self.warning

    @cached_property
    def by_wnid(self) -> dict[str, list[ImageClass]]:
        return grouped((c.wnid.lower(), c) for c in self.classes if c.wnid)

    @cached_property
    def by_text(self) -> dict[str, list[ImageClass]]:
        """By name, letter by letter."""
        return grouped((c.name, c) for c in self.classes)

    @cached_property
    def by_name(self) -> dict[str | tuple[str, ...], list[ImageClass]]:
        """By name, by its words, and by its words without accents."""
        return grouped((key, c) for c in self.classes for key in dict.fromkeys(keys(c.name)))

    @cached_property
    def beginnings(self) -> "Postings":
        """The words of names, without accents."""
        return Postings(without_accents(words(spelled(c.name))) for c in self.classes)

    @cached_property
    def letters(self) -> "Postings":
        """The pairs of adjacent letters of names."""
        return Postings(pairs_of(spelled(c.name)) for c in self.classes)

    def search(self, query: str, trained: bool = True) -> list[ImageClass]:
        """The classes that `query` names: exact matches first, then names with all its words.

        A word matches the beginning of one in the name. An empty query matches all classes; one of more than MAX_TEXT
        characters, or without a letter or digit, matches no words. trained: only those that can be drawn.
        """
        if not query:
            return list(self.trained if trained else self.classes)
        exact = [c for c in self.exactly(query) if not trained or c.index in self.drawable]
        named = {c.index for c in exact}
        return exact + [c for c in self.partly(query, trained) if c.index not in named]

    def exactly(self, text: str) -> list[ImageClass]:
        """The classes of which `text` is the index, the wnid, the name or all words of the name, in their order.

        An index or a wnid is in ASCII; full-width or superscript digits are words.
        """
        if len(text) > MAX_TEXT:
            return []
        if found := self.coded(text) or self.by_text.get(text.strip()):
            return found
        return next((self.by_name[key] for key in keys(text) if key in self.by_name), [])

    def coded(self, text: str) -> list[ImageClass]:
        """The classes of which `text` is the index, or else the wnid."""
        text = text.strip().lower()
        if re.fullmatch("0|[1-9][0-9]{0,8}", text) and int(text) < len(self.classes):
            return [self.classes[int(text)]]
        return self.by_wnid.get(text, [])

    def partly(self, text: str, trained: bool = True) -> list[ImageClass]:
        """The classes whose names have, for each word of `text`, a word that begins with it."""
        queries = set(without_accents(words(spelled(text)))) if len(text) <= MAX_TEXT else ()
        if not queries:
            return []
        matches = np.ones(len(self.classes), bool)
        for query in queries:
            found = np.zeros(len(self.classes), bool)
            found[self.beginnings.starting(query)] = True
            matches &= found
        return [self.classes[i] for i in np.flatnonzero(matches) if not trained or int(i) in self.drawable]

    def find(self, name: object, what: str = "class") -> ImageClass:
        """`resolve` for an index or a text of any origin. Raises InputError for any name if there are no classes."""
        if not self.classes:
            raise InputError(f"{what} must be left out: this model has no classes, got {shown(name)}", what)
        if not isinstance(name, str) and (type(name) is not int or abs(name) > MAX_LABEL):
            raise InputError(f"{what} must be {self.rule}, got {shown(name)}", what)
        return self.resolve(str(name), what)

    def check_has_classes(self, name: str, guidance: float) -> None:
        """Raises InputError for a guidance scale other than 1 if there are no classes to guide to. name: of it."""
        if not self.classes and guidance != 1:
            raise InputError(
                f"{name} must be 1 or left out: this model has no classes to guide to, got {shown(guidance)}", name
            )

    def resolve(self, text: str, what: str = "class") -> ImageClass:
        """The class that `text` names, which must be one that can be drawn.

        what: the name of the parameter. Raises InputError with a sentence that begins with it, and names candidates
        when the class is unknown, ambiguous or was not trained.
        """
        if len(text) > MAX_TEXT:
            raise InputError(f"{what} must have at most {MAX_TEXT} characters, got {len(text):,}: {shown(text)}", what)
        text = text.strip()
        exact = self.exactly(text)
        usable = [c for c in exact if c.index in self.drawable]
        if not exact and text:
            usable = self.partly(text)
        if len(usable) == 1:
            return usable[0]
        if len(usable) > 1:
            raise InputError(f"{what} {shown(text)} is ambiguous: it may mean {listed(usable)}; give the index", what)
        if exact:
            raise InputError(
                f"{what} {shown(text)} is {exact[0].name}, which this model was not trained on; {self.offer()}", what
            )
        close = self.nearest(text)
        hint = f"did you mean {listed(close)}?" if close else self.offer()
        raise InputError(f"{what} must be {self.rule}, got {shown(text)}; {hint}", what)

    def nearest(self, text: str) -> list[ImageClass]:
        """Up to three classes whose names are similar to `text`, the most similar first."""
        whole, shared = spelled(text), np.zeros(len(self.classes), np.int16)
        for pair in pairs_of(whole):
            shared[self.letters.starting(pair)] += 1
        most = np.argsort(-shared[self.labels], kind="stable")[:LIKELY]
        likely = [(spelled(self.trained[i].name), self.trained[i]) for i in most]
        close = difflib.get_close_matches(whole, [name for name, _ in likely], n=3)
        return [c for found in dict.fromkeys(close) for name, c in likely if name == found]

    def offer(self) -> str:
        """A part of a sentence: the classes that the model can draw."""
        if len(self.trained) > LISTED:
            return f"the model has {len(self.trained)} classes, see /classes"
        return f"the model has {listed(self.trained)}"


@lru_cache(maxsize=8)
def table_of(config: ModelConfig) -> ClassTable:
    """The table of a model's classes; that of ImageNet-1k if the model does not name its own."""
    if not config.class_names:
        return ClassTable(all_classes()[: config.num_classes], config.trained_classes, config.num_classes > 0)
    wnids = config.class_wnids or ("",) * config.num_classes
    named = zip(range(config.num_classes), wnids, config.class_names, strict=True)
    return ClassTable((ImageClass(*values) for values in named), config.trained_classes)


class Postings:
    """Texts and the classes that have them, sorted, so that the classes of all texts with one beginning are a slice."""

    def __init__(self, texts_of: Iterable[Iterable[str]]) -> None:
        found = grouped((text, index) for index, texts in enumerate(texts_of) for text in set(texts))
        self.texts = sorted(found)
        self.starts = np.cumsum([0, *(len(found[text]) for text in self.texts)])
        self.classes = np.fromiter(chain.from_iterable(found[text] for text in self.texts), np.int32)

    def starting(self, text: str) -> NDArray[np.int32]:
        """The indices of the classes with a text that begins with `text`."""
        first, last = bisect_left(self.texts, text), bisect_left(self.texts, text + LAST)
        return self.classes[self.starts[first] : self.starts[last]]


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """The values of each key, in order."""
    found: defaultdict[Any, list[Any]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return dict(found)


def listed(classes: Sequence[ImageClass]) -> str:
    names = ", ".join(f"{c.index} ({c.name})" for c in classes[:LISTED])
    return names if len(classes) <= LISTED else f"{names} and {len(classes) - LISTED} more"


def keys(name: str) -> tuple[str | tuple[str, ...], ...]:
    """The keys under which a name is looked up, from the strictest to the loosest; none is empty."""
    whole = spelled(name)
    found = words(whole)
    return tuple(key for key in (whole, found, without_accents(found)) if key)


def spelled(text: str) -> str:
    """A text without differences of case, width, invisible characters and spaces.

    Any script is kept (NFKC, case folded).
    """
    if text.isascii():
        return " ".join(text.casefold().split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(c for c in folded if not is_invisible(c)).split())


def is_invisible(character: str) -> bool:
    """Format characters and variation selectors, which keyboards add to emoji or leave out."""
    return unicodedata.category(character) == "Cf" or character in VARIATION_SELECTORS


VARIATION_SELECTORS = frozenset(map(chr, chain(range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))))


def words(whole: str) -> tuple[str, ...]:
    """The words of a `spelled` text in any script: runs of letters, digits and the marks on them."""
    if whole.isascii():
        return tuple(re.findall("[A-Za-z0-9]+", whole))
    runs = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in whole).split()
    return tuple(run for run in runs if any(unicodedata.category(c)[0] != "M" for c in run))


def without_accents(found: Iterable[str]) -> tuple[str, ...]:
    """Words without the accents of European scripts; vowel signs of other scripts stay, because they are letters."""
    return tuple(
        word
        if word.isascii()
        else unicodedata.normalize("NFC", "".join(c for c in unicodedata.normalize("NFD", word) if not is_accent(c)))
        for word in found
    )


def is_accent(character: str) -> bool:
    return "\u0300" <= character <= "\u036f"


def pairs_of(text: str) -> frozenset[str]:
    return frozenset(map("".join, pairwise(text)))
