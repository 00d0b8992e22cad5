"""Small files that somebody else may have written, read within bounds: JSON and YAML.

Whatever such a file says, reading it takes a moment and little memory: its size and depth are bounded, aliases cannot
multiply it, and its numbers fit in a float.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from carsam.errors import CarsamError, DataError

MAX_JSON_BYTES = 256 * 2**20
# The recipe of a ViT-H with other bits for every site has 50 kB.
MAX_YAML_BYTES = 256 * 2**10
MAX_YAML_NODES = 20_000
_MAX_DEPTH = 60
# Integers of more digits do not fit in a float; Python refuses to read or print them from 4,300 digits on.
_MAX_DIGITS = 300
_MAX_SETTING_DIGITS = 20
# Control characters, which move a terminal's cursor, and halves of surrogate pairs, which cannot be written.
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def read_text(path: Path, most: int, fix: str, error: type[CarsamError] = DataError) -> str:
    """Reads UTF-8 text.

    Args:
        path: The file.
        most: Bytes; a larger file is refused before it is read.
        fix: What to do about a damaged file, for the message.
        error: What to raise.

    Raises:
        CarsamError: Of the class ``error``: the file is missing, unreadable, too large or no text.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise error(f"{path} has {size / 1e6:.1f} MB, more than the {most / 1e6:.1f} MB that it can need; {fix}.")
        with path.open("rb") as file:
            return file.read(most).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is damaged: it is not text in UTF-8; {fix}.") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}.") from problem


def read_json(
    path: Path,
    fix: str,
    *,
    most: int = MAX_JSON_BYTES,
    strict: bool = False,
    error: type[CarsamError] = DataError,
) -> dict[str, Any]:
    """Reads a JSON file that holds a mapping.

    Numbers beyond a float become infinite; characters that no text may hold (NUL, half a surrogate pair) become U+FFFD.

    Args:
        path: The file.
        fix: What to do about a damaged file, for the message.
        most: Bytes that it can need.
        strict: For settings: refuse a name that stands twice, and whole numbers of more than 20 digits.
        error: What to raise.

    Raises:
        CarsamError: Of the class ``error``: see :func:`read_text`; or it is not JSON, nested too deeply, or no mapping.
    """
    text = read_text(path, most, fix, error)
    try:
        repeats = _without_repeats if strict else None
        values = cleaned(json.loads(text, parse_int=_setting if strict else _whole, object_pairs_hook=repeats))
    except RecursionError as problem:
        raise error(f"{path} is damaged: it is nested too deeply; {fix}.") from problem
    except ValueError as problem:
        raise error(f"{path} is damaged: it is not valid JSON ({problem}); {fix}.") from problem
    if not isinstance(values, dict):
        raise error(f"{path} is damaged: it holds {_kind(values)}, not a mapping; {fix}.")
    return values


def read_yaml(path: Path, fix: str, *, error: type[CarsamError] = DataError) -> Any:
    """Reads a YAML file of settings.

    Args:
        path: The file.
        fix: What to do about a damaged file, for the message.
        error: What to raise.

    Returns:
        Mappings, lists, text and numbers; None for an empty file.

    Raises:
        CarsamError: Of the class ``error``: see :func:`read_text` and :func:`parse_yaml`.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES, fix, error), str(path), fix, error=error)


def parse_yaml(text: str, name: str, fix: str, *, error: type[CarsamError] = DataError) -> Any:
    """Reads YAML text; aliases are followed, but may not multiply it.

    Args:
        text: At most a few hundred kilobytes.
        name: Of the file, for the message.
        fix: What to do about it, for the message.
        error: What to raise.

    Returns:
        Mappings, lists, text and numbers; None for an empty text.

    Raises:
        CarsamError: Of the class ``error``: it is not YAML, nested too deeply, or its aliases multiply it.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}) > MAX_YAML_NODES:
                raise error(f"{name} holds more than {MAX_YAML_NODES} values, aliases counted; {fix}.")
            return cleaned(loader.construct_document(node))
        finally:
            loader.dispose()
    except RecursionError as problem:
        raise error(f"{name} is damaged: it is nested too deeply; {fix}.") from problem
    except yaml.YAMLError as problem:
        raise error(f"{name} is damaged: it is not valid YAML ({_one_line(problem)}); {fix}.") from problem
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as problem:
        # Values of a form that PyYAML recognises and then cannot convert: 2021-99-99, 0x, an integer of 5,000 digits.
        if isinstance(problem, CarsamError):
            raise
        raise error(f"{name} is damaged: it holds a value that cannot be read ({problem}); {fix}.") from problem


class _Loader(yaml.SafeLoader):
    """Stops at a depth at which Python still does not."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below this one with every alias written out."""
    if id(node) not in known:
        known[id(node)] = MAX_YAML_NODES + 1  # an alias to what holds it never ends
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        known[id(node)] = 1 + sum(_expanded(child, known) for child in children)
    return known[id(node)]


def cleaned(value: Any, depth: int = 0) -> Any:
    """A value as JSON can hold it, with keys and texts free of what no text may hold, and numbers that fit in a float.

    Raises:
        RecursionError: It is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        return {cleaned(key if isinstance(key, str) else str(key)): cleaned(v, depth + 1) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item, depth + 1) for item in value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and value.bit_length() > 1000:
        return math.inf if value > 0 else -math.inf
    return value if value is None or isinstance(value, (int, float)) else _text(str(value))


def _text(text: str) -> str:
    return text if text.isprintable() else _NOT_TEXT.sub("\ufffd", text)


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _setting(digits: str) -> int:
    if len(digits) > _MAX_SETTING_DIGITS:
        raise ValueError(f"the number {digits[:_MAX_SETTING_DIGITS]}... is too large")
    return int(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {repeated[:60]!r} twice")
    return values


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), "a number")


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())
