"""The model that each visitor has chosen, of a server with several."""

from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

from dsd_serve.calls import Call

T = TypeVar("T")

VISITOR = ContextVar("VISITOR", default="")  # whose event is running: Gradio's session_hash
MAX_CHOICES = 1000  # of visitors; the oldest are forgotten, and those visitors get the server's first model
WITHOUT_MODEL = ("/checkpoints", "/debug/", "/v1/")  # prefixes of paths that take none


class ChosenModels:
    """The choice of the visitor whose event is running, and calls that request it."""

    def __init__(self) -> None:
        self.by_visitor: OrderedDict[str, str] = OrderedDict()

    @property
    def current(self) -> str:
        """A name; empty for the server's first model."""
        return self.by_visitor.get(VISITOR.get(), "")

    def choose(self, name: str) -> None:
        self.by_visitor[VISITOR.get()] = name
        self.by_visitor.move_to_end(VISITOR.get())
        if len(self.by_visitor) > MAX_CHOICES:
            self.by_visitor.popitem(last=False)

    def forget(self) -> None:
        self.by_visitor.pop(VISITOR.get(), None)

    def apply(self, call: Call[T]) -> Call[T]:
        """The call to the chosen model."""
        return for_model(call, self.current)


def for_model(call: Call[T], name: str) -> Call[T]:
    """The call to the model of a name; the call itself if that is empty."""
    if not name or call.path.startswith(WITHOUT_MODEL):
        return call
    place = "json" if "json" in call.arguments else "params"
    values: dict[str, Any] = {**call.arguments.get(place, {}), "model": name}
    return replace(call, arguments={**call.arguments, place: values})
