"""The layer of a packed model: its weights are the integers of the file, nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carsam.pack.bits import pack_codes, packed_size, unpack_codes
from carsam.quantizers.affine import decode
from carsam.quantizers.layers import QuantizedLayer, convolution


class PackedLayer(nn.Module):
    """Linear or (grouped) Conv2d from packed integer weights; its input is always quantized.

    Buffers: ``weight`` (bytes, see :mod:`carsam.pack.bits`), ``weight_scale`` (out,) float32, ``weight_zero_point``
    (out,) uint8; ``bias`` (out,) or None. ``weight`` is one-dimensional whatever the bits: loaded by transformers
    without carsam, its shape cannot be mistaken for the float weight's, so loading stops instead of going on with
    codes as weights.

    Args:
        shape: Shape of the float weight.
        weight_bits: Bits of a code.
        input_quantizer: Quantizer of the input.
        conv: Conv2d's stride, padding, dilation and groups; None for a Linear.
        bias: Whether there is one.
        device: Where the buffers are made.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        weight_bits: int,
        input_quantizer: nn.Module,
        conv: dict | None,
        bias: bool,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.shape, self.weight_bits, self.conv = tuple(shape), weight_bits, conv
        self.input_quantizer = input_quantizer
        out = self.shape[0]
        size = packed_size(torch.Size(self.shape).numel(), weight_bits)
        self.register_buffer("weight", torch.zeros(size, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.full((out,), float("nan"), device=device))
        self.register_buffer("weight_zero_point", torch.zeros(out, dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.zeros(out, device=device), requires_grad=False) if bias else None
        self._dequantized: Tensor | None = None

    @classmethod
    def like(cls, layer: nn.Linear | nn.Conv2d, weight_bits: int, input_quantizer: nn.Module) -> PackedLayer:
        """An empty packed layer in the place of a float layer."""
        shape, bias = tuple(layer.weight.shape), layer.bias is not None
        return cls(shape, weight_bits, input_quantizer, convolution(layer), bias, layer.weight.device)

    @classmethod
    def from_quantized(cls, layer: QuantizedLayer) -> PackedLayer:
        """Packs a layer whose weights are integers.

        Raises:
            RuntimeError: They are not yet.
        """
        if layer.codes is None:
            raise RuntimeError("a weight is not an integer yet; run the pipeline's reconstruction (or freeze) first")
        bias = layer.bias is not None
        device = layer.weight.device
        packed = cls(tuple(layer.weight.shape), layer.weight_bits, layer.input_quantizer, layer.conv, bias, device)
        packed.weight.copy_(pack_codes(layer.codes, layer.weight_bits))
        packed.weight_scale.copy_(layer.weight_scale)
        packed.weight_zero_point.copy_(layer.weight_zero_point.to(torch.uint8))
        if bias:
            packed.bias.copy_(layer.bias.detach())
        return packed

    def integer_weight(self) -> Tensor:
        """The codes, (out, ...) uint8."""
        return unpack_codes(self.weight, self.weight_bits, torch.Size(self.shape).numel()).view(self.shape)

    def dequantized_weight(self) -> Tensor:
        """``scale · (codes − zero_point)``, computed once and kept while the scale stays on its device."""
        if self._dequantized is None or self._dequantized.device != self.weight.device:
            channel = (-1, *[1] * (len(self.shape) - 1))
            scale, zero = self.weight_scale.view(channel), self.weight_zero_point.view(channel)
            self._dequantized = decode(self.integer_weight().to(scale.dtype), scale, zero)
        return self._dequantized

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._dequantized = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Linear: (..., in) → (..., out). Conv2d: (batch, in, h, w) → (batch, out, h', w')."""
        x, weight = self.input_quantizer(x), self.dequantized_weight()
        if self.conv is None:
            return F.linear(x, weight.to(x.dtype), self.bias)
        return F.conv2d(x, weight.to(x.dtype), self.bias, **self.conv)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, weight_bits={self.weight_bits}"
