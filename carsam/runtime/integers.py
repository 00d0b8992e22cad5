"""The integer arithmetic of a quantized Linear: what is folded beforehand, and a reference in torch.

A layer computes Σ_k (a − z_a)(w − z_w) on codes a of the input and w of a channel's weights, times the product of the
two steps. Tensor cores take signed bytes. Up to 7 bits the differences fit into one themselves. At 8 bits they do not:
codes are moved by 128, and the multiplication is corrected afterwards. With a' = a − 128, z_a' = z_a − 128, and the
same for w:

    Σ (a' − z_a')(w' − z_w') = Σ a'w' − z_a' Σ w' − z_w' Σ (a' − z_a')

The second term is known beforehand for every channel, the third needs one sum a row of the input. All of it is exact
in 32-bit integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.quantizers.affine import qmax
from carsam.quantizers.shifted import ShiftedQuantizer
from carsam.quantizers.uniform import ActivationQuantizer

# Codes of so many bits need no correction: code minus zero point fits into a signed byte.
EXACT_BITS = 7


def is_uniform(quantizer: nn.Module) -> bool:
    """Whether a quantizer has one step and one zero point for the whole tensor."""
    return isinstance(quantizer, ActivationQuantizer) and quantizer.grid == ActivationQuantizer.grid


def is_shifted(quantizer: nn.Module) -> bool:
    """Whether a quantizer has one step for the whole tensor, on values shifted per channel."""
    return isinstance(quantizer, ShiftedQuantizer) and quantizer.grid == ShiftedQuantizer.grid


@dataclass(frozen=True)
class InputGrid:
    """The grid of a layer's input, as kernels take it.

    A value x becomes the byte ``clip(round(x / scale), low, high) + shift``. Of a grid that is shifted per channel, x
    is what is left when the channel's shift is subtracted.

    Attributes:
        values: (4,) float32: scale, low, high, shift.
        zero_point: What stands for zero among the bytes (z_a').
    """

    values: Tensor
    zero_point: int

    @classmethod
    def of(cls, quantizer: ActivationQuantizer | ShiftedQuantizer) -> InputGrid:
        """The grid of a calibrated quantizer of at most 8 bits."""
        zero = 0 if is_shifted(quantizer) else int(quantizer.zero_point)
        shift = zero - 128 if quantizer.bits > EXACT_BITS else 0
        values = [float(quantizer.scale), float(-zero), float(qmax(quantizer.bits) - zero), float(shift)]
        return cls(torch.tensor(values, dtype=torch.float32, device=quantizer.scale.device), shift)


@dataclass(frozen=True)
class FoldedWeight:
    """A Linear's weights as kernels take them.

    Attributes:
        codes: (out, in) int8, w'.
        scale: (out,) float32, the product of the steps of input and weight.
        offset: (out,) int32, z_a' Σ_k w'.
        zero: (out,) int32, z_w'; None where it is zero in every channel, and no sums of rows are needed.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    zero: Tensor | None


def fold(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grid: InputGrid) -> FoldedWeight:
    """Folds what does not depend on the input.

    Args:
        codes: (out, in) uint8 codes of the weights.
        scale, zero_point: (out,) grid of each channel.
        bits: Bits of a code.
        grid: Of the layer's input.
    """
    zero = zero_point.to(torch.int32)
    if bits <= EXACT_BITS:
        moved, left = codes.to(torch.int32) - zero[:, None], None
    else:
        moved, left = codes.to(torch.int32) - 128, zero - 128
    offset = grid.zero_point * moved.sum(1, dtype=torch.int32)
    return FoldedWeight(moved.to(torch.int8), scale.float() * grid.values[0], offset.to(torch.int32), left)


def to_codes(x: Tensor, grid: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """The bytes of an input.

    Args:
        x: (..., in) floating point.
        grid: :attr:`InputGrid.values`.
        sums: Whether sums of rows are needed.

    Returns:
        (..., in) int8, and Σ_k (a' − z_a') as (...,) int32 or None.
    """
    scale, low, high, shift = grid.unbind()
    steps = torch.clamp((x.float() / scale).round(), low, high)
    # Whole numbers below 2^24 (255 in each of 65,000 channels): float32 adds them exactly.
    total = steps.sum(-1).to(torch.int32) if sums else None
    return (steps + shift).to(torch.int8), total


def multiply(a: Tensor, w: Tensor) -> Tensor:
    """Exact Σ_k a[m, k] w[n, k] of int8 matrices (m, k) and (n, k), as int32 (m, n)."""
    if a.device.type == "cpu" and hasattr(torch, "_int_mm"):
        return torch._int_mm(a, w.t())
    return (a.double() @ w.double().t()).to(torch.int32)


def linear_reference(
    a: Tensor, weight: FoldedWeight, sums: Tensor | None, bias: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the kernels of :mod:`carsam.runtime.linear` compute, in torch.

    Args:
        a: (m, in) int8, from :func:`to_codes`.
        weight: Of the layer.
        sums: (m,) int32, from :func:`to_codes`; needed where ``weight.zero`` is there.
        bias: (out,) or None.
        dtype: Of the result.

    Returns:
        (m, out).
    """
    total = multiply(a, weight.codes) - weight.offset
    if weight.zero is not None:
        total = total - sums[:, None] * weight.zero
    out = total.float() * weight.scale
    return (out if bias is None else out + bias.float()).to(dtype)


def gelu_codes_reference(out: Tensor, grid: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """GELU (the exact one), then the codes of the next layer's input."""
    return to_codes(F.gelu(out.float()), grid, sums)
