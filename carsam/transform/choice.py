"""Which equivalences and which grid of P serve an attention best, by the error of its output on held-out images.

No folding is best everywhere. Centred values lose nothing where a row of P rounds to zero. But they spread less, so
that a range by their own squared error is narrower, and the few values far out that it clips can be the ones that a
prompt attends to (docs/BEYOND.md has the numbers). So each attention is tried alone, with quantized inputs of its two
MatMuls, and keeps the foldings, the ranges and the grid of P with the least error on calibration images that the ranges
were not set on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.counted import Counted, uncounted
from carsam.calibrate.observers import RangeRecorder
from carsam.calibrate.sensitivity import MaskSensitivity
from carsam.models.attention import MatMulQuantizers
from carsam.models.prepare import attach_attention
from carsam.models.sites import OPERANDS, AttentionSite, Sites
from carsam.quantizers import ActivationQuantizer, SoftmaxQuantizer, simulate
from carsam.quantizers.ranges import Range
from carsam.quantizers.shifted import Shift
from carsam.transform import attention_equivalences as equivalences
from carsam.transform.calls import Calls, call, island, weighed
from carsam.transform.maps import query_key_map, value_output_map
from carsam.transform.operands import Refused, operand
from carsam.transform.rotation import hadamard
from carsam.transform.statistics import ChannelStatistics

# A folding must lower the error by this share: what is about as good is left out.
LEAST_GAIN = 0.02
# Grid of P, if it may be chosen, where nothing can be tried.
UNSEEN = "row-max"

Folding = Callable[[nn.Module, AttentionSite, Mapping[str, ChannelStatistics]], None]


def fold_keys(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Centres the keys at their mean over the calibration set."""
    equivalences.centre_keys(model, site, found["key"].mean)


def fold_values(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Centres the values at their mean."""
    equivalences.centre_values(model, site, found["value"].mean)


def fold_balance(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Balances Q against K."""
    heads = operand(model, site, "query").heads
    factor = equivalences.balance(found["query"], found["key"], heads, shared=bool(site.positions))
    equivalences.scale_query_key(model, site, factor)


def fold_even_values(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Gives the channels of V one spread."""
    heads = operand(model, site, "value").heads
    equivalences.scale_value_output(model, site, equivalences.even_values(found["value"], True, heads))


def fold_hadamard(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Turns Q with K, and V with the output projection, by a Hadamard matrix."""
    part = operand(model, site, "query")
    equivalences.map_query_key(model, site, hadamard(part.head_dim).expand(part.heads, -1, -1))
    part = operand(model, site, "value")
    equivalences.map_value_output(model, site, hadamard(part.head_dim).expand(part.heads, -1, -1))


def fold_key_map(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Maps Q and K to second moments that are the same, in channels of one size."""
    heads = operand(model, site, "query").heads
    moments = found["query"].moments, found["key"].covariance
    equivalences.map_query_key(model, site, query_key_map(*moments, heads, shared=bool(site.positions)))


def fold_value_map(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics]) -> None:
    """Maps V against the output projection in the same way."""
    heads, weight = operand(model, site, "value").heads, model.get_submodule(site.output).weight
    equivalences.map_value_output(model, site, value_output_map(found["value"].covariance, weight.detach(), heads))


# In the order in which they are tried; each is kept on top of those before it where it helps.
FOLDINGS: dict[str, Folding] = {
    "centre values": fold_values,
    "centre keys": fold_keys,
    "map keys": fold_key_map,
    "map values": fold_value_map,
    "balance": fold_balance,
    "even values": fold_even_values,
    "hadamard": fold_hadamard,
}


# The operand whose range a folding changes most.
CHANGES = {
    "centre values": "value",
    "centre keys": "key",
    "map keys": "key",
    "map values": "value",
    "balance": "query",
    "even values": "value",
    "hadamard": "value",
}
# What is not tried any more once another is kept: it would read statistics of channels that are mixed by then.
REPLACED = {"balance": "map keys", "even values": "map values", "hadamard": "map keys"}
MAPS = ("map keys", "map values")


@dataclass(frozen=True)
class Choices:
    """What was chosen for a model's attentions.

    Attributes:
        softmax: Grid of the softmax output by attention.
        ranges: Observer by activation site where it is not the usual one, the range itself, or that it is shifted.
        reports: One mapping an attention, and one for every folding that was refused.
        sensitivity: What the masks make of errors, where it was asked.
    """

    softmax: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, str | Range | Shift] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: MaskSensitivity | None = None


class Trial:
    """One attention alone: the error of its output with quantized inputs of its MatMuls."""

    def __init__(
        self,
        model: nn.Module,
        site: AttentionSite,
        sites: Sites,
        plan: BitPlan,
        calls: Calls,
        softmax: Callable[[str, str, int], SoftmaxQuantizer],
        observer: str,
    ):
        self._site, self._sites, self._calls = site, sites, calls
        self._softmax, self._observer = softmax, observer
        # Weights and the layers' inputs stay in floating point: foldings are for Q, K, V and P.
        self._bits = {which: plan.activation_bits(site.operand(which)) for which in OPERANDS}
        self.quantizes = min(self._bits.values()) < 16
        self._targets = [call(model.get_submodule(site.name), each) for each in calls.judge]

    @property
    def energy(self) -> float:
        """Σ (float output − its mean)² over the judges' images: what errors are relative to."""
        each = zip(self._targets, self._calls.judge_weights)
        return sum(weighed(target - target.mean(-2, keepdim=True), weights).item() for target, weights in each)

    def error(self, module: nn.Module, grid: str, ranges: Mapping[str, str] | None = None) -> float:
        """Σ (output − float output)² over the judges' images, of a float attention when it is quantized.

        Args:
            module: The attention, or an equivalent of it.
            grid: Of P.
            ranges: Observers by operand where they are not the usual one.
        """
        model = island(self._site.name, copy.deepcopy(module))
        operands = [ActivationQuantizer(self._bits[which]) for which in OPERANDS[:3]]
        probs = self._softmax(grid, self._site.operand("probs"), self._bits["probs"])
        attach_attention(model, self._site, self._sites, MatMulQuantizers(*operands, probs))
        attention = model.get_submodule(self._site.name).to(next(module.parameters()).device)
        for which, observer in (ranges or {}).items():
            getattr(attention.matmul, which).observer = observer
        recorder = RangeRecorder([attention])
        with recorder.recording(), simulate(weights=False, activations=False):
            for each in self._calls.fit:
                call(attention, each)
        recorder.apply(self._observer)
        with simulate(weights=False, activations=True, drop=0.0):
            outputs = [call(attention, each) for each in self._calls.judge]
        each = zip(outputs, self._targets, self._calls.judge_weights)
        return sum(weighed(out - target, weights).item() for out, target, weights in each)


class Search:
    """The search at one attention: whatever lowers the error on held-out images is kept, one thing after the other.

    Args:
        trial: The attention alone.
        module: The attention, in the model; what is folded goes into its weights.
        grids: Grids of P to choose from; the first is the one to beat.
        observers: Range searches to choose from for Q, K and V; the first is the usual one.
    """

    def __init__(self, trial: Trial, module: nn.Module, grids: Sequence[str], observers: Sequence[str]):
        self._trial, self._module = trial, module
        self._grids, self._observers = grids, observers
        self.grid, self.ranges, self.kept = grids[0], dict[str, str](), list[str]()
        self.first = self.best = trial.error(module, grids[0])

    def _keep(self, error: float, share: float = 1 - LEAST_GAIN) -> bool:
        """Whether an error is better by enough; it is the one to beat then."""
        if error < share * self.best:
            self.best = error
            return True
        return False

    def choose_grid(self) -> None:
        """Tries the other grids of P."""
        for grid in self._grids:
            if grid != self.grid and self._keep(self._trial.error(self._module, grid, self.ranges)):
                self.grid = grid

    def choose_ranges(self, operands: Sequence[str]) -> None:
        """Tries the other observers at some operands."""
        for which in operands:
            for observer in self._observers:
                ranges = {**self.ranges, which: observer}
                if observer != self.ranges.get(which, self._observers[0]) and self._keep(
                    self._trial.error(self._module, self.grid, ranges)
                ):
                    self.ranges = ranges

    def fold(self, name: str, change: Callable[[nn.Module], None]) -> bool:
        """Tries a folding, with the ranges as they are and with each of the other observers at what it changes."""
        attempt = copy.deepcopy(self._module)
        change(attempt)
        trials = [self.ranges, *({**self.ranges, CHANGES[name]: observer} for observer in self._observers)]
        errors = [self._trial.error(attempt, self.grid, ranges) for ranges in trials]
        if not self._keep(min(errors)):
            return False
        self.ranges = trials[errors.index(min(errors))]
        self.kept.append(name)
        for mine, other in zip(self._module.parameters(), attempt.parameters()):
            mine.copy_(other)  # the module stays the model's own
        return True


@torch.no_grad()
def choose_foldings(
    model: nn.Module,
    sites: Sites,
    plan: BitPlan,
    calls: Mapping[str, Calls],
    statistics: Mapping[str, ChannelStatistics],
    *,
    foldings: Sequence[str],
    grids: Sequence[str],
    softmax: Callable[[str, str, int], SoftmaxQuantizer],
    observer: str = "mse",
    observers: Sequence[str] = (),
    strict: bool = False,
    counted: Counted = uncounted,
) -> Choices:
    """Chooses for every attention, and folds what was chosen into the model's weights.

    Args:
        model: Float model; changed in place to one that computes the same.
        sites: The sites to treat.
        plan: Bits: what stays in floating point is left alone.
        calls: What every attention is called with.
        statistics: Of queries, keys and values by site; with products of pairs where a map needs them.
        foldings: Names from :data:`FOLDINGS` to try, in their order there.
        grids: Grids of softmax outputs to try; the first is the one to beat.
        softmax: Makes a quantizer from a grid's name, the site's name and bits.
        observer: Of the ranges.
        observers: Other range searches to try for queries, keys and values.
        strict: Raise where an equivalence is refused, instead of noting it.
        counted: Given the attentions.

    Returns:
        Grids and ranges by attention and operand, and what happened.

    Raises:
        Refused: With ``strict``.
    """
    choices = Choices()
    observers = (observer, *(each for each in observers if each != observer))
    for site in counted(sites.attentions):
        seen = calls[site.name]
        if not seen.fit:  # a pass over an image does not reach it: the memory of a video
            # Rows of P over thousands of tokens differ so much that one uniform step rounds a sixth of their mass away
            # (docs/RESULTS.md, 18); codes relative to each row's maximum need no range to be tried on.
            grid = UNSEEN if UNSEEN in grids else grids[0]
            if plan.activation_bits(site.operand("probs")) < 16:
                choices.softmax[site.name] = grid
            choices.reports.append(
                {
                    "transform": "foldings",
                    "attention": site.name,
                    "kept": "none: no image reaches it",
                    "softmax": grid,
                }
            )
            continue
        trial = Trial(model, site, sites, plan, seen, softmax, observer)
        if not trial.quantizes:
            continue
        search = Search(trial, model.get_submodule(site.name), grids, observers)
        found = {which: statistics[site.operand(which)] for which in OPERANDS[:3]}
        search.choose_grid()
        search.choose_ranges(("value", "key", "query"))
        for name in (name for name in FOLDINGS if name in foldings):
            # Each reads what those before it leave as it was: means before centring, spreads before scales.
            if REPLACED.get(name) in search.kept:
                continue

            def change(attempt: nn.Module, name: str = name, site: AttentionSite = site, found: Any = found) -> None:
                FOLDINGS[name](island(site.name, attempt), site, found)

            try:
                search.fold(name, change)
            except Refused as refusal:
                if strict:
                    raise
                choices.reports.append({"transform": name, "attention": site.name, "refused": str(refusal)})
        if search.kept:
            search.choose_grid()
        choices.softmax[site.name] = search.grid
        choices.ranges.update({site.operand(which): each for which, each in search.ranges.items()})
        choices.reports.append(
            {
                "transform": "foldings",
                "attention": site.name,
                "kept": ", ".join(search.kept) or "none",
                "softmax": search.grid,
                "ranges": ", ".join(f"{which} {each}" for which, each in search.ranges.items()) or observer,
                "error": search.best / max(search.first, 1e-30),
            }
        )
    return choices
