"""The classes of a data set: the names of its labels, and the label that a name means."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsd_serve.config import IMAGENET_CLASSES, MOST, MOST_NAME
from dsd_serve.errors import CheckpointError, ConfigError, shown
from dsd_serve.labels import all_classes

SHOWN = 8  # classes that a sentence names, at most


@dataclass(frozen=True)
class ClassNames:
    """The classes that labels number: ImageNet-1k's, a set's own, or none.

    num_classes: 0 for images without classes, whose label is 0, the null label. names: by label; empty for labels of
    ImageNet-1k and for images without classes.
    """

    num_classes: int
    names: tuple[str, ...] = ()

    def name(self, label: int) -> str:
        """The name of a label, as sentences show it."""
        if self == IMAGENET:
            return f"{label} ({all_classes()[label].name})"
        return self.names[label] if self.names else "no class"

    @cached_property
    def by_name(self) -> dict[str, list[int]]:
        """The labels by name as `folded`; ImageNet's by wnid too."""
        found: dict[str, list[int]] = {}
        if self == IMAGENET:
            for c in all_classes():
                for key in (c.wnid, folded(c.name)):
                    found.setdefault(key, []).append(c.index)
        for label, name in enumerate(self.names):
            found.setdefault(folded(name), []).append(label)
        return found

    def labels_of(self, name: str) -> list[int]:
        """The labels that a name means: the one of exactly this name, else those that differ in case or width."""
        exact = unicodedata.normalize("NFC", name)
        return [self.names.index(exact)] if exact in self.names else self.by_name.get(folded(name), [])

    def find(self, selector: int | str, key: str) -> int:
        """The label of a class, given as a label, a name or a wnid. Raises ConfigError, which begins with `key`."""
        if isinstance(selector, int):
            if not 0 <= selector < self.num_classes:
                limits = f"0 to {self.num_classes - 1}" if self.num_classes else "none: these images have no classes"
                raise ConfigError(f"{key}: the labels are {limits}, got {selector}")
            return selector
        found = self.labels_of(selector)
        if not found and selector.isascii() and selector.isdecimal() and int(selector) < self.num_classes:
            return int(selector)
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise ConfigError(f"{key}: {shown(selector)} may mean the labels {several}; give the number")
        if not found:
            raise ConfigError(f"{key}: there is no class {shown(selector)}; {self.summary()}")
        return found[0]

    def summary(self) -> str:
        """A part of a sentence: the classes there are."""
        if self == IMAGENET:
            return "the classes are those of ImageNet-1k"
        return f"the classes are {some(self.names)}" if self.names else "these images have no classes"

    def onto(self, other: "ClassNames") -> NDArray[np.int64]:
        """For each label of this table the one of the same name in another, or -1: int64 [max(num_classes, 1)].

        Every label becomes the null label where the other table has no classes.
        """
        count = max(self.num_classes, 1)
        if self == other:
            return np.arange(count)
        if not other.num_classes:
            return np.zeros(count, np.int64)
        mapped = np.full(count, -1, np.int64)
        for name, labels in (self.by_name if self == IMAGENET else {n: [i] for i, n in enumerate(self.names)}).items():
            targets = other.labels_of(name)
            if len(labels) == len(targets) == 1:
                mapped[labels[0]] = targets[0]
        return mapped


IMAGENET = ClassNames(IMAGENET_CLASSES)
NO_CLASSES = ClassNames(0)


def folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def clean(name: str) -> str:
    """A name as it is stored: composed characters (macOS writes decomposed ones), no spaces around it."""
    return unicodedata.normalize("NFC", name).strip()


def some(names: Sequence[str]) -> str:
    """Names for a sentence: a few, then a count."""
    listed = ", ".join(shown(name)[1:-1] for name in names[:SHOWN])
    return listed if len(names) <= SHOWN else f"{listed} and {len(names) - SHOWN} more"


def table_of(names: Sequence[str], rule: str, place: str) -> tuple[ClassNames, NDArray[np.int64]]:
    """The table of some names, and the label of each in it: int64 [len(names)].

    rule: data.labels. "auto": the classes are ImageNet-1k's if every name is a wnid or a label of it, or the names are
    its thousand in order; else they are the set's own, in this order. Raises CheckpointError for names that cannot be
    those of classes. place: of the images, for sentences.
    """
    if rule == "none" or not names:
        return NO_CLASSES, np.zeros(len(names), np.int64)
    cleaned = [clean(name) for name in names]
    if rule != "own":
        wnids = {c.wnid: c.index for c in all_classes()}
        labels = [wnids.get(name, imagenet_label(name)) for name in cleaned]
        if None not in labels:
            return IMAGENET, np.array(labels, np.int64)
        if are_imagenet(cleaned):
            return IMAGENET, np.arange(len(names))
        if rule == "imagenet":
            wrong = cleaned[labels.index(None)]
            raise CheckpointError(
                f"{place}: a class must be named by a wnid like n02099601 or by a label like 207, got {shown(wrong)}; "
                "data.labels=own takes the names as they are"
            )
    check_names(cleaned, place)
    return ClassNames(len(cleaned), tuple(cleaned)), np.arange(len(cleaned))


def imagenet_label(name: str) -> int | None:
    is_label = name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < IMAGENET_CLASSES
    return int(name) if is_label else None


def are_imagenet(names: Sequence[str]) -> bool:
    """Whether these are the names of ImageNet-1k's classes in their order, in some spelling (tench, Tinca tinca)."""
    if len(names) != IMAGENET_CLASSES:
        return False
    same = [
        folded(c.name) in {part.strip() for part in folded(name).split(",")}
        for c, name in zip(all_classes(), names, strict=True)
    ]
    return sum(same) > IMAGENET_CLASSES / 2


def check_names(names: Sequence[str], place: str) -> None:
    """Raises CheckpointError for names that are too long, not text or not different."""
    if len(names) > MOST["num_classes"]:
        raise CheckpointError(f"{place} has {len(names):,} classes; at most {MOST['num_classes']:,} are allowed")
    seen: set[str] = set()
    for name in names:
        if not 1 <= len(name) <= MOST_NAME:
            raise CheckpointError(
                f"{place}: the name of a class must have 1 to {MOST_NAME} characters, got {len(name)}: {shown(name)}"
            )
        if not name.isprintable():
            raise CheckpointError(
                f"{place}: the name of a class must be text without control characters, got {shown(name)}"
            )
        if name in seen:
            raise CheckpointError(
                f"{place} has two classes named {shown(name)}, which differ only in spaces around the name or in how "
                "its characters are composed; rename or merge them"
            )
        seen.add(name)
