"""Settings from what files say: nothing is converted in silence, and every mistake is told with its place."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.settings import build


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    steps: int = 3
    on: bool = True

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError("steps must not be negative.")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    rows: tuple[Inner, ...] = ()
    sizes: tuple[int, ...] = ()
    bits: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


def test_nested_settings_are_built():
    values = {
        "name": "x",
        "inner": {"rate": 2},
        "rows": [{"on": False}, Inner(steps=7)],
        "sizes": (1, 2),
        "bits": {"*": "w4a4"},
        "more": {"a": [1, {"b": None}]},
    }
    built = build(Outer, values)
    assert built == Outer(
        "x", Inner(2.0), (Inner(on=False), Inner(steps=7)), (1, 2), {"*": "w4a4"}, {"a": [1, {"b": None}]}
    )
    assert type(built.inner.rate) is float and type(built) is Outer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "y"}, "unknown setting 'nam'; choose from bits, inner, more, name, note, rows, sizes."),
        ({"inner": {"stps": 1}}, "unknown setting 'inner.stps'; choose from on, rate, steps."),
        ({"rows": [{}, {"stps": 1}]}, "unknown setting 'rows[1].stps'; choose from on, rate, steps."),
        ({"inner": 3}, "the setting 'inner' must be a mapping of settings, not 3."),
        ({"rows": {}}, "the setting 'rows' must be a list, not {}."),
        ({"rows": [[]]}, "the setting 'rows[0]' must be a mapping of settings, not []."),
        ({"sizes": [1, 2.0]}, "the setting 'sizes[1]' must be a whole number, not 2.0."),
        ({"inner": {"steps": True}}, "the setting 'inner.steps' must be a whole number, not True."),
        ({"inner": {"steps": "3"}}, "the setting 'inner.steps' must be a whole number, not '3'."),
        ({"inner": {"rate": math.nan}}, "the setting 'inner.rate' must be a number, not nan."),
        ({"inner": {"rate": math.inf}}, "the setting 'inner.rate' must be a number, not inf."),
        ({"inner": {"rate": False}}, "the setting 'inner.rate' must be a number, not False."),
        ({"inner": {"on": 1}}, "the setting 'inner.on' must be true or false, not 1."),
        ({"inner": {"steps": -1}}, "steps must not be negative."),
        ({"bits": {"*.probs": 4}}, "the setting 'bits' of '*.probs' must be text, not 4."),
        ({"more": []}, "the setting 'more' must be a mapping, not []."),
        ({"note": 4}, "the setting 'note' must be text or nothing, not 4."),
        ({"name": None}, "the setting 'name' must be text, not None."),
        ({"name": ["a" * 100]}, f"the setting 'name' must be text, not ['{'a' * 75}...."),
        (
            {"name": "\udcff"},
            "a setting holds text that is not valid Unicode; rename the file or folder that it names.",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(change, message):
    with pytest.raises(ConfigError) as raised:
        build(Outer, {"name": "x", **change})
    assert str(raised.value) == message


def test_what_is_missing_or_no_mapping():
    with pytest.raises(ConfigError, match="the setting 'name' is missing"):
        build(Outer, {})
    with pytest.raises(ConfigError, match="unknown setting 'nam'"):  # which explains the missing one
        build(Outer, {"nam": "x"})
    with pytest.raises(ConfigError, match="Outer must be a mapping of settings, not 'x'"):
        build(Outer, "x")


def test_pydantic_waits_until_settings_are_read():
    code = "import sys, carsam.config, carsam.cli; assert 'pydantic' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert QuantizeConfig.from_dict({}) == QuantizeConfig()
