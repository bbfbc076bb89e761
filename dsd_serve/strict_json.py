"""Untrusted JSON: one reader for all bodies, stricter than Python's own."""

import json
from typing import Any

from dsd_serve.errors import InputError, shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors and shells write it before UTF-8
MAX_VALUES = 10_000  # read in a few milliseconds


def read_json(data: bytes, what: str = "the body", most: int = MAX_VALUES) -> Any:
    """The value of JSON text in UTF-8, which may begin with a byte order mark.

    what: the name of the text in errors. most: the most values, roughly (commas and brackets are counted). Raises
    InputError for anything else, and where JSON readers disagree: repeated names, NaN and Infinity.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > most:
        raise InputError(f"{what} must hold at most {most:,} values of JSON; send less")
    if not data.strip():
        raise InputError(f"{what} is empty, not valid JSON")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=once_each, parse_constant=no_constant)
    except UnicodeDecodeError:
        reason = "it must be in UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except (InputError, json.JSONDecodeError) as error:
        reason = str(error)
    except ValueError:  # Python rejects them
        reason = "it has a number of thousands of digits"
    raise InputError(f"{what} is not valid JSON: {reason}")


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for position, name in enumerate(names) if name in names[:position])
        raise InputError(f"{shown(repeated)} is given twice; give it once")
    return found


def no_constant(name: str) -> Any:
    raise InputError(f"{name} is not a number of JSON")
