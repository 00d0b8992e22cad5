"""The contract of a quantization method, and the registry that finds them.

A method is a frozen dataclass; its fields are its settings. It overrides the hooks it needs and nothing else:

=================  =======================================================  ==========================
hook               decides                                                  default
=================  =======================================================  ==========================
quantizer_for      the quantizer of an activation site                      uniform, per tensor
softmax_for        the quantizer of a softmax output                        ``softmax`` setting
softmax_choices    the quantizers that ``choose`` takes one of              that of ``softmax_for``
transform          changes to the float model before anything else          none
choose             changes that depend on bits, grids of softmax outputs    none
units              what is reconstructed, in execution order                none (nearest rounding)
float_rows         what is kept of the float model's pass over a unit       nothing
prepare_unit       changes to a unit when its turn comes                    none
finish_unit        changes to a unit whose weights are integers             none
=================  =======================================================  ==========================

A new method is one new module in this folder, or in a package that announces itself (see :mod:`carsam.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import nn

from carsam.bits.plan import BitPlan
from carsam.compensate.passes import FloatRows
from carsam.errors import ConfigError
from carsam.models.prepare import MakeSoftmax
from carsam.models.sites import Sites
from carsam.plugins import named_subclasses
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import ActivationQuantizer, SiteQuantizer, SoftmaxQuantizer, UniformSoftmax, softmax_grids
from carsam.quantizers.ranges import OBSERVERS
from carsam.quantizers.softmax_uniform import RANGES as SOFTMAX_RANGES
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData
from carsam.reconstruct.tuning import TuningSettings
from carsam.reconstruct.units import Unit
from carsam.settings import build
from carsam.transform.choice import Choices


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    Attributes:
        weight_observer: ``mse`` or ``min-max``.
        activation_observer: ``mse``, ``min-max``, ``moving-average`` or ``percentile``.
        softmax: Grid of softmax outputs, one of :func:`carsam.quantizers.softmax_grids` (``uniform``, ``row-max``,
            ``log2`` and what plugins bring).
        softmax_range: How the step of a uniform grid of softmax outputs is found: ``product``, by the error of P̂V, or
            ``observer``, by the activation observer on P alone, as public code has it (docs/RESULTS.md compares).
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    # Of the decoder's units; a method that lets the user choose has a setting of this name.
    granularity: ClassVar[str] = "module"
    # Whether :meth:`choose` measures anything, which takes its time.
    chooses: ClassVar[bool] = False

    weight_observer: str = "mse"
    activation_observer: str = "mse"
    softmax: str = "uniform"
    softmax_range: str = "product"

    def __post_init__(self):
        choices = (
            ("weight_observer", ("mse", "min-max")),
            ("activation_observer", tuple(OBSERVERS)),
            ("softmax", tuple(softmax_grids())),
            ("softmax_range", SOFTMAX_RANGES),
        )
        for setting, allowed in choices:
            value = getattr(self, setting)
            if value not in allowed:
                raise ConfigError(f"unknown {setting} {value!r}; choose from {', '.join(allowed)}.")

    @property
    def notes(self) -> str:
        """What a table must say of the method's grids where they are not uniform, per tensor; empty otherwise."""
        note = softmax_grids()[self.softmax].note
        return f"P in {note}" if note else ""

    def quantizer_for(self, site: str, bits: int, role: str) -> SiteQuantizer:
        """Quantizer of an activation site.

        Args:
            site: Its name: a layer's input, or query, key or value of an attention.
            bits: Bits of a code.
            role: The layer's (:class:`carsam.models.sites.LayerSite`), or ``query``, ``key``, ``value``.
        """
        return ActivationQuantizer(bits)

    def softmax_for(self, site: str, bits: int) -> SoftmaxQuantizer:
        """Softmax with quantized output for an attention."""
        return self.softmax_of(self.softmax, bits)

    def softmax_of(self, grid: str, bits: int) -> SoftmaxQuantizer:
        """Softmax with quantized output on the grid of this name; the uniform one's step as ``softmax_range`` says."""
        if grid == UniformSoftmax.grid:
            return UniformSoftmax(bits, range_by=self.softmax_range)
        return softmax_grids()[grid](bits)

    def softmax_choices(self) -> Sequence[MakeSoftmax]:
        """What :meth:`choose` may give an attention: under a budget the one that loses least counts."""
        return [self.softmax_for]

    def transform(self, model: nn.Module, sites: Sites, data: CalibrationSet) -> list[dict[str, Any]]:
        """Changes the float model in place before it is quantized; returns reports, plain mappings."""
        return []

    def choose(
        self,
        model: nn.Module,
        sites: Sites,
        data: CalibrationSet,
        plan: BitPlan,
        advance: Callable[[int, int], None] = lambda *_: None,
    ) -> Choices:
        """Chooses by measuring on calibration images: what is folded into the float model, in place, and grids of P.

        Called after :meth:`transform`. An attention whose grid is not chosen gets that of :meth:`softmax_for`.
        ``advance`` is told of parts done and their total.
        """
        return Choices()

    def units(self, sites: Sites) -> list[Unit]:
        """Units in execution order, covering every site; none means nearest rounding with observed ranges."""
        return []

    def reconstruction_for(self, unit: Unit) -> ReconstructionSettings | None:
        """Settings of the optimiser loop for a unit; None observes and rounds to nearest."""
        return None

    @property
    def tuning_settings(self) -> TuningSettings | None:
        """Settings of the tuning of the finished model as a whole; None leaves it out."""
        return None

    def steps_for(self, unit: Unit, sites: Sites) -> int:
        """Optimiser steps of a unit."""
        settings = self.reconstruction_for(unit)
        if settings is None:
            return 0
        return settings.decoder_steps if sites.in_decoder(unit.stage) else settings.steps

    def float_rows(self, reference: nn.Module, unit: Unit, sites: Sites) -> FloatRows | None:
        """Watches the float model's pass over a unit, which gives the unit's targets; None watches nothing.

        :meth:`prepare_unit` finds what was seen as ``data.rows``.
        """
        return None

    def prepare_unit(self, model: nn.Module, unit: Unit, data: UnitData, sites: Sites, device: Any) -> list[Any]:
        """Changes a unit's float weights when its turn comes; returns reports."""
        return []

    def finish_unit(self, model: nn.Module, unit: Unit, data: UnitData, sites: Sites, device: Any) -> None:
        """Changes a unit whose weights are integers: what may be folded into their scales and the biases."""

    def unit_settings(self, unit: Unit, sites: Sites) -> dict[str, Any]:
        """All settings that decide how a unit comes out, given the units before it.

        Two methods that agree on these share the result: rows of an ablation compute their common stages once.
        """
        return {f.name: getattr(self, f.name) for f in fields(Method)}

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain mappings."""
        return asdict(self)


def registry() -> dict[str, type[Method]]:
    """All methods by name: those of this folder, of plugins, and of every subclass that Python knows.

    Raises:
        ConfigError: Two methods have one name.
    """
    return named_subclasses(Method, "name", "carsam.methods", what="method")


def create(name: str, settings: dict[str, Any] | None = None) -> Method:
    """A method from its name and the settings that differ from its defaults.

    Raises:
        ConfigError: No such method or setting, with the choices.
    """
    methods = registry()
    if not isinstance(name, str) or name not in methods:
        raise ConfigError(f"unknown method {name!r}; choose from {', '.join(methods)}.")
    cls = methods[name]
    defaults = cls().to_dict()
    return build(cls, merge(defaults, settings or {}))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` over it, nested mappings merged; unknown keys stay for the check that follows."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged
