"""Frozen settings dataclasses from what a file, a flag or a caller says: checked by pydantic, told in words for people.

Nothing is converted: a number in quotes is text, ``yes`` is no number, and a name that no setting has is an error. Only
whole numbers become floats, and lists tuples, where these are meant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from carsam.errors import ConfigError

T = TypeVar("T")

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "nothing",
    tuple: "a list",
    dict: "a mapping",
}
_MOST_SHOWN = 80


def build(cls: type[T], values: Any) -> T:
    """Builds a (nested) frozen settings dataclass from plain mappings.

    Args:
        cls: The dataclass. What its fields' types cannot say, its ``__post_init__`` checks.
        values: Mappings, lists, text, numbers and other settings dataclasses.

    Raises:
        ConfigError: A setting is unknown (with those that exist), missing, of another type, or out of range.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    # A tuple of one: a dataclass itself takes no configuration from outside, what holds it hands it on.
    adapter = TypeAdapter(tuple[cls], config=strict)  # type: ignore[valid-type]
    try:
        # As JSON, whose lists are tuples; Python's strict mode would refuse them.
        (built,) = adapter.validate_json(json.dumps([values], default=_plain))
    except ValidationError as error:
        raise _for_people(cls, error.errors(include_url=False)) from None
    return built


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else repr(value)


def _for_people(cls: type, errors: Sequence[Any]) -> ConfigError:
    """One of pydantic's errors as a sentence: an unknown name first, since it explains one that is missing."""
    error = min(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    kind, value, path = error["type"], error["input"], error["loc"][1:]
    where = _written(path)
    if kind == "unexpected_keyword_argument":
        known = sorted(field.name for field in fields(_type_at(cls, path[:-1])) if field.init)
        return ConfigError(f"unknown setting {where!r}; choose from {', '.join(known)}.")
    if kind == "missing":
        return ConfigError(f"the setting {where!r} is missing.")
    if kind == "value_error":  # of a __post_init__
        return ConfigError(str(error["ctx"]["error"]))
    if kind == "json_invalid":
        return ConfigError("a setting holds text that is not valid Unicode; rename the file or folder that it names.")
    expected = "a mapping of settings" if kind == "dataclass_type" else _expected(_type_at(cls, path))
    subject = f"the setting {where!r}" if path else cls.__name__
    if path and get_origin(_type_at(cls, path[:-1])) is dict:  # whose keys may be patterns with dots
        subject = f"the setting {_written(path[:-1])!r} of {_shown(path[-1])}"
    return ConfigError(f"{subject} must be {expected}, not {_shown(value)}.")


def _written(path: Sequence[int | str]) -> str:
    """``("rows", 0, "name")`` as ``rows[0].name``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _type_at(kind: Any, path: Sequence[int | str]) -> Any:
    """The type that a value in nested settings must have."""
    for part in path:
        # Of "tuple[Row, ...] | None" the part that has parts; of a tuple the items, of a mapping the values.
        kind = next((choice for choice in _choices(kind) if get_args(choice) or is_dataclass(choice)), kind)
        kind = get_type_hints(kind)[part] if is_dataclass(kind) else get_args(kind)[0 if isinstance(part, int) else 1]
    return kind


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _expected(kind: Any) -> str:
    return " or ".join(_WORDS.get(get_origin(choice) or choice, str(choice)) for choice in _choices(kind))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
