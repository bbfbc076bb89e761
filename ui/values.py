"""Validation of the values that a browser sends to the page."""

from collections.abc import Container, Sequence
from typing import Any

import gradio as gr

from dsd_serve.errors import InputError, shown

MAX_WHOLE = 2**53 - 1  # a browser's numbers are exact up to here; the API takes larger seeds
MAX_NUMBER = 1e30  # of any number field; each has a range of its own
MAX_TEXT = 1000  # characters of a text field


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a sensible size; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER


def whole(name: str, value: Any, least: int = 0, most: int = MAX_WHOLE) -> int:
    """The value of a number field as an integer. Raises InputError if it is empty or out of range."""
    if not is_number(value) or value != int(value) or not least <= value <= most:
        given = "an empty field" if value is None else as_written(value) if is_number(value) else shown(value)
        raise InputError(f"{name} must be a whole number from {least} to {most}, got {given}")
    return int(value)


def as_written(value: float) -> str:
    """A number as a visitor writes it."""
    return str(int(value)) if value == int(value) and abs(value) <= 10**21 else f"{value:.15g}"


def image_of(event: gr.EventData) -> tuple[str, str]:
    """The id of the finished image of a pressed button, and the settings from which it can be drawn again."""
    found = [pressed(event).get(name) for name in ("image", "query")]
    image, query = (one if isinstance(one, str) and len(one) <= MAX_TEXT else "" for one in found)
    return image, query


def number_of(event: gr.EventData, among: Container[int]) -> int:
    """The number of a pressed button. Raises gr.Error if it is not one of `among`."""
    try:
        number = whole("the number of a button", pressed(event).get("value"))
        if number not in among:
            raise InputError(f"no button on this page has the number {number} now")
    except InputError as error:
        raise gr.Error(f"{error}: press a button that is shown, or reload the page", print_exception=False) from None
    return number


def pressed(event: gr.EventData) -> dict[str, Any]:
    """The data of a pressed button (ui/html.py), unchecked."""
    return event._data if isinstance(event._data, dict) else {}


def check(controls: Sequence[Any], values: Sequence[Any]) -> None:
    """Raises InputError for values whose type does not fit their control.

    Gradio checks ranges and choices, but fails on other types. Files are checked where they are read.
    """
    if len(values) != len(controls):
        raise InputError(f"this event takes {len(controls)} values, got {len(values)}: reload the page")
    for control, value in zip(controls, values, strict=True):
        if rule := broken_rule(control, value):
            name = str(getattr(control, "label", None) or "value")
            raise InputError(f"{name} must be {rule}, got {shown(value)}")


def broken_rule(control: Any, value: Any) -> str:
    """The rule that a value breaks: what the control's value must be. Empty if it breaks none."""
    text = is_number(value) or (isinstance(value, str) and len(value) <= MAX_TEXT)
    match control:
        case gr.Slider() if not is_number(value):
            return "a number"
        case gr.Number() if value is not None and not is_number(value):
            return "a number or empty"
        case gr.Checkbox() if value is not None and not isinstance(value, bool):
            return "true or false"
        case gr.Dropdown() | gr.Radio() if not text:
            return "one of its choices"
        case gr.Textbox() if value is not None and not text:
            return f"a text of at most {MAX_TEXT} characters"
    return ""
