"""Grids of weights and AdaRound's learned rounding (METHOD.md, 1 and 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from carsam.quantizers.affine import decode, encode, grid_from_range, qmax

# The stretch of AdaRound's rectified sigmoid (ICML 2020, equation 23).
ZETA, GAMMA = 1.1, -0.1
# Weights whose grid is searched at once.
SEARCH_ELEMENTS = 2**16


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
    if observer == "min-max":
        return grid_from_range(rows.amin(1), rows.amax(1), bits)
    # Some rows at a time: the search makes hundreds of sweeps, and only what fits into the cache is swept fast.
    step = max(1, SEARCH_ELEMENTS // rows.shape[1])
    found = [_search_grid(part, bits, power) for part in rows.split(step)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_grid(rows: Tensor, bits: int, power: float) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale, zero = grid_from_range(low, high, bits)
    best = torch.full_like(low, torch.inf)
    for share in torch.linspace(0.2, 1.0, 81).flip(0).tolist():
        s, z = grid_from_range(low * share, high * share, bits)
        error = decode(encode(rows, s[:, None], z[:, None], bits), s[:, None], z[:, None]).sub_(rows).abs_()
        error = error.pow_(power).sum(1)
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
    """ŵ = s · (clip(⌊w/s⌋ + h(α) + z, 0, qmax) − z), and AdaRound's regulariser; the gradient reaches α only.

    The regulariser λ Σ (1 − |2h − 1|^β) (equation 24) enters as its gradient: its value is never needed, and written
    into this backward pass it shares h and dh/dα with the reconstruction loss instead of being a graph of its own.
    """

    @staticmethod
    def forward(ctx, alpha: Tensor, base: Tensor, span: Tensor, penalty: tuple[float, float] | None) -> Tensor:
        """ŵ = base + span · h(α).

        Args:
            alpha: (out, ...).
            base: Weight for h = 0.
            span: What h = 1 adds: the scale, or 0 where the grid ends (see :func:`rounding_span`).
            penalty: (λ, β), or None without the regulariser.
        """
        stretched = torch.sigmoid(alpha).mul_(ZETA - GAMMA).add_(GAMMA)
        ctx.penalty = penalty
        ctx.save_for_backward(stretched, span)
        return torch.addcmul(base, span, stretched.clamp(0, 1))

    @staticmethod
    def backward(ctx, grad: Tensor):
        stretched, span = ctx.saved_tensors
        grad = grad * span
        if ctx.penalty is not None:
            weight, beta = ctx.penalty
            centred = stretched.clamp(0, 1).mul_(2).sub_(1)
            grad.add_(centred.abs().pow_(beta - 1).copysign_(centred), alpha=-2 * beta * weight)
        # Through the clip (nothing where h is 0 or 1), then through the sigmoid, whose slope follows from its value.
        grad = torch.ops.aten.hardtanh_backward(grad, stretched, 0.0, 1.0)
        slope = (stretched - GAMMA).mul_(ZETA - stretched)
        return grad.mul_(slope).div_(ZETA - GAMMA), None, None, None


def rounding_span(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``(base, span)`` of :class:`SoftRound`: the weight rounded down, and what rounding up adds (0 beyond the grid).

    Args:
        weight: (out, ...).
        scale, zero_point: Broadcast against weight.
        bits: Bits of a code.
    """
    floor = (weight / scale).floor_().add_(zero_point)
    free = (floor >= 0) & (floor < qmax(bits))
    base = floor.clamp_(0, qmax(bits)).sub_(zero_point).mul_(scale)
    return base, free * scale
