"""A layer fitted again to its quantized input, in closed form (METHOD.md, 9). Pure functions of tensors.

X̂ are the layer's quantized inputs in the model quantized so far, X its inputs in the float model, rows of both samples;
a column of ones makes the bias the last row of W. Minimise over W*

    ‖ X W − X̂ W* ‖² + λ ‖ W* − W ‖²        W* = W + (X̂ᵀX̂ + λI)⁻¹ X̂ᵀ(X − X̂) W                                    (1)

With X = the layer's own input before its quantizer this is ERQ's refit (ICML 2024); with X from the float model errors
from upstream are met as well, which is GPTAQ's asymmetric form (arXiv 2504.02692). λ holds W* to W and not to zero:
along directions that calibration does not show, the layer stays what it is.

Rounding W* to integers then adds ‖ X̂ (W* − Ŵ) ‖², whatever W* fitted: the rest is orthogonal to X̂ (but for λ).
:func:`round_with_feedback` makes that small as GPTQ does (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carsam.errors import ConfigError
from carsam.quantizers.affine import decode, encode

# Rows of a weight whose rounding errors are handed on one by one before they reach the other rows at once.
BLOCK = 128


@dataclass
class LayerMoments:
    """Second moments of a layer's inputs, gathered sample by sample, in float64.

    Attributes:
        gram: Σ X̂ᵀX̂, (groups, d, d).
        cross: Σ X̂ᵀX, likewise.
        energy: Σ (X W)² of every output, (groups, out).
    """

    gram: Tensor | None = None
    cross: Tensor | None = None
    energy: Tensor | None = None

    def update(self, quantized: Tensor, floating: Tensor, outputs: Tensor) -> None:
        """Adds rows of samples.

        Args:
            quantized: X̂, (groups, rows, d): what each group of the layer's outputs is computed from.
            floating: X, likewise.
            outputs: X W, (groups, rows, out). They cost less than the moments of X would, where d is large.
        """
        transposed = quantized.transpose(-2, -1)
        found = (transposed @ quantized, transposed @ floating, outputs.double().square().sum(1))
        for name, value in zip(("gram", "cross", "energy"), found):
            before = getattr(self, name)
            setattr(self, name, value.double() if before is None else before.add_(value))

    def __add__(self, other: LayerMoments) -> LayerMoments:
        """Of the samples of both."""
        if other.gram is None:
            return self
        sums = (getattr(self, name) + getattr(other, name) for name in ("gram", "cross", "energy"))
        return LayerMoments(*sums)

    def of(self, outputs: slice) -> LayerMoments:
        """For some of the layer's outputs."""
        return LayerMoments(self.gram, self.cross, self.energy[:, outputs])


def ridge(moments: LayerMoments, relative: float, *, ones: bool) -> Tensor:
    """λ of every row of W, (groups, d): relative · mean diagonal; next to none for the row of the bias.

    The mean error of the outputs is known well from any calibration set, so nothing need hold the bias back.
    """
    if relative <= 0:
        raise ConfigError("the damping of the refit must be positive: its equations are singular without it.")
    diagonal = moments.gram.diagonal(dim1=-2, dim2=-1)
    inputs = diagonal[:, :-1] if ones else diagonal
    lam = (relative * inputs.mean(-1, keepdim=True)).clamp(min=1e-12).expand_as(diagonal).clone()
    if ones:
        lam[:, -1] = 1e-9 * diagonal[:, -1]
    return lam


def correct_bias(weight: Tensor, moments: LayerMoments) -> Tensor:
    """W with the mean error of the outputs taken out by its last row, the bias: (1) with endless damping of the others.

    Args:
        weight: W, (groups, d, out), the last column of the inputs one.
        moments: Gathered on calibration data.

    Returns:
        Of the shape of ``weight``, float64.
    """
    changed = weight.double().clone()
    missing = (moments.cross[:, -1:] - moments.gram[:, -1:]) @ changed
    changed[:, -1:] += missing / moments.gram[:, -1:, -1:]
    return changed


def refit(weight: Tensor, moments: LayerMoments, *, relative_damping: float = 0.01, ones: bool = True) -> Tensor:
    """W* of (1).

    Args:
        weight: W, (groups, d, out).
        moments: Gathered on calibration data.
        relative_damping: λ relative to the mean diagonal of X̂ᵀX̂.
        ones: The last column of the inputs is one, the last row of W the bias.

    Returns:
        Of the shape of ``weight``, float64.

    Raises:
        ConfigError: The damping is not positive.
    """
    if moments.gram is None:
        raise RuntimeError("no sample was gathered for the refit")
    weight = weight.double()
    lam = ridge(moments, relative_damping, ones=ones)
    right = (moments.cross - moments.gram) @ weight
    factor = torch.linalg.cholesky(moments.gram + torch.diag_embed(lam))
    return weight + torch.cholesky_solve(right, factor)


class Objective:
    """‖X W − X̂ W*‖² / ‖X W‖² over all groups for any W*, from the moments alone.

    Args:
        weight: W, (groups, d, out).
        moments: Of the layer's inputs.
    """

    def __init__(self, weight: Tensor, moments: LayerMoments):
        weight = weight.double()
        self._gram = moments.gram
        self._energy = moments.energy.sum().clamp(min=1e-30)
        self._mixed = moments.cross @ weight

    def error(self, fitted: Tensor) -> float:
        """The error of W*, (groups, d, out)."""
        fitted = fitted.double()
        found = self._energy - 2 * (fitted * self._mixed).sum() + (fitted * (self._gram @ fitted)).sum()
        return (found / self._energy).clamp(min=0).item()


def centred(gram: Tensor) -> Tensor:
    """The moments of d inputs around their mean, (groups, d, d), from those with a column of ones.

    It is what rounding W must respect where the bias takes up what moves all outputs alike.
    """
    sums, count = gram[:, :-1, -1], gram[:, -1:, -1]
    return gram[:, :-1, :-1] - sums[:, :, None] * sums[:, None, :] / count[:, :, None]


def round_with_feedback(
    weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, relative_damping: float = 0.01
) -> Tensor:
    """Codes of a weight with small ‖X̂ (W − Ŵ)‖²: rows are rounded one after the other, and what a row's rounding does
    to the outputs is handed on to the rows that are not rounded yet (GPTQ, arXiv 2210.17323, algorithm 1).

    Rows of the largest inputs come first: what comes last has nothing left to hand its error to. Where a grid ends,
    that can lose; an output that nearest rounding serves better is rounded so.

    Args:
        weight: W, (groups, d, out).
        gram: X̂ᵀX̂, (groups, d, d).
        scale, zero_point: Of every output channel, (groups, out).
        bits: Bits of a code.
        relative_damping: What is added to the diagonal of the gram, relative to its mean.

    Returns:
        Codes (groups, d, out), whole numbers in float64.
    """
    weight, gram = weight.double(), gram.double()
    scale, zero_point = scale.double(), zero_point.double()
    codes = _with_feedback(weight.clone(), gram, scale, zero_point, bits, relative_damping)
    nearest = encode(weight.clone(), scale[:, None], zero_point[:, None], bits)

    def errors(of: Tensor) -> Tensor:
        missing = decode(of, scale[:, None], zero_point[:, None]) - weight
        return (missing * (gram @ missing)).sum(1, keepdim=True)

    return torch.where(errors(codes) <= errors(nearest), codes, nearest)


def _with_feedback(
    weight: Tensor, gram: Tensor, scale: Tensor, zero_point: Tensor, bits: int, relative_damping: float
) -> Tensor:
    """The recursion of :func:`round_with_feedback`; changes ``weight``."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # An input that is always zero says nothing of its row, which rounds to nearest.
    lam = (relative_damping * diagonal.mean(-1, keepdim=True)).clamp(min=1e-12)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    gram = gram + torch.diag_embed(lam.expand_as(diagonal))
    gram = gram.gather(1, order[..., None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    weight = weight.gather(1, order[..., None].expand_as(weight))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(weight)
    size = weight.shape[1]
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        errors = torch.zeros_like(weight[:, begin:end])
        for row in range(begin, end):
            code = encode(weight[:, row], scale, zero_point, bits)
            codes[:, row] = code
            error = (weight[:, row] - decode(code, scale, zero_point)) / upper[:, row, row, None]
            weight[:, row:end] -= upper[:, row, row:end, None] * error[:, None]
            errors[:, row - begin] = error
        weight[:, end:] -= upper[:, begin:end, end:].transpose(-2, -1) @ errors
    return torch.empty_like(codes).scatter_(1, order[..., None].expand_as(codes), codes)
