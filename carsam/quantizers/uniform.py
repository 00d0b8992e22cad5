"""The uniform affine grid (METHOD.md, 1): x̂ = s · (clip(round(x / s) + z, 0, qmax) − z)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.quantizers.simulation import current, keep_mask


def qmax(bits: int) -> int:
    """Largest code of ``bits`` bits."""
    return 2**bits - 1


def grid_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of the grid that spans a range, widened to contain zero.

    Args:
        low, high: Ends of the range, any (equal) shape.
        bits: Bits of a code.

    Returns:
        ``(scale, zero_point)`` of that shape; scale > 0, zero_point an integer in ``[0, qmax]`` (as float).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    # A site that only ever saw zeros still needs a grid: any positive step represents it exactly.
    scale = ((high - low) / qmax(bits)).clamp(min=1e-8)
    return scale, (-low / scale).round().clamp(0, qmax(bits))


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` (as float integers in ``[0, qmax]``); scale and zero point broadcast against ``x``."""
    return (x / scale).round_().add_(zero_point).clamp_(0, qmax(bits))


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of codes: ``scale · (codes − zero_point)``."""
    return (codes - zero_point) * scale


class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with straight-through gradients for x and LSQ's for the scale (ICLR 2020).

    One Function instead of a chain of autograd operations: input and output, which their neighbours keep anyway, and a
    Boolean mask are all that is saved. Written in operations that the CPU vectorises: ``torch.where`` and products
    with Boolean masks cost ten to fifty times a multiplication there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, low: float, high: float, mask: Tensor | None) -> Tensor:
        """Grid ``scale · [low, high]`` (integers, zero included); ``mask`` (or None for all): elements to quantize."""
        out = (x / scale).round_().clamp_(low, high).mul_(scale)
        if mask is not None:
            out = torch.lerp(x, out, mask.to(x.dtype))
        ctx.low, ctx.high, ctx.masked = low, high, mask is not None
        ctx.save_for_backward(x, out, scale, *([mask] if mask is not None else []))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out, scale, *rest = ctx.saved_tensors
        # Values that round to a code beyond the grid are clipped and pass no gradient.
        step = scale.item()
        passed = torch.ops.aten.hardtanh_backward(grad, x, step * (ctx.low - 0.5), step * (ctx.high + 0.5))
        if ctx.masked:
            passed = torch.lerp(grad, passed, rest[0].to(grad.dtype))
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # d x̂/ds is (x̂ − x)/s inside the range, x̂/s where clipped, 0 where not quantized (LSQ, equation 3): in all
            # three cases g · d x̂/ds = (g · x̂ − passed · x)/s, two scalar products.
            def dot(a: Tensor, b: Tensor) -> Tensor:
                return torch.dot(a.reshape(-1), b.reshape(-1))

            grad_scale = ((dot(grad, out) - dot(passed, x)) / scale).view_as(scale)
        return passed if ctx.needs_input_grad[0] else None, grad_scale, None, None, None


class ActivationQuantizer(nn.Module):
    """Per-tensor uniform quantizer of one activation site.

    Buffers ``scale`` (float32) and ``zero_point`` (uint8) are NaN and 0 until a range is set. While a unit is
    reconstructed, :meth:`learn_scale` replaces the buffer by a parameter; :meth:`settle` writes it back.

    Args:
        bits: Bits of a code, 2 to 8; 16 leaves the site in floating point.
        always: Quantize regardless of the simulation (packed models).
    """

    grid = "uniform"

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits = bits
        self.always = always
        self.learned: nn.Parameter | None = None
        self.relative = True
        self._limits: tuple[int, float, float] = (-1, 0.0, 0.0)
        if bits < 16:
            self.register_buffer("scale", torch.tensor(float("nan")))
            self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))

    def set_range(self, low: float, high: float) -> None:
        """Spans the grid over a range (widened to contain zero)."""
        scale, zero = grid_from_range(torch.tensor(low), torch.tensor(high), self.bits)
        self.set_grid(scale, zero)

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets step and zero point (scalars)."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.to(torch.uint8))

    @property
    def is_calibrated(self) -> bool:
        """Whether a range has been set."""
        return self.bits >= 16 or bool(torch.isfinite(self.scale))

    def learn_scale(self, *, relative: bool = True) -> nn.Parameter:
        """Makes the step a parameter: its logarithm if ``relative``, so that a learning rate means a share of it."""
        self.relative = relative
        value = self.scale.log() if relative else self.scale.clone()
        self.learned = nn.Parameter(value.detach().clone())
        return self.learned

    def settle(self) -> None:
        """Ends learning: the learned step becomes the buffer."""
        if self.learned is not None:
            self.scale.copy_(self.step().detach())
            self.learned = None

    def step(self) -> Tensor:
        """The step in force (scalar), learned or fixed."""
        if self.learned is None:
            return self.scale
        return self.learned.exp() if self.relative else self.learned.clamp(min=1e-8)

    def limits(self) -> tuple[float, float]:
        """Ends of the grid in steps, ``(−z, qmax − z)``: read from the buffer only after it changed."""
        version = self.zero_point._version
        if self._limits[0] != version:
            low = -float(self.zero_point)
            self._limits = (version, low, low + qmax(self.bits))
        return self._limits[1:]

    def forward(self, x: Tensor, *, drop: bool = True) -> Tensor:
        """Quantizes and dequantizes ``x`` (any shape) where the simulation asks for it.

        Args:
            x: Activations.
            drop: Whether QDrop applies to them.
        """
        state = current()
        if self.bits >= 16:
            return x
        if self.always:
            return (x / self.scale).round_().clamp_(*self.limits()).mul_(self.scale)
        if state.observe is not None:
            state.observe(self, x)
        if not state.activations:
            return x
        if self.learned is None and not self.is_calibrated:
            raise RuntimeError("an activation quantizer has no range yet; did you run calibration first?")
        mask = keep_mask(x.shape, state.drop, x.device) if drop and state.drop > 0 else None
        scale = self.step()
        if self.learned is not None and not self.relative:
            # LSQ's 1/sqrt(numel · qmax) keeps a step's gradient comparable to a weight's.
            factor = (x.numel() * qmax(self.bits)) ** -0.5
            scale = scale * factor + (scale * (1 - factor)).detach()
        return FakeQuantize.apply(x, scale, *self.limits(), mask)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
