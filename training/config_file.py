"""Configuration files: TOML, overrides from the command line, and messages about what is wrong in them."""

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from dsd_serve.errors import ConfigError, rule_of

RULES = {  # errors of pydantic, as they read after "must be"
    "bool_type": "of type bool",
    "float_type": "of type float",
    "int_type": "of type int",
    "string_type": "of type str",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "too_short": "{min_length} numbers",
    "too_long": "{max_length} numbers",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than_equal": "at most {le:g}",
}


class Section(BaseModel):
    """Strict: no strings for numbers and no bools for them, but whole numbers for floats."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from nested mappings. ConfigError names a section or key that is unknown or has a wrong value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(sentence(cls, error.errors(include_url=False)[0])) from None


Kind = TypeVar("Kind", bound=Section)


def sentence(kind: type[Section], item: Any) -> str:
    """One error of pydantic in a configuration of this kind as text: the key, its rule and the value."""
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])  # the validators above write whole sentences
    *sections, key = (part for part in item["loc"] if isinstance(part, str))  # without list indices
    model: Any = kind
    for name in sections:
        model = model.model_fields[name].annotation
    known: dict[str, FieldInfo] = model.model_fields
    place = "".join(f"{name}." for name in sections)
    if item["type"] == "extra_forbidden":
        meant = "".join(f"did you mean {near}? " for near in get_close_matches(key, known, 1))
        return (
            f"unknown key {place}{key if key.isprintable() else repr(key)}; {meant}known are {', '.join(sorted(known))}"
        )
    lowest = [limit.ge for limit in known[key].metadata if isinstance(limit, Ge)]
    highest = [limit.le for limit in known[key].metadata if isinstance(limit, Le)]
    if item["type"] == "literal_error":
        rule = f"one of {', '.join(get_args(known[key].annotation))}"
    elif item["type"] in ("greater_than_equal", "less_than_equal") and lowest and highest:
        rule = f"between {lowest[0]} and {highest[0]}"
    else:
        rule = rule_of(item, RULES)
    return f"{place}{key} must be {rule}, got {item['input']!r}"


def read_config(kind: type[Kind], path: Path | None, overrides: Sequence[str], folder: str) -> Kind:
    """Read a TOML file and apply overrides like `optim.lr=3e-4` or `data.classes=[1,207]` (values as in TOML).

    path: None for the defaults of `kind`. folder: run.dir, unless the file or an override names it.
    """
    values = read_toml(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise ConfigError(f"an override must be section.key=value, got {override!r}")
        values.setdefault(section, {})
        if not isinstance(values[section], dict):
            raise ConfigError(f"{section} must be a section with keys, got {values[section]!r}")
        values[section][name] = parse_value(text)
    values.setdefault("run", {})
    if isinstance(values["run"], dict):
        values["run"].setdefault("dir", folder)
    return kind.from_dict(values)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # editors of Windows write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; the configuration must be a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string, so that shells need no second pair of quotes
