"""Grids of weights and AdaRound's learned rounding (METHOD.md, 1 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.uniform import decode, encode, grid_from_range, qmax

# The stretch of AdaRound's rectified sigmoid (ICML 2020, equation 23).
ZETA, GAMMA = 1.1, -0.1


def weight_grid(weight: Tensor, bits: int, *, observer: str = "mse", power: float = 2.4) -> tuple[Tensor, Tensor]:
    """One grid per output channel, over the whole range or the share of it with the least error |w − ŵ|^power.

    Args:
        weight: (out, ...) weights.
        bits: Bits of a code.
        observer: ``mse`` searches 80 shrunken ranges as PTQ4SAM does; ``min-max`` takes the range.
        power: Exponent of the error.

    Returns:
        ``(scale, zero_point)``, each (out,), zero_point in ``[0, qmax]`` (as float).
    """
    rows = weight.detach().flatten(1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale, zero = grid_from_range(low, high, bits)
    if observer == "min-max":
        return scale, zero
    best = torch.full_like(low, torch.inf)
    for share in torch.linspace(0.2, 1.0, 81).flip(0).tolist():
        s, z = grid_from_range(low * share, high * share, bits)
        error = decode(encode(rows, s[:, None], z[:, None], bits), s[:, None], z[:, None]).sub_(rows).abs_()
        error = (error.pow_(power) if power != 2 else error.square_()).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(α) = clip(1.2 σ(α) − 0.1, 0, 1)."""
    return torch.sigmoid(alpha).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def initial_alpha(weight: Tensor, scale: Tensor) -> Tensor:
    """α with h(α) = frac(w / s), so that learning starts at the float weight; scale broadcasts against weight."""
    fraction = weight / scale
    fraction = fraction - fraction.floor()
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


class SoftRound(torch.autograd.Function):
    """ŵ = s · (clip(⌊w/s⌋ + h(α) + z, 0, qmax) − z); the gradient reaches α only."""

    @staticmethod
    def forward(ctx, alpha: Tensor, floor: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        """``floor`` is ⌊w/s⌋ + z, computed once; scale and zero point broadcast against it."""
        level = rectified_sigmoid(alpha).add_(floor)
        inside = (level >= 0) & (level <= qmax(bits))
        ctx.save_for_backward(alpha, scale, inside)
        return level.clamp_(0, qmax(bits)).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        alpha, scale, inside = ctx.saved_tensors
        return grad * scale * inside * sigmoid_slope(alpha), None, None, None, None


def sigmoid_slope(alpha: Tensor) -> Tensor:
    """dh/dα: zero where the rectified sigmoid is clipped."""
    p = torch.sigmoid(alpha)
    h = p * (ZETA - GAMMA) + GAMMA
    return (p * (1 - p)).mul_(ZETA - GAMMA).mul_((h > 0) & (h < 1))


def rounding_penalty_gradient(alpha: Tensor, beta: float) -> Tensor:
    """Gradient of Σ (1 − |2h(α) − 1|^β), AdaRound's equation 24, written out so that no graph is built for it."""
    centred = rectified_sigmoid(alpha).mul_(2).sub_(1)
    return sigmoid_slope(alpha).mul_(-2 * beta).mul_(centred.abs().pow_(beta - 1)).mul_(centred.sign())
