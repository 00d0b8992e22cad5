"""Settings of a quantization: bits, method, data. Frozen, saved with every result, readable back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from carsam.bits.plan import BitPlan
from carsam.errors import ConfigError

MAX_BOXES = 1000


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration data.

    Attributes:
        images: Folder of images.
        coco: COCO annotation file whose boxes are the prompts; None lets the model propose boxes.
        n_images: Images to use.
        boxes_per_image: Box prompts of an image.
        box_source: Without a COCO file: ``auto`` (the model's own masks on a grid of points) or ``grid``.
        seed: Choice of images and boxes, and everything random after it.
    """

    images: str = ""
    coco: str | None = None
    n_images: int = 32
    boxes_per_image: int = 6
    box_source: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if self.n_images < 1 or self.boxes_per_image < 1:
            raise ConfigError("n_images and boxes_per_image must be at least 1.")
        if self.boxes_per_image > MAX_BOXES:
            raise ConfigError(f"boxes_per_image must be at most {MAX_BOXES}: an image's boxes go through at once.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("the seed must be a whole number from 0 to 2^63 - 1.")
        if self.box_source not in ("auto", "grid"):
            raise ConfigError(f"unknown box source {self.box_source!r}; choose auto or grid.")


@dataclass(frozen=True)
class QuantizeConfig:
    """Everything that decides the bytes of a packed checkpoint, apart from the model and the images themselves.

    Attributes:
        method: Name of a registered method.
        settings: The method's settings that differ from its defaults (nested mappings for nested settings).
        bits: Default bits, as ``w4a4``.
        overrides: Bits by site pattern.
        calibration: The data.
        normalise: ``imagenet``, ``unit`` or ``min-max`` instead of the model's own normalisation of pixels.
    """

    method: str = "car-sam"
    settings: dict[str, Any] = field(default_factory=dict)
    bits: str = "w4a4"
    overrides: dict[str, str] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    normalise: str | None = None

    def bit_plan(self) -> BitPlan:
        """The parsed bits."""
        return BitPlan.parse(self.bits, self.overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizeConfig:
        """Reads what :meth:`to_dict` wrote.

        Raises:
            ConfigError: A key is unknown.
        """
        return build(cls, values)


def build(cls: type, values: Any, where: str = "") -> Any:
    """Builds a (nested) frozen settings dataclass from plain mappings.

    Raises:
        ConfigError: A key is unknown, with the keys that exist.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where.rstrip('.') or cls.__name__} must be a mapping of settings, not {values!r}.")
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown setting {where + str(unknown[0])!r}; choose from {', '.join(sorted(known))}.")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint) and not is_dataclass(value):
            value = build(hint, value, f"{where}{name}.")
        arguments[name] = _typed(value, hint, f"{where}{name}")
    return cls(**arguments)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Checks a plain value against a field's type; whole numbers become floats where floats are meant.

    Raises:
        ConfigError: It is of another type.
    """
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for choice in choices:
        kind = get_origin(choice) or choice
        if kind is float and type(value) is int:
            return float(value)
        if kind is tuple and isinstance(value, (list, tuple)):
            inner = get_args(choice)
            if len(inner) != 2 or inner[1] is not Ellipsis:
                return tuple(value)
            return tuple(_typed(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value))
        # A bool is an int to Python, but "steps: yes" is a slip.
        if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
            if kind is float and not math.isfinite(value):
                break
            if get_args(choice) == (str, str) and not all(isinstance(v, str) for v in (*value, *value.values())):
                break
            return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    expected = " or ".join(words.get(choice, str(choice)) for choice in choices)
    raise ConfigError(f"the setting {where!r} must be {expected}, not {value!r}.")
