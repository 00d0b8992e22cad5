"""Quantizers of the softmax output P, from the scores: the second MatMul of an attention reads what these return.

Called as ``quantizer(scores, value=V)``: which granularity serves best depends on what P is multiplied with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carsam.quantizers.simulation import current, keep_mask
from carsam.quantizers.site import SiteQuantizer
from carsam.quantizers.uniform import ActivationQuantizer, qmax


class UniformSoftmax(nn.Module):
    """softmax, then a uniform per-tensor quantizer (the setting of the paper)."""

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.quantizer = ActivationQuantizer(bits, always=always)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.quantizer.bits

    def spec(self) -> dict[str, Any]:
        """As :meth:`SiteQuantizer.spec`."""
        return self.quantizer.spec()

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        return self.quantizer(torch.softmax(scores, dim=-1), drop=current().drop_probs)


class RowMaximumSoftmax(nn.Module):
    """Codes relative to each row's maximum (METHOD.md, 9): codes = round(qmax · exp(S − max S)), divided by their sum.

    The step is 1/qmax for every row, so a head that attends broadly keeps its codes where a per-tensor grid rounds them
    to zero. Nothing is calibrated, and the row's sum is exact, so the quantized rows sum to one.
    """

    grid = "row-max"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits = bits
        self.always = always

    def spec(self) -> dict[str, Any]:
        """As :meth:`SiteQuantizer.spec`."""
        return {"grid": self.grid, "bits": self.bits}

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys)."""
        state = current()
        if self.bits >= 16 or not (self.always or state.activations):
            return torch.softmax(scores, dim=-1)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
        dropped = state.drop > 0 and state.drop_probs and not self.always
        mask = keep_mask(weights.shape, state.drop, weights.device) if dropped else None
        codes = _RoundToUnit.apply(weights, qmax(self.bits), mask)
        return codes / codes.sum(dim=-1, keepdim=True)


class _RoundToUnit(torch.autograd.Function):
    """round(x · levels) / levels for x in [0, 1], straight-through."""

    @staticmethod
    def forward(ctx, x: Tensor, levels: int, mask: Tensor | None) -> Tensor:
        out = (x * levels).round_().div_(levels)
        return out if mask is None else torch.lerp(x, out, mask.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


class Log2Softmax(SiteQuantizer):
    """AGQ, Adaptive Granularity Quantization (PTQ4SAM, CVPR 2024, arXiv 2405.03144).

    P̂ = scale · 2^(−q/τ), q = clip(round(−τ log2(P/scale)), 0, qmax): with τ = 1 codes reach far down, with τ = 4 they
    are dense near the top. No code is zero; the least value is scale · 2^(−qmax/τ).

    Buffers: ``scale`` (float32 scalar), the largest probability; ``tau`` (uint8 scalar).
    """

    grid = "log2"
    TAUS = (1, 2, 4)

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__(bits, always=always)
        if bits < 16:
            self.register_buffer("tau", torch.tensor(1, dtype=torch.uint8))

    def set_grid(self, scale: Tensor, tau: int) -> None:
        """Sets the largest value (scalar) and the granularity."""
        assert tau in self.TAUS
        self.load_grid({"scale": scale.float(), "tau": torch.tensor(tau, dtype=torch.uint8)})

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        return round_log2(x, scale, int(self.tau), self.bits)

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float, float]:
        # Half a code beyond either end, in the logarithm.
        tau, top = int(self.tau), scale.item()
        return x, top * 2.0 ** (-(qmax(self.bits) + 0.5) / tau), top * 2.0 ** (0.5 / tau)

    def encode(self, x: Tensor) -> Tensor:
        return log2_exponent(x, self.scale, int(self.tau), self.bits).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.exp2(codes.float() / -int(self.tau)) * self.scale

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention from scores (..., queries, keys); observers also see ``value`` (..., keys, dim)."""
        return super().forward(torch.softmax(scores, dim=-1), drop=current().drop_probs, value=value)


def log2_exponent(x: Tensor, scale: Tensor, tau: int, bits: int) -> Tensor:
    """q = clip(round(−τ log2(x/scale)), 0, qmax), as a new float tensor."""
    # The floor only keeps the logarithm finite: far below the last code.
    return (x / scale).clamp_(min=1e-30).log2_().mul_(-tau).round_().clamp_(0, qmax(bits))


def round_log2(x: Tensor, scale: Tensor, tau: int, bits: int) -> Tensor:
    """scale · 2^(−q/τ) for the q of :func:`log2_exponent`; a new tensor."""
    return log2_exponent(x, scale, tau, bits).div_(-tau).exp2_().mul_(scale)


SOFTMAX_GRIDS = {kind.grid: kind for kind in (UniformSoftmax, RowMaximumSoftmax, Log2Softmax)}
