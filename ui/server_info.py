"""Facts about the page's server, refreshed whenever somebody opens the page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsd_serve import calls
from dsd_serve.errors import ServerError
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.params import API_NAMES, RECOMMENDED, SAMPLER_NAMES, SamplingParams
from ui.fair_limit import LimitedClient
from ui.finished import FinishedImages

FIRST = ("n04146614", "n02099601")  # wnids of the class that is selected at first: a school bus, a golden retriever
NO_CLASS = -1  # in menus and lists of chosen classes
NONE = "no class"
MOST_IN_MENUS = 2000  # classes: every visitor gets all menus; the search on Generate finds the others too
UNKNOWN: dict[str, Any] = {  # until a server has answered
    "name": "",
    "image_size": 32,
    "latent_shape": [16, 16],
    "samplers": list(SAMPLER_NAMES),
    "defaults": {API_NAMES[name]: getattr(SamplingParams(guidance_scale=3.0), name) for name in RECOMMENDED},
    "limits": {"n": 16, "steps": 250, "size": 1024, "body_mb": 20},
    "engine": {},
    "fingerprint": "",
    "num_classes": 1,
    "classes": [],
}


@dataclass
class ModelFacts:
    """The latest answers of a server about one of its models. choices: the classes for a menu, one list for all
    visitors."""

    model: dict[str, Any] = field(default_factory=lambda: UNKNOWN)
    classes: list[dict[str, Any]] = field(default_factory=list)
    choices: list[tuple[str, int]] = field(default_factory=lambda: [(NONE, NO_CLASS)])
    card: str = ""


@dataclass
class ServerInfo:
    """A server and its latest answers about itself and the model that the visitor has chosen.

    images: finished ones. decoder: of visitors' photos. names: of its models. run: the training run that it follows, as
    /checkpoints describes it.
    """

    client: LimitedClient
    images: FinishedImages
    decoder: Decoder = field(default_factory=Decoder)
    names: list[str] = field(default_factory=list)
    run: dict[str, Any] | None = None
    facts: dict[str, ModelFacts] = field(default_factory=dict)  # by the name of the model; empty for the first

    @property
    def here(self) -> ModelFacts:
        return self.facts.get(self.client.chosen.current) or self.facts.get("") or ModelFacts()

    @property
    def model(self) -> dict[str, Any]:
        return self.here.model

    @property
    def classes(self) -> list[dict[str, Any]]:
        return self.here.classes

    @property
    def choices(self) -> list[tuple[str, int]]:
        return self.here.choices

    @property
    def card(self) -> str:
        return self.here.card

    async def refresh(self) -> str:
        """Fetch everything again. Returns what went wrong, or an empty string."""
        before, name = self.here, self.client.chosen.current
        try:
            self.names = await self.client.do(calls.models())
            if name not in self.names:
                self.client.chosen.forget()
                before, name = self.here, ""
            model, classes = await self.client.do(calls.model()), before.classes
            if model["fingerprint"] != before.model["fingerprint"]:
                classes = await self.client.do(calls.classes())
        except ServerError as error:
            return str(error)
        menu = [
            (f"{one['name'][:1].upper()}{one['name'][1:]} ({one['index']})", one["index"])
            for one in classes[:MOST_IN_MENUS]
        ]
        try:
            card = await self.client.do(calls.card())
        except ServerError as error:
            card = str(error)  # a model without a card is served all the same
        kept = {known: facts for known, facts in self.facts.items() if known in self.names or not known}
        self.facts = {**kept, name: ModelFacts(model, classes, menu or [(NONE, NO_CLASS)], card)}
        try:
            self.run = await self.client.do(calls.checkpoints())
        except ServerError:
            self.run = None  # it follows none
        return ""

    @property
    def has_classes(self) -> bool:
        return bool(self.model["num_classes"])

    def possible(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the model takes: without classes there is nothing to guide to."""
        return {name: value for name, value in settings.items() if self.has_classes or not name.startswith("guidance")}

    @property
    def default_class(self) -> int:
        """Index of the class that is selected at first; NO_CLASS if there is none."""
        known = {one.get("wnid") for one in self.classes}
        return self.preferred(next((wnid for wnid in FIRST if wnid in known), ""), 0)

    def preferred(self, wnid: str, position: int) -> int:
        """Index of the class with a wnid, else of that at a position."""
        if not self.classes:
            return NO_CLASS
        found = (one["index"] for one in self.classes if one.get("wnid") == wnid)
        return int(next(found, self.classes[:MOST_IN_MENUS][position]["index"]))

    @property
    def search_example(self) -> str:
        """A text that finds a class; empty if there is none."""
        first = next((one for one in self.classes if one["index"] == self.default_class), None)
        return "" if first is None else str(first["name"])

    def name_of(self, index: int) -> str:
        found = next((one["name"] for one in self.classes if one["index"] == index), None)
        return "Image" if index == NO_CLASS else str(found or f"class {index}")


def class_of(index: int) -> int | None:
    """The class that a menu's value stands for."""
    return None if index == NO_CLASS else index
