"""The errors of this project.

    DSDError
      InputError              a request that cannot be carried out: a wrong class, number, sampler, image
      ConfigError             a training or model configuration with an impossible value
      CheckpointError         a model directory, checkpoint or data folder that cannot be used
      EngineUnavailableError  the requested engine cannot run here (package or device missing)
      EngineError             an engine failed while it ran
        EngineDeadError       it failed for good: only another process can use its device again
      QueueFullError          too many programs are waiting
      DeadlineError           the result would be, or was, too late for its caller
      ClosedError             the batcher accepts nothing more: it drains, or its engine is dead
        NotReadyError         (Triton) one instance is not ready and has not begun; another one may be
      CancelledError          the caller gave up before the result was ready
      ServerError             (client) the server answered with a problem document

They are independent of HTTP; server/error_responses.py maps them to status codes. Their sentences quote values by
`shown`.
"""

from collections.abc import Mapping
from reprlib import Repr
from typing import Any


class DSDError(Exception):
    """Base of all errors that this project raises on purpose. The text is a sentence for the user."""


class InputError(DSDError, ValueError):
    """A request that cannot be carried out as it is; the text names what is allowed.

    param: the parameter that is wrong, with which the text begins; None where it is not a single parameter.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def renamed(self, param: str | None) -> "InputError":
        """The same error under the name that the parameter has for another caller."""
        text = str(self)
        if self.param is not None and param is not None:
            text = param + text.removeprefix(self.param)
        return InputError(text, param)


class ConfigError(DSDError, ValueError):
    """A configuration with an impossible value; the text names the key."""


class CheckpointError(DSDError):
    """A model directory, checkpoint or data folder that cannot be used."""


class EngineUnavailableError(DSDError):
    """The requested engine cannot run here; the text says what to install or change."""


class EngineError(DSDError):
    """The engine failed while it ran rows. fatal: it will never run any again in this process."""

    fatal = False


class EngineDeadError(EngineError):
    """The engine failed for good: nothing runs on its device in this process any more."""

    fatal = True


class QueueFullError(DSDError):
    """Too many programs are waiting. `retry_after` is an estimate in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(DSDError):
    """The result cannot be ready within the time limit of its caller."""


class ClosedError(DSDError):
    """Nothing more is accepted: the batcher is draining, or its engine is dead."""


class NotReadyError(ClosedError):
    """An instance inside Triton is not ready. It has begun nothing, so the task may go to another one."""


class CancelledError(DSDError):
    """The job was cancelled by its caller."""


class ServerError(DSDError):
    """A server answered with an error.

    status: its HTTP status. retry_after: seconds after which the server asks to try again (Retry-After), None if it
    does not.
    """

    def __init__(self, message: str, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class Shown(Repr):
    """A value as short JSON-like text for error messages: at most about 80 characters, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 2, 80, 40, 80
        self.maxlist = self.maxtuple = self.maxdict = 3

    def repr(self, x: object) -> str:
        text = super().repr(x)
        return text if len(text) <= 80 else f"{text[:77]}..."

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 1000:  # Python refuses to write numbers of thousands of digits
            return f"a number of {int(x.bit_length() * 0.30103) + 1} digits"
        return super().repr_int(x, level)

    def repr_bool(self, x: bool, level: int) -> str:
        return "true" if x else "false"

    def repr_NoneType(self, x: None, level: int) -> str:
        return "null"


shown = Shown().repr


def rule_of(item: Mapping[str, Any], rules: Mapping[str, str]) -> str:
    """The rule that an error of pydantic reports, as it reads after "must be".

    item: of `ValidationError.errors()`. rules: by type of error, for where pydantic's own words do not read well; they
    may name what is in the error's context, as "at most {max_length}".
    """
    if item["type"] in rules:
        return rules[item["type"]].format_map(item.get("ctx", {}))
    return item["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable to ")[0]
