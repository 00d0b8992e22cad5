"""Rows of evidence: what is quantized how and measured on what, and the plans that list them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from carsam.bits.allocation import MIXED_BITS, Budget, check_budget
from carsam.commands.recipe import parse_assignments
from carsam.config import CalibrationConfig, QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods.base import create, merge
from carsam.reading import read_yaml
from carsam.settings import build

FLOAT = "float"
SCOPES = ("decoder", "whole")
SUBJECTS = ("litemedsam", "embedded", "sam2", "twin")
DATA = ("medical", "coco", "embedded")
# Ends the name of a data set whose calibration images are split: some calibrate, the others judge.
HELD_OUT = "-held-out"
PLANS = Path(__file__).resolve().parent / "plans"


@dataclass(frozen=True)
class Row:
    """One model to quantize and measure.

    Attributes:
        label: Its name in tables.
        method: A registered method, or ``float``.
        settings: The method's settings that differ from its defaults.
        overrides: Bits by site pattern.
        bits: As ``w4a4``; ``float`` for the float model.
        budget: As ``4.0bits``: every site has bits of its own, so that the mean is kept; empty for the same bits
            everywhere.
        subject: ``litemedsam``, ``embedded``, ``sam2`` (the embedded SAM 2 without its memory), or ``twin-T`` (the
            embedded model stressed by T, as ``twin-1``).
        scope: ``decoder`` leaves the image encoder in floating point; ``whole`` quantizes both.
        data: ``medical``, ``coco`` or ``embedded``; with ``-held-out``, calibration and evaluation share the
            calibration images out between them.
        seed: Choice of calibration boxes and images, and everything random after it.
        steps: Optimiser steps of every unit; None leaves the method's own.
        boxes, images: Calibration boxes an image, and calibration images.
        limit: Evaluation images; None takes all.
        clicks: Numbers of clicks to measure beside boxes.
        diagnose: Evaluation images on which dissipation and oscillation are measured.
    """

    label: str
    method: str = "car-sam"
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    bits: str = "w4a4"
    budget: str = ""
    subject: str = "litemedsam"
    scope: str = "decoder"
    data: str = "medical"
    seed: int = 0
    steps: int | None = None
    boxes: int = 4
    images: int = 32
    limit: int | None = None
    clicks: tuple[int, ...] = ()
    diagnose: int = 0

    def __post_init__(self):
        if not self.label or len(self.label) > 100:
            raise ConfigError("a row needs a label of at most 100 characters.")
        if self.subject not in SUBJECTS[:-1] and self.strength is None:
            raise ConfigError(
                f"unknown subject {self.subject!r}; choose from litemedsam, embedded, sam2, twin-1 (any number)."
            )
        for name, value, known in (("scope", self.scope, SCOPES), ("data", self.base_data, DATA)):
            if value not in known:
                raise ConfigError(f"unknown {name} {value!r}; choose from {', '.join(known)}.")
        if self.is_float != (self.bits == FLOAT):
            raise ConfigError(f"{self.label}: the method float and the bits float go together.")

    @property
    def is_float(self) -> bool:
        """Whether the float model itself is measured."""
        return self.method == FLOAT

    @property
    def strength(self) -> float | None:
        """How much the subject is stressed; None where it is not."""
        match = re.fullmatch(r"twin-(\d+(?:\.\d+)?)", self.subject)
        return float(match[1]) if match else None

    @property
    def base_data(self) -> str:
        """The data set, without what is said about its split."""
        return self.data.removesuffix(HELD_OUT)

    @property
    def held_out(self) -> bool:
        """Whether the evaluation images are calibration images held out."""
        return self.data.endswith(HELD_OUT)

    def normalised(self) -> Row:
        """The row without settings that change nothing, so that rows which are the same look the same.

        Raises:
            ConfigError: A setting is unknown, of another type, or out of range.
        """
        if self.is_float:
            return replace(
                self,
                settings={},
                overrides={},
                budget="",
                scope="whole",
                seed=0,
                steps=None,
                boxes=0,
                images=0,
                diagnose=0,
            )
        config = self.config()
        config.bit_plan()
        if self.budget:
            check_budget(Budget.parse(self.budget))
        method = create(config.method, config.settings)
        return self if hasattr(method, "reconstruction") else replace(self, steps=None)

    def config(self) -> QuantizeConfig:
        """The quantization."""
        settings = self.settings
        if self.steps is not None and hasattr(create(self.method), "reconstruction"):
            steps = {"reconstruction": {"steps": self.steps, "decoder_steps": self.steps}}
            settings = merge(steps, settings)
        calibration = CalibrationConfig(n_images=self.images, boxes_per_image=self.boxes, seed=self.seed)
        return QuantizeConfig(
            self.method,
            settings,
            self.bits,
            self.overrides,
            calibration,
            decoder_only=self.scope == "decoder",
            budget=self.budget or None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, for JSON; no budget where there is none, as before there were any."""
        values = {**asdict(self), "clicks": list(self.clicks)}
        return values if self.budget else {name: value for name, value in values.items() if name != "budget"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Reads what :meth:`to_dict` wrote, or a row of a plan.

        Raises:
            ConfigError: A setting is missing, unknown, of another type, or out of range.
        """
        return build(cls, values)

    @property
    def key(self) -> str:
        """Of everything that decides the scores; what else is measured on the same model does not count."""
        settings = {key: value for key, value in self.to_dict().items() if key not in ("clicks", "diagnose")}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def notes(self) -> str:
        """What its grids and bits have that usual ones have not; empty of the float model."""
        if self.is_float:
            return ""
        noted = create(self.method, self.config().settings).notes
        mixed = f"bits of {MIXED_BITS[0]} to {MIXED_BITS[-1]} under a budget of {self.budget}" if self.budget else ""
        return "; ".join(filter(None, (mixed, noted)))

    @property
    def file_name(self) -> str:
        """Name of its JSON file."""
        label = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-") or "row"
        where = [
            self.subject,
            *([] if self.is_float else [self.scope]),
            self.data,
            *([] if self.is_float else [self.bits]),
        ]
        return "-".join([*where, label[:48], f"s{self.seed}", self.key]) + ".json"

    def __str__(self) -> str:
        what = self.label if self.is_float else f"{self.bits.upper()} {self.label}, seed {self.seed}"
        return f"{self.subject} {'' if self.is_float else self.scope + ' '}on {self.data}: {what}"


def read_plan(name: str) -> tuple[Row, ...]:
    """The rows of a plan, in the order in which they are to be run.

    A plan is a YAML file with ``groups``. Each group has ``rows`` and, under ``for``, lists of values: all rows are run
    for each combination, the last list changing fastest. ``defaults`` hold for the whole plan. Besides the fields of
    :class:`Row`, a row may have ``set``, a list of ``key.sub=value`` as on the command line.

    Args:
        name: A file, or the name of one in ``benchmarks/plans``.

    Raises:
        ConfigError: There is no such plan, or something in it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PLANS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in PLANS.glob("*.yaml"))
        raise ConfigError(f"there is no plan {name}; give a YAML file, or one of {', '.join(known)}.")
    values = read_yaml(path, "write it as the plans in benchmarks/plans", error=ConfigError)
    if not isinstance(values, dict) or not isinstance(values.get("groups"), list):
        raise ConfigError(f"the plan {path} has no list of groups.")
    found: list[Row] = []
    for number, group in enumerate(values["groups"], 1):
        try:
            found += list(_rows_of(group, values.get("defaults") or {}))
        except ConfigError as error:
            raise ConfigError(f"group {number} of the plan {path.name}: {error}") from None
    return once(found)


def once(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each row once, where it comes first, measured in every way that one of its occurrences asks for."""
    unique: dict[str, Row] = {}
    for row in rows:
        known = unique.get(row.key, row)
        clicks = tuple(sorted({*known.clicks, *row.clicks}))
        unique[row.key] = replace(known, clicks=clicks, diagnose=max(known.diagnose, row.diagnose))
    return tuple(unique.values())


def _rows_of(group: Any, defaults: dict[str, Any]) -> Iterator[Row]:
    if not isinstance(group, dict) or not isinstance(group.get("rows"), list) or set(group) - {"for", "rows"}:
        raise ConfigError("it must be a mapping with rows (a list) and, if need be, for (lists by name).")
    axes = {name: each if isinstance(each, list) else [each] for name, each in (group.get("for") or {}).items()}
    for values in itertools.product(*axes.values()):
        for row in group["rows"]:
            if not isinstance(row, dict):
                raise ConfigError(f"a row must be a mapping, not {row!r}.")
            merged = {**defaults, **dict(zip(axes, values)), **row}
            assignments = merged.pop("set", [])
            if assignments:
                merged["settings"] = merge(merged.get("settings", {}), parse_assignments(assignments))
            if merged.get("method") == FLOAT:
                merged["bits"] = FLOAT
            yield Row.from_dict(merged).normalised()


def row_of(text: str, common: dict[str, Any]) -> Row:
    """A row from the command line: ``LABEL=METHOD key=value key=value``.

    Raises:
        ConfigError: It is not written so, or a setting is wrong.
    """
    head, *assignments = text.split()
    label, equals, method = head.rpartition("=")
    if not equals:
        label = method = head
    values = {"label": label.replace("_", " "), "method": method, "settings": parse_assignments(assignments)}
    if method == FLOAT:
        values["bits"] = FLOAT
    return Row.from_dict({**common, **values}).normalised()
