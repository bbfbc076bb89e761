"""Facts about the page's server, refreshed whenever somebody opens the page."""

from dataclasses import dataclass, field
from typing import Any

from dsd_serve import calls
from dsd_serve.errors import ServerError
from dsd_serve.imaging.decoding import Decoder
from dsd_serve.params import API_NAMES, RECOMMENDED, SAMPLER_NAMES, SamplingParams
from ui.fair_limit import LimitedClient

GOLDEN_RETRIEVER = 207  # the class that is selected at first, if the model has it
UNKNOWN: dict[str, Any] = {  # until a server has answered
    "name": "",
    "image_size": 32,
    "latent_shape": [16, 16],
    "samplers": list(SAMPLER_NAMES),
    "defaults": {API_NAMES[name]: getattr(SamplingParams(guidance_scale=3.0), name) for name in RECOMMENDED},
    "limits": {"n": 16, "steps": 250, "size": 1024, "body_mb": 20},
    "engine": {},
    "fingerprint": "",
    "classes": [],
}


@dataclass
class ServerInfo:
    """A server and its latest answers about itself. decoder: of visitors' photos."""

    client: LimitedClient
    decoder: Decoder = field(default_factory=Decoder)
    model: dict[str, Any] = field(default_factory=lambda: UNKNOWN)
    classes: list[dict[str, Any]] = field(default_factory=list)
    choices: list[tuple[str, int]] = field(default_factory=list)  # the classes for a menu; one list for all visitors
    card: str = ""

    async def refresh(self) -> str:
        """Fetch everything again. Returns what went wrong, or an empty string."""
        try:
            self.model = await self.client.do(calls.model())
            self.classes = await self.client.do(calls.classes())
        except ServerError as error:
            return str(error)
        self.choices = [
            (f"{one['name'][:1].upper()}{one['name'][1:]} ({one['index']})", one["index"]) for one in self.classes
        ]
        try:
            self.card = await self.client.do(calls.card())
        except ServerError as error:
            self.card = str(error)  # a model without a card is served all the same
        return ""

    @property
    def default_class(self) -> int:
        """Index of the class that is selected at first."""
        indices = [one["index"] for one in self.classes]
        return GOLDEN_RETRIEVER if GOLDEN_RETRIEVER in indices or not indices else indices[0]

    def name_of(self, index: int | None) -> str:
        found = next((one["name"] for one in self.classes if one["index"] == index), None)
        return "no class" if index is None else str(found or f"class {index}")
