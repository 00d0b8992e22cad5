"""Linear and Conv2d under quantization: float weights, their grids, and the quantizer of the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import SoftRound, initial_alpha, rounding_span, weight_grid
from carsam.quantizers.simulation import current, product


def convolution(source: nn.Linear | nn.Conv2d) -> dict[str, Any] | None:
    """What ``conv2d`` takes beside input, weight and bias: stride, padding, dilation, groups; None for a Linear.

    Raises:
        TypeError: The layer is neither, or pads otherwise than by numbers of zeros.
    """
    if isinstance(source, nn.Linear):
        return None
    # Subclasses as well, but not ConvTranspose2d, whose weight has its output channels elsewhere.
    if not isinstance(source, nn.Conv2d):
        raise TypeError(f"only Linear and Conv2d layers can be quantized, not {type(source).__name__}")
    if source.padding_mode != "zeros":
        raise TypeError(f"only zero-padded Conv2d layers can be quantized, not padding_mode={source.padding_mode!r}")
    if isinstance(source.padding, str):
        raise TypeError(
            f"a Conv2d with padding={source.padding!r} cannot be quantized; build it with the number of zeros at each "
            "side (a kernel of k pads (k - 1) // 2 for 'same', 0 for 'valid')"
        )
    return {
        "stride": source.stride,
        "padding": source.padding,
        "dilation": source.dilation,
        "groups": source.groups,
    }


class QuantizedLayer(nn.Module):
    """A Linear or (grouped) Conv2d being quantized; it takes over the float layer's parameters under the same names.

    Life of the weights: floating point → grid fitted (:meth:`fit_weight`) → rounding learned or nearest →
    :meth:`freeze`, after which ``weight`` holds ``scale · (codes − zero_point)`` and ``codes`` the integers.

    Args:
        source: The float layer.
        weight_bits: Bits of a weight code (2 to 8, or 16 for floating point).
        input_quantizer: Quantizer of the layer's input.

    Raises:
        TypeError: As :func:`convolution`.
    """

    def __init__(self, source: nn.Linear | nn.Conv2d, weight_bits: int, input_quantizer: nn.Module):
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        self.weight_bits = weight_bits
        self.input_quantizer = input_quantizer
        self.conv = convolution(source)
        self.weight_scale: Tensor | None = None
        self.weight_zero_point: Tensor | None = None
        self.codes: Tensor | None = None
        self.alpha: nn.Parameter | None = None
        self.penalty: tuple[float, float] | None = None
        self._span: tuple[Tensor, Tensor] | None = None
        self._nearest: Tensor | None = None
        self._learned: nn.Parameter | None = None

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (self.weight.dim() - 1))

    def fit_weight(self, observer: str = "mse") -> None:
        """(Re)fits the weight grid to the current float weights."""
        assert self.codes is None, "weights are already integers"
        self._nearest = None
        if self.weight_bits < 16:
            self.weight_scale, self.weight_zero_point = weight_grid(self.weight, self.weight_bits, observer=observer)

    def learn_rounding(self) -> nn.Parameter | None:
        """Starts AdaRound; returns α, or None for a layer whose weights stay in floating point."""
        if self.weight_bits >= 16:
            return None
        scale, zero = self._per_channel(self.weight_scale), self._per_channel(self.weight_zero_point)
        self.alpha = nn.Parameter(initial_alpha(self.weight.detach(), scale))
        self._span = rounding_span(self.weight.detach(), scale, zero, self.weight_bits)
        self._nearest = None
        return self.alpha

    @torch.no_grad()
    def freeze(self) -> None:
        """Makes the weights integers: α ≥ 0 rounds up where rounding was learned, to nearest elsewhere."""
        if self.weight_bits >= 16 or self.codes is not None:
            return
        if self.weight_scale is None:
            raise RuntimeError("a weight has no grid yet; did you run calibration first?")
        scale, zero = self._per_channel(self.weight_scale), self._per_channel(self.weight_zero_point)
        if self.alpha is not None:
            base, span = self._span
            codes = encode(base + span * (self.alpha >= 0), scale, zero, self.weight_bits)
        else:
            codes = encode(self.weight, scale, zero, self.weight_bits)
        self.set_codes(codes.to(torch.uint8), self.weight_scale, self.weight_zero_point)

    def forget_rounding(self) -> None:
        """Says that the float weights were changed in place: what they round to is computed anew."""
        self._nearest = None

    @torch.no_grad()
    def set_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Takes integers (out, ...) uint8 with their grid (out,) as the weights, for good."""
        self.weight_scale, self.weight_zero_point, self.codes = scale, zero_point, codes
        self.alpha = self.penalty = self._span = self._nearest = None
        self.weight.copy_(decode(codes.float(), self._per_channel(scale), self._per_channel(zero_point)))

    @torch.no_grad()
    def widen(self, gain: Tensor, around: Tensor) -> None:
        """Multiplies every output channel's distance from a value, ``gain`` and ``around`` (out,); integers stay.

        Without a bias the value must be zero.
        """
        gain = gain.to(self.weight)
        if self.bias is not None:
            self.bias.mul_(gain).add_((1 - gain) * around.to(gain))
        if self.codes is not None:
            self.set_codes(self.codes, self.weight_scale * gain, self.weight_zero_point)
            return
        self.weight.mul_(self._per_channel(gain))
        if self.weight_scale is not None:
            self.weight_scale = self.weight_scale * gain
        self.forget_rounding()

    def learn_scales(self) -> nn.Parameter:
        """Makes the scales of integer weights a parameter, their logarithm relative to now; the integers stay."""
        assert self.codes is not None, "weights are no integers yet"
        self._learned = nn.Parameter(torch.zeros_like(self.weight_scale))
        return self._learned

    @torch.no_grad()
    def settle(self) -> None:
        """Ends learning of the scales."""
        if self._learned is not None:
            scale, self._learned = self.weight_scale * self._learned.exp(), None
            self.set_codes(self.codes, scale, self.weight_zero_point)

    def simulated_weight(self) -> Tensor:
        """The weights that the simulation asks for."""
        if self._learned is not None:
            # Weights are products with their scale, so those of another scale are these times its change.
            return self.weight * self._per_channel(self._learned.exp())
        if self.codes is not None or not current().weights or self.weight_bits >= 16:
            return self.weight
        if self.weight_scale is None:
            raise RuntimeError("a weight has no grid yet; did you run calibration first?")
        if self.alpha is not None:
            return SoftRound.apply(self.alpha, *self._span, self.penalty)
        if self._nearest is None:
            scale, zero = self._per_channel(self.weight_scale), self._per_channel(self.weight_zero_point)
            self._nearest = decode(encode(self.weight.detach(), scale, zero, self.weight_bits), scale, zero)
        return self._nearest

    def forward(self, x: Tensor) -> Tensor:
        """Linear: (..., in) → (..., out). Conv2d: (batch, in, h, w) → (batch, out, h', w')."""
        # Observers see what the input is multiplied with: some grids are judged by the layer's output.
        x, weight = self.input_quantizer(x, weight=self.weight), self.simulated_weight()
        if self.conv is None:
            return product(F.linear, x, weight, self.bias)
        return product(F.conv2d, x, weight, self.bias, **self.conv)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, weight_bits={self.weight_bits}"
