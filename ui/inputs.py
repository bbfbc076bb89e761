"""The values that a browser sends to the page, checked before anything is done with them."""

from collections.abc import Container, Sequence
from typing import Any

import gradio as gr

from dsd_serve.errors import InputError

MOST = 2**53 - 1  # a browser's numbers are exact up to here; the API takes larger seeds
LARGEST = 1e30  # of any number field; each has a range of its own
TEXT = 1000  # characters of a text field
SHOWN = 80  # characters of a wrong value that a sentence repeats


def shortened(value: Any, most: int = SHOWN) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number of a sensible size; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def whole(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """A number field as an integer. Raises InputError when it is empty or not such a number."""
    if not is_number(value) or value != int(value) or not least <= value <= most:
        given = "nothing" if value is None else f"{value:.15g}" if is_number(value) else shortened(value)
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {given}")
    return int(value)


def number_of(event: gr.EventData, among: Container[int]) -> int:
    """The number that a pressed button carries. Raises gr.Error when it is not one of these."""
    try:
        number = whole("what was pressed", pressed(event).get("value"))
        if number not in among:
            raise InputError(f"nothing on this page has the number {number} now")
    except InputError as error:
        raise gr.Error(f"{error}: press something that is shown, or reload the page", print_exception=False) from None
    return number


def pressed(event: gr.EventData) -> dict[str, Any]:
    """What a pressed button carries (ui/html.py), unchecked."""
    return event._data if isinstance(event._data, dict) else {}


def check(controls: Sequence[Any], values: Sequence[Any]) -> None:
    """Raises InputError for values that are not of the kind of their control.

    Gradio checks ranges and choices, but stumbles over other kinds. Files are checked where they are read.
    """
    if len(values) != len(controls):
        raise InputError(f"this event takes {len(controls)} values, got {len(values)}: reload the page")
    for control, value in zip(controls, values, strict=True):
        if rule := broken_rule(control, value):
            name = str(getattr(control, "label", None) or "a value")
            raise InputError(f"{name} must be {rule}, got {shortened(value)}")


def broken_rule(control: Any, value: Any) -> str:
    """What the value of such a control must be and this is not; nothing where it is."""
    text = is_number(value) or (isinstance(value, str) and len(value) <= TEXT)
    match control:
        case gr.Slider() if not is_number(value):
            return "a number"
        case gr.Number() if value is not None and not is_number(value):
            return "a number, or nothing"
        case gr.Checkbox() if value is not None and not isinstance(value, bool):
            return "true or false"
        case gr.Dropdown() | gr.Radio() if not text:
            return "one of its choices"
        case gr.Textbox() if value is not None and not text:
            return f"a text of at most {TEXT} characters"
    return ""
