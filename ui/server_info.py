"""What the page knows of its server, asked again whenever a page is opened."""

from dataclasses import dataclass, field
from typing import Any

from dsd_serve import calls
from dsd_serve.client import AsyncClient
from dsd_serve.errors import ServerError
from dsd_serve.imaging.decoding import Decoder
from ui.requests import InTurn, Turns

UNKNOWN: dict[str, Any] = {  # until a server has answered
    "name": "",
    "image_size": 32,
    "latent_shape": [16, 16],
    "samplers": ["euler", "heun", "dpmpp_2m"],
    "defaults": {"steps": 25, "sampler": "heun", "guidance": 3.0},
    "limits": {"n": 16, "steps": 250, "size": 1024, "body_mb": 20},
    "engine": {},
    "fingerprint": "",
    "classes": [],
}


@dataclass
class Known:
    """The server, asked in turn, and its last answers. decoder: of visitors' photos."""

    server: AsyncClient
    decoder: Decoder = field(default_factory=Decoder)
    turns: Turns = field(default_factory=Turns)
    client: InTurn = field(init=False)
    model: dict[str, Any] = field(default_factory=lambda: UNKNOWN)
    classes: list[dict[str, Any]] = field(default_factory=list)
    choices: list[tuple[str, int]] = field(default_factory=list)  # the classes for a menu; one list for all visitors
    card: str = ""

    def __post_init__(self) -> None:
        self.client = InTurn(self.server, self.turns)

    async def refresh(self) -> str:
        """Ask again; returns what is wrong, or nothing."""
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
            self.card = str(error)  # a model without one is served all the same
        return ""

    @property
    def usual(self) -> int:
        """The class that is chosen at first."""
        indices = [one["index"] for one in self.classes]
        return 207 if 207 in indices or not indices else indices[0]

    def name_of(self, index: int | None) -> str:
        found = next((one["name"] for one in self.classes if one["index"] == index), None)
        return "no class" if index is None else str(found or f"class {index}")
