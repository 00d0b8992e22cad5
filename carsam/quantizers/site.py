"""What the quantizers of all activation sites have in common, whatever their grid."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from carsam.quantizers.affine import qmax
from carsam.quantizers.grid import Grid
from carsam.quantizers.ranges import Range
from carsam.quantizers.record import Record
from carsam.quantizers.simulation import channels_last, current, keep_mask_like


class FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with straight-through gradients for x and LSQ's for the scale (ICLR 2020).

    Every grid here is ``scale · G(x / scale)`` for a fixed set of values G, so one gradient serves all: d x̂/ds is
    (x̂ − x)/s inside the grid, x̂/s where clipped, 0 where not quantized (LSQ, equation 3).

    One Function instead of a chain of autograd operations: input and output, which their neighbours keep anyway, and a
    Boolean mask are all that is saved. Written in operations that the CPU vectorises: ``torch.where`` and products
    with Boolean masks cost ten to fifty times a multiplication there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, quantizer: SiteQuantizer, mask: Tensor | None) -> Tensor:
        """Grid of ``quantizer`` at ``scale`` (scalar or along the last dimension); ``mask``: elements to quantize."""
        out = quantizer.round(x, scale)
        if mask is not None:
            out = torch.lerp(x, out, mask.to(x.dtype))
        ctx.quantizer, ctx.masked = quantizer, mask is not None
        ctx.save_for_backward(x, out, scale, *([mask] if mask is not None else []))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, out, scale, *rest = ctx.saved_tensors
        # Values beyond the grid are clipped and pass no gradient.
        passed = _within(grad, *ctx.quantizer.position(x, scale))
        if ctx.masked:
            passed = torch.lerp(grad, passed, rest[0].to(grad.dtype))
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = ctx.quantizer.scale_gradient(grad, passed, x, out, scale)
        return passed if ctx.needs_input_grad[0] else None, grad_scale, None, None


def _within(grad: Tensor, values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The gradient where values lie within the ends of the grid, 0 elsewhere."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return grad.masked_fill((values <= low) | (values >= high), 0)
    return torch.ops.aten.hardtanh_backward(grad, values, low, high)


def _products(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Σ a · b over what shares a scale, in the shape of the scale."""
    if scale.dim() == 0:
        if channels_last(b):
            # As they lie in memory; the order of a sum is free.
            a, b = (each.permute(0, 2, 3, 1) for each in (a, b))
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).flatten(0, -2).sum(0)


class SiteQuantizer(Grid):
    """Quantizer of one activation site.

    The grid is a fixed set of values times ``scale``. Buffer ``scale`` (float32) is NaN until a grid is set. While a
    unit is reconstructed, :meth:`learn_scale` replaces it by a parameter; :meth:`settle` writes it back.

    Subclasses give the grid (:meth:`round`, :meth:`position`), what decides it beside the scale (further buffers), how
    it is calibrated (:meth:`record`), and the codes that the packed form stands for (:meth:`encode`, :meth:`decode`).

    Attributes:
        observer: Range search chosen for this very site, or its range; None takes the one that calibration asks for.
        learns_scale: Whether reconstruction learns the scale (LSQ); False keeps the one that calibration found.
        per_channel: Whether channels (the last dimension) have grids of their own.

    Args:
        bits: Bits of a code, 2 to 8; 16 leaves the site in floating point.
        always: Quantize regardless of the simulation (packed models).
    """

    learns_scale: ClassVar[bool] = True
    per_channel: ClassVar[bool] = False

    def __init__(self, bits: int, *, always: bool = False):
        super().__init__()
        self.bits = bits
        self.always = always
        self.observer: str | Range | None = None
        self.learned: nn.Parameter | None = None
        self.relative = True
        if bits < 16:
            self.register_buffer("scale", torch.tensor(float("nan")))

    def record(self) -> Record:
        """A fresh record: what calibration keeps of the site's values and makes a grid of."""
        raise NotImplementedError

    def round(self, x: Tensor, scale: Tensor) -> Tensor:
        """The values of the grid that ``x`` is quantized to; a new tensor."""
        raise NotImplementedError

    def position(self, x: Tensor, scale: Tensor) -> tuple[Tensor, float | Tensor, float | Tensor]:
        """``(values, low, high)``: an element is clipped where its value lies beyond ``[low, high]``.

        Ends that depend on the scale may be tensors (scalars).
        """
        raise NotImplementedError

    def scale_gradient(self, grad: Tensor, passed: Tensor, x: Tensor, out: Tensor, scale: Tensor) -> Tensor:
        """Gradient of the scale, in its shape.

        Args:
            grad: g, the gradient of the output.
            passed: What of it passes to the input: 0 where a value was clipped.
            x, out: Input x and output x̂; equal where nothing was quantized.
            scale: As :meth:`round` got it.
        """
        # Inside, clipped and not quantized: in all three cases g · d x̂/ds = (g · x̂ − passed · x)/s.
        return (_products(grad, out, scale) - _products(passed, x, scale)) / scale

    def origin(self) -> Tensor | float:
        """The value that stays where it is when the scale changes; it broadcasts against the site's values."""
        return 0.0

    def encode(self, x: Tensor) -> Tensor:
        """Codes of ``x``, integers in ``[0, 2^bits)`` (uint8, the shape of ``x``)."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) that codes stand for."""
        raise NotImplementedError

    @property
    def is_calibrated(self) -> bool:
        """Whether a grid has been set."""
        return self.bits >= 16 or bool(torch.isfinite(self.scale).all())

    def fault(self) -> str:
        if self.bits >= 16:
            return ""
        usable = self.scale.numel() > 0 and bool((torch.isfinite(self.scale) & (self.scale > 0)).all())
        if not usable:
            return "no usable scale"
        zero_point = getattr(self, "zero_point", None)
        return "no usable zero point" if zero_point is not None and int(zero_point.max()) > qmax(self.bits) else ""

    def clipped(self, x: Tensor) -> Tensor:
        """Boolean tensor of the elements that lie beyond the grid by more than half a step; all False at 16 bits."""
        if self.bits >= 16:
            return torch.zeros_like(x, dtype=torch.bool)
        values, low, high = self.position(x, self.step_along(x))
        return (values < low) | (values > high)

    def learn_scale(self, *, relative: bool = True) -> nn.Parameter:
        """Makes the scale a parameter: its logarithm if ``relative``, so that a learning rate means a share of it."""
        self.relative = relative
        value = self.scale.log() if relative else self.scale.clone()
        self.learned = nn.Parameter(value.detach().clone())
        return self.learned

    def advance(self, share: float) -> bool:
        """Told after every step which share of a unit's steps is done; a grid that changes on the way does so here.

        Returns:
            Whether it did.
        """
        return False

    def settle(self) -> None:
        """Ends learning: the learned scale becomes the buffer."""
        if self.learned is not None:
            self.scale.copy_(self.step().detach())
            self.learned = None

    def step(self) -> Tensor:
        """The scale in force, learned or fixed."""
        if self.learned is None:
            return self.scale
        return self.learned.exp() if self.relative else self.learned.clamp(min=1e-8)

    def step_along(self, x: Tensor) -> Tensor:
        """The scale in force as it broadcasts against ``x``."""
        return self.step()

    def load_grid(self, buffers: dict[str, Tensor]) -> None:
        """Takes over the buffers of another quantizer of this kind."""
        for name, value in buffers.items():
            self.register_buffer(name, value.to(self.scale.device).clone())

    def forward(self, x: Tensor, *, drop: bool = True, **context: Any) -> Tensor:
        """Quantizes and dequantizes ``x`` (any shape) where the simulation asks for it.

        Args:
            x: Activations.
            drop: Whether QDrop applies to them.
            context: What else an observer of the site wants to see.
        """
        state = current()
        if self.bits >= 16:
            return x
        if self.always:
            return self.round(x, self.step_along(x))
        if state.observe is not None:
            state.observe(self, x, **context)
        if not state.activations:
            return x
        if self.learned is None and not self.is_calibrated:
            if state.settled:
                return x
            raise RuntimeError("an activation quantizer has no range yet; did you run calibration first?")
        mask = keep_mask_like(x, state.drop) if drop and state.drop > 0 else None
        scale = self.step_along(x)
        if self.learned is not None and not self.relative:
            # LSQ's 1/sqrt(numel · qmax) keeps a scale's gradient comparable to a weight's.
            factor = (x.numel() * (2**self.bits - 1)) ** -0.5
            scale = scale * factor + (scale * (1 - factor)).detach()
        return FakeQuantize.apply(x, scale, self, mask)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
