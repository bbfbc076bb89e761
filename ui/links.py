"""Links: the settings of images as the query string of an address.

A seed gives the same bytes, so the link to an image is the image, on every server with the same model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from dsd_serve.errors import InputError, shown
from dsd_serve.params import SamplingParams, from_api, to_api

MAX_QUERY = 2000  # characters
MAX_CLASSES = 16
MAX_INDEX = 2**53 - 1  # of a class, a seed or an image: browsers know integers up to here
NAMES = tuple(to_api(SamplingParams()))
WHOLE = ("seed", "index", "steps")


@dataclass(frozen=True)
class Link:
    """Images to draw: n of each class, with settings by their API names. Whatever a link does not say is left out.

    classes: empty for a link that names none. n: 0 for one that has none. model: empty for the server's first.
    """

    classes: tuple[int, ...] = ()
    n: int = 0
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def draws(self) -> bool:
        """Whether it says which images: others only set the controls."""
        return "seed" in self.settings

    @property
    def first(self) -> "Link":
        """The link to the first image alone."""
        return replace(self, classes=self.classes[:1], n=1)

    @property
    def query(self) -> str:
        values: list[tuple[str, Any]] = [("class", ",".join(map(str, self.classes)))] if self.classes else []
        values += [("n", self.n)] if self.n > 1 else []
        values += [(name, plain(value)) for name, value in needed(self.settings).items()]
        values += [("model", self.model)] if self.model else []
        return urlencode(values, safe=",")


def needed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings that a request must contain, in order. Index 0 is left out, and the interval of guidance
    that is off; of other guidance it is needed, because a model may recommend another interval."""
    usual = {"index": 0} | ({"guidance_start": 0, "guidance_stop": 1} if settings.get("guidance") == 1 else {})
    return {name: settings[name] for name in NAMES if name in settings and usual.get(name) != settings[name]}


def query_of(settings: Mapping[str, Any], model: str = "") -> str:
    """The query string of one image with the settings of its file."""
    label = settings.get("class")
    return Link((int(label["index"]),) if label else (), 1, model, settings).query


def read(query: str) -> Link:
    """The link of a query string; parameters that are not a link's are ignored. Raises InputError."""
    if len(query) > MAX_QUERY:
        raise InputError(f"a link may have at most {MAX_QUERY} characters, this one has {len(query)}")
    given = dict(parse_qsl(query.removeprefix("?"), max_num_fields=50))
    settings: dict[str, Any] = {name: number(name, given[name]) for name in NAMES if name in given}
    from_api(settings, SamplingParams())  # checks ranges
    texts = given["class"].split(",") if "class" in given else []
    if len(texts) > MAX_CLASSES:
        raise InputError(f"a link may have at most {MAX_CLASSES} classes, this one has {len(texts)}")
    classes = tuple(dict.fromkeys(int(number("class", text, whole=True)) for text in texts))
    n = int(number("n", given["n"], whole=True, least=1)) if "n" in given else 0
    last = settings.get("index", 0) + max(n, 1) - 1
    if last > MAX_INDEX:
        raise InputError(f"index + n - 1 in the link must be at most {MAX_INDEX}, got {last}", "index")
    return Link(classes, n, given.get("model", "")[:200], settings)


def number(name: str, text: str, whole: bool = False, least: int = 0) -> Any:
    """The value of a parameter: an integer from `least` to MAX_INDEX, a number of any size, or the name of a sampler.
    Raises InputError."""
    if name == "sampler":
        return text
    try:
        if not whole and name not in WHOLE:
            return float(text)
        value = int(text)
    except ValueError:
        raise InputError(f"{name} in the link must be a number, got {shown(text)}", name) from None
    if not least <= value <= MAX_INDEX:
        raise InputError(f"{name} in the link must be from {least} to {MAX_INDEX}, got {shown(text)}", name)
    return value


def plain(value: Any) -> str:
    """A value as it is written in a link; a float as short as possible."""
    return repr(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def of(classes: Sequence[int], n: int, settings: Mapping[str, Any]) -> Link:
    """The link to a drawing. settings: of its request; `model` may be among them."""
    return Link(tuple(classes), n, str(settings.get("model", "")), settings)
