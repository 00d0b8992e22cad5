"""The spread of a layer's outputs, given back where the refit took it.

Least squares from inputs with errors gives what is to be expected of the outputs, and that spreads less than they do
(attenuation, as of every regression on noisy inputs). Layer by layer all is drawn to its mean: masks' logits
to one far below zero, so masks shrink, small objects' the most. A factor for each output channel brings its variance
back to that of the float model, as REPAIR does for merged networks (arXiv 2211.08403); the mean stays. It goes into the
scale of the weights and the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carsam.compensate.passes import QuantizedPasses, grouped, matrix
from carsam.compensate.ridge import centred
from carsam.quantizers import QuantizedLayer

# An output that is next to constant in the quantized model cannot be brought back by a factor.
MOST = 2.0


@dataclass
class Spread:
    """Mean and variance of a layer's outputs, (groups, out) each; around zero where a layer has no bias."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, rows: int, *, ones: bool) -> Spread:
        """Of X W, from W (groups, d, out) and Σ XᵀX (groups, d, d) of some rows; with ``ones`` X ends in a column of
        ones."""
        weight = weight.double()
        if not ones:
            return cls(torch.zeros_like(weight[:, 0]), (weight * (gram @ weight)).sum(1) / rows)
        inputs = weight[:, :-1]
        mean = (gram[:, -1:] @ weight)[:, 0] / rows
        return cls(mean, (inputs * (centred(gram) @ inputs)).sum(1) / rows)


class OutputSums:
    """Sums over a layer's outputs, item by item."""

    def __init__(self):
        self.count = self.sums = self.squares = 0.0

    def update(self, rows: Tensor) -> None:
        """Adds outputs (groups, rows, out)."""
        rows = rows.double()
        self.count += rows.shape[1]
        self.sums = self.sums + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)

    def spread(self, *, ones: bool) -> Spread:
        """Around the mean; around zero unless the layer has a bias (``ones``)."""
        mean = self.sums / self.count if ones else torch.zeros_like(self.sums)
        return Spread(mean, self.squares / self.count - mean.square())


@torch.no_grad()
def restore(layer: QuantizedLayer, found: Spread, wanted: Spread, share: float) -> float:
    """Widens a layer's outputs where they spread less than they should.

    Args:
        layer: With its grid; weights on the grid stay on it.
        found: Of its outputs as it is.
        wanted: Of its outputs in the float model.
        share: Of the lost standard deviation, in logarithms, that is given back.

    Returns:
        The mean factor.
    """
    ratio = wanted.variance / found.variance.clamp(min=1e-30)
    gain = ratio.clamp(1, MOST**2) ** (share / 2)
    layer.widen(gain.flatten(), found.mean.flatten())
    return gain.mean().item()


@torch.no_grad()
def restore_layers(
    model: nn.Module,
    passes: QuantizedPasses,
    wanted: dict[str, Spread],
    share: float,
    together: Sequence[Sequence[str]] = (),
) -> None:
    """:func:`restore` for the layers of a unit whose weights are integers, one after the other."""
    layers: dict[str, QuantizedLayer] = {name: model.get_submodule(name) for name in passes.layers}
    for group in grouped(passes.layers, together):
        outputs = {name: OutputSums() for name in group}
        for rows in passes.rows(group):
            for name in group:
                outputs[name].update(rows[name] @ matrix(layers[name]))
        for name in group:
            restore(layers[name], outputs[name].spread(ones=layers[name].bias is not None), wanted[name], share)
