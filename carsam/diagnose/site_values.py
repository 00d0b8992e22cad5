"""Ranges, histograms, modes and clipping of every activation site, and the error of every layer's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carsam.diagnose.pair import Pair
from carsam.diagnose.results import Histogram, SiteValues, WeightResult
from carsam.methods.base import Method
from carsam.models.sites import OPERANDS, Sites
from carsam.pack.layers import PackedLayer
from carsam.quantizers import SiteQuantizer, SoftmaxQuantizer
from carsam.quantizers.sampling import strided
from carsam.transform.bimodal import count_modes

BINS = 64
# Values of one site kept from one call. Ends and clipped shares are exact.
SAMPLE_SIZE = 2**13
# Beyond every grid.
FAR = 1e30


@dataclass
class _Seen:
    """What came by at one site."""

    low: float = float("inf")
    high: float = float("-inf")
    clipped: int = 0
    count: int = 0
    samples: list[Tensor] = field(default_factory=list)

    def update(self, values: Tensor, quantizer: nn.Module) -> None:
        low, high = (end.item() for end in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if isinstance(quantizer, SiteQuantizer):  # row-maximum codes never clip
            self.clipped += int(quantizer.clipped(values).sum())
        self.count += values.numel()
        self.samples.append(strided(values.detach(), SAMPLE_SIZE).to("cpu", torch.float32).clone())


class ValueRecorder:
    """Watches what reaches the quantizers of a packed model while a ``with recorder.recording()`` block runs it.

    Args:
        packed: The packed model.
        sites: Its sites.
    """

    def __init__(self, packed: nn.Module, sites: Sites):
        self._quantizers: dict[str, nn.Module] = {}
        for site in sites.layers:
            layer = packed.get_submodule(site.name)
            if hasattr(layer, "input_quantizer"):
                self._quantizers[site.input] = layer.input_quantizer
        for site in sites.attentions:
            matmul = packed.get_submodule(site.name).matmul
            self._quantizers.update({site.operand(which): getattr(matmul, which) for which in OPERANDS})
        self._quantizers = {name: module for name, module in self._quantizers.items() if module.bits < 16}
        self._seen: dict[str, _Seen] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records every pass inside the block."""

        def hook_for(name: str, quantizer: nn.Module, is_softmax: bool):
            def look(_module: nn.Module, args: tuple) -> None:
                # A softmax grid is called with scores; what it quantizes are probabilities.
                values = torch.softmax(args[0], dim=-1) if is_softmax else args[0]
                self._seen.setdefault(name, _Seen()).update(values, quantizer)

            return look

        handles = []
        for name, module in self._quantizers.items():
            # A softmax may hand P to a quantizer of its own: no second softmax is needed to see it.
            quantizer = _site_quantizer(module) or module
            is_softmax = name.endswith(".probs") and quantizer is module
            handles.append(quantizer.register_forward_pre_hook(hook_for(name, quantizer, is_softmax)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def results(self) -> tuple[SiteValues, ...]:
        """The values of the sites that were seen, in execution order."""
        return tuple(self._result(name, seen) for name, seen in self._seen.items())

    def _result(self, name: str, seen: _Seen) -> SiteValues:
        module = self._quantizers[name]
        sample = torch.cat(seen.samples)
        grid_low, grid_high = grid_ends(module)
        return SiteValues(
            site=name,
            grid=module.grid,
            bits=module.bits,
            low=seen.low,
            high=seen.high,
            grid_low=grid_low,
            grid_high=grid_high,
            clipped=seen.clipped / seen.count,
            modes=count_modes(sample),
            histogram=histogram(sample, seen.low, seen.high),
        )


def histogram(sample: Tensor, low: float, high: float, bins: int = BINS) -> Histogram:
    """Counts of a sample, (n,), from ``low`` to ``high``; all in the first bin where these are equal."""
    if not high > low:
        return Histogram(low, high, (sample.numel(), *[0] * (bins - 1)))
    counts = torch.histc(sample.double(), bins, low, high)
    return Histogram(low, high, tuple(int(count) for count in counts.tolist()))


def grid_ends(quantizer: nn.Module) -> tuple[float | None, float | None]:
    """Least and largest value of a site's grid; (None, None) where groups of channels or rows have their own."""
    inner = _site_quantizer(quantizer)
    if inner is None or inner.per_channel:
        return None, None
    far = torch.tensor([-FAR, FAR], device=inner.scale.device)
    low, high = inner.round(far, inner.scale).tolist()
    return low, high


def _site_quantizer(quantizer: nn.Module) -> SiteQuantizer | None:
    return quantizer.site_quantizer() if isinstance(quantizer, SoftmaxQuantizer) else quantizer


def weight_results(pair: Pair) -> tuple[WeightResult, ...]:
    """The error of every packed layer's weights; compensation by MAC counts as error.

    None where it is as large as the weights and the method transforms them: then the two are not comparable.
    """
    results = []
    transformed = type(pair.method).transform is not Method.transform
    for site in pair.sites.layers:
        layer = pair.packed.get_submodule(site.name)
        if isinstance(layer, PackedLayer):
            weight = layer.dequantized_weight()
            error = weight_error(weight, pair.source.get_submodule(site.name).weight)
            if transformed and error >= 1:
                error = None
            results.append(WeightResult(site.name, layer.weight_bits, weight.numel(), error))
    return tuple(results)


def weight_error(quantized: Tensor, floating: Tensor) -> float:
    """Σ (ŵ − w)² / Σ w², where BIG's flips of whole output channels do not count.

    Args:
        quantized, floating: (out, ...) weights.
    """
    quantized, floating = quantized.flatten(1).double(), floating.flatten(1).double()
    error = torch.minimum((quantized - floating).square().sum(1), (quantized + floating).square().sum(1)).sum()
    return (error / floating.square().sum().clamp(min=1e-30)).item()
