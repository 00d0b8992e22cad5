"""Maps of heads and steps of Q, K, V and the output projection's input, learned by the attention's output error.

Q M and K M⁻ᵀ give the same scores for any invertible M of a head, and V R with R⁻¹ in the output projection the same
output (:mod:`carsam.transform.attention_equivalences`). The closed form (:mod:`carsam.transform.maps`) takes the errors
of all codes for alike. They are not: a key that a prompt attends to must not be clipped, and of a key's error only what
the queries see counts. So M, R and the steps are learned together, by straight-through gradients of the output's
squared error on calibration images (in the decoder weighed by what the masks make of it,
:mod:`carsam.calibrate.sensitivity`), and kept where images that they were not learned on lose less.

Everything is folded into the projections afterwards, and the steps go to their sites as ranges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.counted import Counted, uncounted
from carsam.calibrate.observers import RangeRecorder
from carsam.models.attention import MatMulQuantizers
from carsam.models.prepare import attach_attention
from carsam.models.sites import OPERANDS, AttentionSite, Sites, replace_module
from carsam.quantizers import ActivationQuantizer, SoftmaxQuantizer, simulate
from carsam.quantizers.ranges import Range
from carsam.transform import attention_equivalences as equivalences
from carsam.transform.calls import Call, Calls, call, island, small_calls, weighed
from carsam.transform.choice import LEAST_GAIN
from carsam.transform.maps import query_key_map, value_output_map
from carsam.transform.operands import Refused, heads_of, operand
from carsam.transform.statistics import ChannelStatistics, hooked, operand_statistics

# Adam's rates for the entries of a map, which are about one, and for the logarithm of a step.
MAP_RATE, STEP_RATE = 5e-3, 1e-2
# An attention whose output loses less than this share of its energy is left alone: at 8 bits nothing is to be won,
# while the mapped projections can be the harder to round (at 2 bits of weights, by 8 points of mean IoU). At 4 bits the
# attentions of LiteMedSAM's decoder lose 0.014 to 0.29, at 6 bits 0.002 to 0.03, at 8 bits 0.0001 to 0.0075.
LEAST_ERROR = 1e-2
# Held-out images judge what was learned so many times along the way, and the best is kept.
JUDGED = 4

MakeSoftmax = Callable[[str, str, int], SoftmaxQuantizer]
# M and R to start from; None for no map.
Start = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LearnedMaps:
    """What was learned at one attention.

    Attributes:
        query_key: M, (heads, d, d) float64; None where a map is not exact there.
        value_output: R, (heads, d, d) float64.
        ranges: By activation site.
        error: Of the attention's output on held-out images, relative to that without maps and with observed ranges.
    """

    query_key: Tensor | None
    value_output: Tensor | None
    ranges: dict[str, Range]
    error: float


class Maps(nn.Module):
    """M and R as parameters, and what they do to the operands.

    Args:
        site: The attention.
        heads: Its heads.
        query_key, value_output: Where to start, (heads, d, d); None for no map.
    """

    def __init__(self, site: AttentionSite, heads: int, query_key: Tensor | None, value_output: Tensor | None):
        super().__init__()
        self.heads = heads
        # One map for all heads where they share their relative positions.
        first = query_key[:1] if query_key is not None and site.positions else query_key
        self.first = None if first is None else nn.Parameter(first.float().clone())
        self.second = None if value_output is None else nn.Parameter(value_output.float().clone())

    def _along(self, x: Tensor, matrices: Tensor) -> Tensor:
        """x (..., tokens, d), heads before the tokens, perhaps in one dimension with the batch."""
        if x.dim() == 4 or len(matrices) == 1:
            return x @ matrices
        return (x.unflatten(0, (-1, self.heads)) @ matrices).flatten(0, 1)

    def query(self, x: Tensor) -> Tensor:
        return x if self.first is None else self._along(x, self.first)

    def key(self, x: Tensor) -> Tensor:
        return x if self.first is None else self._along(x, torch.linalg.inv(self.first).transpose(-2, -1))

    def value(self, x: Tensor) -> Tensor:
        return x if self.second is None else self._along(x, self.second)

    def output(self, x: Tensor) -> Tensor:
        """R⁻¹, before the output projection: x (..., channels)."""
        if self.second is None:
            return x
        return x @ torch.block_diag(*torch.linalg.inv(self.second))


class _Replay(nn.Module):
    """Gives again what a projection gave: maps change operands behind it, so it need not be computed in every step."""

    def __init__(self):
        super().__init__()
        self.outputs: list[Tensor] = []
        self.at = 0

    def forward(self, *_args: Tensor) -> Tensor:
        return self.outputs[self.at]


def _small(calls: Sequence[Call], weights: Sequence[Tensor | None], heads: int) -> Iterator[tuple[Call, Tensor | None]]:
    """Calls of few scores, with the weights of their rows."""
    for each, own in zip(calls, weights):
        for piece in small_calls(each, heads) if own is None else [each]:
            yield piece, own


class Learner:
    """One attention alone with quantized operands, and its output projection's input quantized too.

    Args:
        model: Float model, in which foldings are done.
        site: The attention.
        sites: Of the model.
        plan: Bits.
        calls: What the attention is called with.
        softmax: Makes the quantizer of P from its grid, its site and bits.
        grid: Of P.
        observer: Of ranges.
        ranges: Observers by activation site where they are not the usual one.
    """

    def __init__(
        self,
        model: nn.Module,
        site: AttentionSite,
        sites: Sites,
        plan: BitPlan,
        calls: Calls,
        softmax: MakeSoftmax,
        grid: str,
        observer: str,
        ranges: Mapping[str, Any],
    ):
        source, heads = model.get_submodule(site.name), heads_of(model, site)
        fit = list(_small(calls.fit, calls.fit_weights, heads))
        judge = list(_small(calls.judge, calls.judge_weights, heads))
        self._calls, self._observer = [each for each, _ in (*fit, *judge)], observer
        self._weights = [weights for _, weights in (*fit, *judge)]
        self._fit, self._judge = range(len(fit)), range(len(fit), len(self._calls))
        projections = {getattr(site, which).layer: _Replay() for which in OPERANDS[:3]}
        hooks = [(path, lambda _in, out, into=replay.outputs: into.append(out)) for path, replay in projections.items()]
        self.statistics, looking = operand_statistics(model, [site], pairs=True)
        with torch.no_grad(), hooked(model, hooks):
            with hooked(model, looking):
                self._targets = [call(source, each) for each, _ in fit]
            self._targets += [call(source, each) for each, _ in judge]
        self._replays = list(projections.values())
        copied = island(site.name, copy.deepcopy(source))
        self._names = [site.operand(which) for which in OPERANDS[:3]]
        layer = next((each for each in sites.layers if each.name == site.output), None)
        if layer is not None:
            self._names.append(layer.input)
        self._quantizers = [ActivationQuantizer(plan.activation_bits(name)) for name in self._names]
        for name, quantizer in zip(self._names, self._quantizers):
            quantizer.observer = ranges.get(name)
        probs = softmax(grid, site.operand("probs"), plan.activation_bits(site.operand("probs")))
        attach_attention(copied, site, sites, MatMulQuantizers(*self._quantizers[:3], probs))
        for path, replay in projections.items():
            replace_module(copied, path, replay)
        self._attention = copied.get_submodule(site.name).to(next(source.parameters()).device)
        self.device = next(source.parameters()).device
        self._output = copied.get_submodule(site.output)
        self._last = self._quantizers[3] if layer is not None else None
        if self._last is not None:
            self._last.to(self._output.weight.device)

    def _run(self, index: int) -> Tensor:
        for replay in self._replays:
            replay.at = index
        return call(self._attention, self._calls[index])

    @contextmanager
    def _mapped(self, maps: Maps) -> Iterator[None]:
        """While the block runs the attention, its operands go through the maps."""

        def last(_module: nn.Module, args: tuple) -> tuple:
            x = args[0] if self._last is None else self._last(args[0])
            return (maps.output(x), *args[1:])

        matmul = self._attention.matmul
        handles = [self._output.register_forward_pre_hook(last)]
        for quantizer, change in zip((matmul.query, matmul.key, matmul.value), (maps.query, maps.key, maps.value)):
            handles.append(
                quantizer.register_forward_pre_hook(lambda _module, args, change=change: (change(args[0]), *args[1:]))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, maps: Maps) -> None:
        """Sets ranges, and P's grid, to what the observers make of the fitting images' values."""
        recorder = RangeRecorder([self._attention, *([] if self._last is None else [self._last])])
        with self._mapped(maps), recorder.recording(), simulate(weights=False, activations=False):
            for index in self._fit:
                self._run(index)
        recorder.apply(self._observer)

    @torch.no_grad()
    def error(self, maps: Maps) -> float:
        """Σ (output − float output)² over the judging images."""
        with self._mapped(maps), simulate(weights=False, activations=True, drop=0.0):
            return sum(self._loss(index).item() for index in self._judge)

    def _loss(self, index: int) -> Tensor:
        """Σ (output − float output)² of one image, rows weighed."""
        return weighed(self._run(index) - self._targets[index], self._weights[index])

    def energy(self, indices: Sequence[int]) -> float:
        """Σ (float output − its mean)² a call: what a mean output explains is not the attention's to give."""
        targets = [(self._targets[index], self._weights[index]) for index in indices]
        return sum(weighed(each - each.mean(-2, keepdim=True), w).item() for each, w in targets) / len(targets)

    @property
    def judged_energy(self) -> float:
        """What errors of :meth:`error` are relative to."""
        return self.energy(self._judge) * len(self._judge)

    def learn(self, maps: Maps, steps: int, seed: int = 0) -> float:
        """Learns maps and steps, which are left at their best; the error there."""
        learned = [each.learn_scale() for each in self._quantizers if each.bits < 16]
        optimiser = torch.optim.Adam(
            [{"params": list(maps.parameters()), "lr": MAP_RATE}, {"params": learned, "lr": STEP_RATE}]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
        values = [*maps.parameters(), *learned]
        best, kept = self.error(maps), [each.detach().clone() for each in values]
        energy = max(self.energy(self._fit), 1e-20)
        draw = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(len(self._fit), generator=draw).tolist()
            index = order.pop()
            with torch.enable_grad(), self._mapped(maps), simulate(weights=False, activations=True, drop=0.0):
                loss = self._loss(index) / energy
                gradients = torch.autograd.grad(loss, values)
            for value, gradient in zip(values, gradients):
                value.grad = gradient
            optimiser.step()
            schedule.step()
            if (step + 1) % max(1, steps // JUDGED) == 0:
                error = self.error(maps)
                if error < best:
                    best, kept = error, [each.detach().clone() for each in values]
        with torch.no_grad():
            for value, good in zip(values, kept):
                value.copy_(good)
        for quantizer in self._quantizers:
            quantizer.settle()
        return best

    def ranges(self) -> dict[str, Range]:
        """Ends of the grids by activation site."""
        found = {}
        for name, quantizer in zip(self._names, self._quantizers):
            if quantizer.bits < 16:
                low, high = quantizer.limits()
                found[name] = Range(low * quantizer.scale.item(), high * quantizer.scale.item())
        return found


def starts(model: nn.Module, site: AttentionSite, found: Mapping[str, ChannelStatistics], heads: int) -> list[Start]:
    """No map, and the closed form of both; None for what is not exact at an attention."""
    query, value = operand(model, site, "query"), operand(model, site, "value")

    def same(size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64).expand(heads, size, size).clone()

    within = site.output.startswith(f"{site.name}.")
    plain, closed = same(value.head_dim) if within else None, None
    if within:
        weight = model.get_submodule(site.output).weight.detach()
        closed = value_output_map(found["value"].covariance.cpu(), weight.cpu(), heads)
    try:
        equivalences.check_mixing(site, "a learned map between the queries and keys of")
    except Refused:
        return [(None, plain), (None, closed)]
    moments = found["query"].moments.cpu(), found["key"].covariance.cpu()
    return [
        (same(query.head_dim), plain),
        (query_key_map(*moments, heads, shared=bool(site.positions)), closed),
    ]


def learn_attention(
    learner: Learner, site: AttentionSite, heads: int, begun: Sequence[Start], steps: int
) -> LearnedMaps | None:
    """Learns maps and steps of one attention from the better start; None where it is not better than no map.

    Args:
        learner: The attention alone.
        site: Its site.
        heads: Its heads.
        begun: Maps to start from; the first is that without any.
        steps: Optimiser steps.
    """
    errors = []
    for start in begun:
        maps = Maps(site, heads, *start).to(learner.device)
        learner.observe(maps)
        errors.append(learner.error(maps))
        if errors[0] < LEAST_ERROR * learner.judged_energy:
            return None
    better = min(range(len(begun)), key=errors.__getitem__)
    maps = Maps(site, heads, *begun[better]).to(learner.device)
    learner.observe(maps)
    error = learner.learn(maps, steps)
    if not error < (1 - LEAST_GAIN) * errors[0]:
        return None
    first, second = (None if each is None else each.detach().double().cpu() for each in (maps.first, maps.second))
    if first is not None:
        first = first.expand(heads, -1, -1).contiguous()
    return LearnedMaps(first, second, learner.ranges(), error / max(errors[0], 1e-30))


@torch.no_grad()
def learn_maps(
    model: nn.Module,
    sites: Sites,
    plan: BitPlan,
    calls: Mapping[str, Calls],
    *,
    softmax: MakeSoftmax,
    grids: Mapping[str, str],
    observer: str,
    ranges: Mapping[str, Any],
    steps: int,
    counted: Counted = uncounted,
) -> tuple[dict[str, Range], list[dict[str, Any]]]:
    """Learns maps of heads and ranges at every attention, and folds the maps into the model's weights.

    Args:
        model: Float model; changed in place to one that computes the same.
        sites: The sites to treat.
        plan: Bits.
        calls: What every attention is called with.
        softmax: Makes a quantizer of P from a grid's name, the site's name and bits.
        grids: Of P, by attention.
        observer: Of ranges to start from.
        ranges: Observers by activation site where they are not the usual one.
        steps: Optimiser steps an attention.
        counted: Given the attentions.

    Returns:
        Ranges by activation site, and a report for each attention.
    """
    found: dict[str, Range] = {}
    reports = []
    for site in counted(sites.attentions):
        seen = calls[site.name]
        bits = [plan.activation_bits(site.operand(which)) for which in OPERANDS]
        if not seen.fit or min(bits) >= 16 or site.name not in grids:
            continue
        heads = heads_of(model, site)
        learner = Learner(model, site, sites, plan, seen, softmax, grids[site.name], observer, ranges)
        operands = {which: learner.statistics[site.operand(which)] for which in OPERANDS[:3]}
        learned = learn_attention(learner, site, heads, starts(model, site, operands, heads), steps)
        if learned is None:
            reports.append({"transform": "learned maps", "attention": site.name, "kept": "none", "error": 1.0})
            continue
        kept = ["ranges"]
        for what, matrices, fold in (
            ("query-key", learned.query_key, partial(equivalences.map_query_key, model, site)),
            ("value-output", learned.value_output, partial(equivalences.map_value_output, model, site)),
        ):
            if matrices is not None:
                fold(matrices)
                kept.append(what)
        found.update(learned.ranges)
        report = {"transform": "learned maps", "attention": site.name, "kept": ", ".join(kept), "error": learned.error}
        reports.append(report)
    return found, reports
