"""The bits of every site of a model: a default, and other bits for the sites that a pattern names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from carsam.errors import ConfigError

if TYPE_CHECKING:
    from carsam.models.sites import Sites  # imports transformers, which may be importing this module

SUPPORTED_BITS = (*range(2, 9), 16)
# What people are told of a model of which only the decoder is quantized.
FLOATING_ENCODER = "image encoder in floating point"


def beside_bits(recipe: Mapping[str, Any]) -> str:
    """What people are told beside the bits of a model: a budget that they hold for on the mean, a part left out.

    Args:
        recipe: As a packed folder has it; whatever else it holds is ignored.

    Returns:
        Phrases with commas between them; empty where the bits say everything.
    """
    budget = recipe.get("budget")
    phrases = [f"mixed under a budget of {budget}"] if isinstance(budget, str) and budget else []
    return ", ".join([*phrases, *([FLOATING_ENCODER] if recipe.get("decoder_only") is True else [])])


def stated_bits(bits: str, recipe: Mapping[str, Any]) -> str:
    """The bits of a model with :func:`beside_bits` behind them."""
    beside = beside_bits(recipe)
    return f"{bits}, {beside}" if beside else bits


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations; 16 means "left in floating point". Written ``w4a4``."""

    weights: int
    activations: int

    def __post_init__(self):
        for value in (self.weights, self.activations):
            if value not in SUPPORTED_BITS:
                raise ConfigError(f"{value} bits are not supported; choose from {', '.join(map(str, SUPPORTED_BITS))}.")

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Reads ``w4a4``, ``W6A8``.

        Raises:
            ConfigError: The text is not of that form, or the bits are not supported.
        """
        text = text.strip() if isinstance(text, str) else text
        match = re.fullmatch(r"w([0-9]{1,9})a([0-9]{1,9})", text.lower()) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"cannot read the bits {text!r}; write weights and activations as w4a4, w6a6, w8a8, w4a8."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


@dataclass(frozen=True)
class BitPlan:
    """Bits of every site: a default and overrides by site pattern, the last match wins.

    Attributes:
        default: For all sites.
        overrides: ``(pattern, bits)`` pairs. The pattern is a shell pattern over site names: a layer's path
            (``mask_decoder.*``, ``*.mlp.lin2``) sets its weights and input, an attention operand
            (``*.probs``, ``vision_encoder.layers.0.attn.key``) that activation.
        within: Module path; all sites elsewhere stay in floating point, whatever else is said here. Empty: none do.
    """

    default: Bits
    overrides: tuple[tuple[str, Bits], ...] = ()
    within: str = ""

    @classmethod
    def parse(cls, bits: str, overrides: dict[str, str] | None = None) -> BitPlan:
        """From text: ``parse("w4a4", {"*.probs": "w4a8"})``."""
        return cls(Bits.parse(bits), tuple((k, Bits.parse(v)) for k, v in (overrides or {}).items()))

    def check(self, sites: Sites) -> None:
        """Refuses overrides that match nothing.

        Raises:
            ConfigError: A pattern matches no site (a typo would otherwise pass in silence), or none that is quantized.
        """
        for pattern, _ in self.overrides:
            matched = _matched(pattern, sites)
            if not matched:
                raise ConfigError(
                    f"the bit setting {pattern!r} matches no site; site names look like "
                    f"{sites.layers[0].name!r} or {sites.attentions[-1].operand('probs')!r}."
                )
            if all(self.leaves(name) for name in matched):
                raise ConfigError(
                    f"the bit setting {pattern!r} matches only sites of the image encoder, which stays in floating "
                    "point when only the decoder is quantized; leave out this setting or --decoder-only."
                )

    def with_bits(self, bits: int) -> BitPlan:
        """The plan that leaves the same in floating point and gives all else these bits."""

        def but(given: Bits) -> Bits:
            return Bits(*(16 if each == 16 else bits for each in (given.weights, given.activations)))

        overrides = tuple((pattern, but(given)) for pattern, given in self.overrides)
        return replace(self, default=but(self.default), overrides=overrides)

    def among(self, sites: Sites) -> BitPlan:
        """The plan without the overrides that :meth:`check` would refuse for these sites, some of a model's."""
        kept = (each for each in self.overrides if not all(map(self.leaves, _matched(each[0], sites))))
        return replace(self, overrides=tuple(kept))

    def leaves(self, name: str) -> bool:
        """Whether a site lies where everything stays in floating point."""
        return bool(self.within) and not name.startswith(f"{self.within}.")

    def _bits(self, *names: str) -> Bits:
        if self.leaves(names[0]):
            return Bits(16, 16)
        found = self.default
        for pattern, bits in self.overrides:
            if any(fnmatchcase(name, pattern) for name in names):
                found = bits
        return found

    def weight_bits(self, layer: str) -> int:
        """Bits of a layer's weights."""
        return self._bits(layer).weights

    def activation_bits(self, site: str) -> int:
        """Bits of an activation site; a layer's own path stands for its input as well."""
        return self._bits(site, site.removesuffix(".input")).activations


def _matched(pattern: str, sites: Sites) -> list[str]:
    """Names of sites that a pattern means."""
    return [name for name in sites.names if fnmatchcase(name, pattern)]
