"""From flags and a recipe file to the configuration of a quantization."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carsam.errors import ConfigError

if TYPE_CHECKING:
    from carsam.config import QuantizeConfig

# The method whose settings presets are.
PRESET_METHOD = "car-sam-plus"
# What a saved recipe says about its run and not about the next one.
RUN_KEYS = ("carsam_version", "model", "calibration_fingerprint")
# PyYAML reads 1e-3 as text, for want of a dot.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def read_recipe(path: Path) -> dict[str, Any]:
    """The configuration in a recipe file without what it says about its own run, as nested mappings.

    Raises:
        ConfigError: See :func:`read_yaml`.
    """
    return {key: value for key, value in read_yaml(path).items() if key not in RUN_KEYS}


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of settings, as nested mappings.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds no settings.
    """
    from carsam import reading

    values = reading.read_yaml(path, "give a recipe.yaml that carsam quantize wrote", error=ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"the recipe {path} holds no settings; give a recipe.yaml that carsam quantize wrote.")
    return values


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["mac.solver=pooled", "reconstruction.drop=0.3"]`` as nested mappings.

    Raises:
        ConfigError: One is not ``key=value``, or its value is not YAML.
    """
    from carsam.reading import parse_yaml

    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"cannot read --set {assignment!r}; write it as key=value or key.sub=value.")
        number = _NUMBER.fullmatch(text.strip())
        fix = "write it as YAML, as 0.3 or true or '{a: 1}'"
        value = float(text) if number else parse_yaml(text, f"--set {assignment!r}", fix, error=ConfigError)
        for part in reversed(path):
            value = {part: value}
        settings = _merge(settings, value)
    return settings


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """``["*.probs=w4a8"]`` as a mapping from patterns to bits.

    Raises:
        ConfigError: One is not ``PATTERN=BITS``.
    """
    parsed = {}
    for override in overrides:
        pattern, equals, bits = override.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"cannot read --bits-for {override!r}; write it as 'PATTERN=w8a8'.")
        parsed[pattern] = bits
    return parsed


def preset_settings(preset: str | None) -> dict[str, Any]:
    """Method settings of a preset; none without one.

    Raises:
        ConfigError: There is no such preset.
    """
    if preset is None:
        return {}
    from carsam.methods.car_sam_plus import PRESETS

    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}.")
    return PRESETS[preset]


def shortcut_settings(
    method: str, *, steps: int | None, no_mac: bool, no_jcar: bool, granularity: str | None
) -> dict[str, Any]:
    """Method settings that have flags of their own.

    Raises:
        ConfigError: The method is unknown or lacks what a flag sets, or flags contradict each other.
    """
    from carsam.compensate.mac import OFF
    from carsam.methods.base import registry

    methods = registry()
    if not isinstance(method, str) or method not in methods:
        raise ConfigError(f"unknown method {method!r}; choose from {', '.join(methods)}.")

    def require(setting: str, flag: str) -> None:
        having = [name for name, cls in methods.items() if setting in {f.name for f in fields(cls)}]
        if method not in having:
            raise ConfigError(
                f"the method {method} has no setting {setting!r} for {flag} to change; leave {flag} out, or choose a "
                f"method that has it: {', '.join(having)}."
            )

    settings: dict[str, Any] = {}
    if steps is not None:
        require("reconstruction", "--steps")
        settings["reconstruction"] = {"steps": steps, "decoder_steps": steps}
    if no_mac:
        require("mac", "--no-mac")
        settings["mac"] = {branch: getattr(OFF, branch) for branch in ("query", "key", "value")}
    if no_jcar:
        require("granularity", "--no-jcar")
        if granularity not in (None, "module"):
            raise ConfigError(f"--no-jcar is --granularity module, which contradicts --granularity {granularity}.")
        granularity = "module"
    if granularity is not None:
        require("granularity", "--granularity")
        settings["granularity"] = granularity
    return settings


def quantize_config(
    *,
    recipe: Path | None = None,
    method: str | None = None,
    bits: str | None = None,
    overrides: Iterable[str] = (),
    settings: Iterable[str] = (),
    steps: int | None = None,
    no_mac: bool = False,
    no_jcar: bool = False,
    granularity: str | None = None,
    normalise: str | None = None,
    image_size: int | None = None,
    decoder_only: bool = False,
    budget: str | None = None,
    preset: str | None = None,
    **calibration: Any,
) -> QuantizeConfig:
    """The configuration of a quantization: defaults, over them the recipe, over it the flags that were given.

    Args:
        recipe: ``recipe.yaml`` of an earlier run.
        method, bits: Given flags, None where not given.
        overrides: ``PATTERN=BITS`` texts.
        settings: ``key=value`` texts, which win over the flags that follow here.
        steps, no_mac, no_jcar, granularity: Flags for single method settings.
        normalise, image_size: Given flags, None where not given.
        decoder_only: Leave the image encoder in floating point; otherwise the recipe says it.
        budget: Given flag, None where not given.
        preset: Name of a preset, whose settings the other flags override; None where not given.
        **calibration: Fields of ``CalibrationConfig``, None where not given.

    Raises:
        ConfigError: Anything unknown or out of range.
    """
    from carsam.bits.allocation import Budget, check_budget
    from carsam.config import QuantizeConfig
    from carsam.data.images.normalisation import named_normalisation
    from carsam.methods.base import create

    values: dict[str, Any] = _read_with_places(recipe) if recipe is not None else {}
    for key in ("settings", "overrides", "calibration"):
        if not isinstance(values.setdefault(key, {}), dict):
            raise ConfigError(f"{key!r} in the recipe {recipe} must be a mapping.")
    # Both flags leave something out of CAR-SAM, so without a method they mean that one.
    default = "car-sam" if no_mac or no_jcar else QuantizeConfig().method
    chosen = preset_settings(preset)
    if preset is not None:
        if method not in (None, PRESET_METHOD):
            raise ConfigError(
                f"--preset {preset} is one of {PRESET_METHOD}; leave out --method {method}, or the preset."
            )
        method = PRESET_METHOD
    if method is not None and method != values.get("method", default):
        values["settings"] = {}  # they belong to the recipe's method
    if method is not None:
        values["method"] = method
    values.setdefault("method", default)  # a recipe's null is a mistake, and told as one
    if bits is not None:
        values["bits"] = bits
    if normalise is not None:
        values["normalise"] = normalise
    if image_size is not None:
        values["image_size"] = image_size
    if decoder_only:
        values["decoder_only"] = True
    flags = shortcut_settings(
        values.get("method", default), steps=steps, no_mac=no_mac, no_jcar=no_jcar, granularity=granularity
    )
    if steps is not None and chosen.get("tuning", {}).get("steps"):
        flags["tuning"] = {"steps": steps}  # the finished model is the last thing that steps are taken for
    values["settings"] = _merge(_merge(_merge(values["settings"], chosen), flags), parse_assignments(settings))
    if budget is not None:
        values["budget"] = budget
    given = parse_overrides(overrides)
    # The last match wins, so a flag that repeats the recipe's pattern must also come last.
    values["overrides"] = {key: value for key, value in values["overrides"].items() if key not in given} | given
    values["calibration"] = {
        **values["calibration"],
        **{key: value for key, value in calibration.items() if value is not None},
    }
    try:
        config = QuantizeConfig.from_dict(values)
        # Now, and not after minutes of loading and reading: every mistake in settings and bits.
        create(config.method, config.settings)
        config.bit_plan()
        if config.budget is not None:
            check_budget(Budget.parse(config.budget))
        if config.normalise is not None:
            named_normalisation(config.normalise)
    except ConfigError as error:
        raise error if recipe is None else ConfigError(f"with the recipe {recipe}: {error}") from None
    return config


def require_places(config: QuantizeConfig, recipe: Path) -> None:
    """Refuses a recipe's calibration data that is not here: a recipe of another machine holds names, not places.

    Raises:
        ConfigError: The images or their COCO file are not here.
    """
    for place, flag in ((config.calibration.images, "--data"), (config.calibration.coco, "--data-coco")):
        if place and not Path(place).exists():
            raise ConfigError(
                f"the recipe {recipe} was made with calibration data named {place!r}, which is not here; name it with "
                f"{flag}."
            )


def _read_with_places(recipe: Path) -> dict[str, Any]:
    """The configuration in a recipe file, with its calibration images where they lie on this machine.

    Raises:
        ConfigError: See :func:`read_recipe`.
    """
    from carsam.pack.calibration_places import recalled

    stored = read_yaml(recipe)
    values = {key: value for key, value in stored.items() if key not in RUN_KEYS}
    calibration = values.get("calibration")
    if not isinstance(calibration, dict):
        return values
    return {**values, "calibration": {**calibration, **recalled(stored)}}


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    from carsam.methods.base import merge

    return merge(base, changes)
