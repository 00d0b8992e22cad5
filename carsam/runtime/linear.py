"""A Linear on integers: an operation that torch.compile keeps as it is, and the module around it.

On CUDA the operation is a Triton kernel, elsewhere its reference in torch: the same integers either way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carsam.errors import ConfigError
from carsam.pack.bits import pack_codes
from carsam.pack.layers import PackedLayer
from carsam.quantizers import QuantizedLayer
from carsam.runtime.integers import (
    FoldedWeight,
    InputGrid,
    fold,
    gelu_codes_reference,
    is_shifted,
    is_uniform,
    linear_reference,
    to_codes,
)


@torch.library.custom_op("carsam::int8_linear", mutates_args=())
def int8_linear(
    a: Tensor,
    w: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    zero: Tensor | None,
    sums: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(m, in) int8 times (out, in) int8 to (m, out); see :func:`carsam.runtime.integers.linear_reference`."""
    return linear_reference(a, FoldedWeight(w, scale, offset, zero), sums, bias, dtype)


@int8_linear.register_fake
def _(a, w, scale, offset, bias, zero, sums, dtype):
    return a.new_empty((a.shape[0], w.shape[0]), dtype=dtype)


@int8_linear.register_kernel("cuda")
def _(a, w, scale, offset, bias, zero, sums, dtype):
    from carsam.runtime.kernels.linear import run

    out = torch.empty((a.shape[0], w.shape[0]), dtype=dtype, device=a.device)
    if out.numel():
        run(a, w, out, scale, offset, bias, zero, sums, None, None)
    return out


@torch.library.custom_op("carsam::int8_linear_gelu_codes", mutates_args=())
def int8_linear_gelu_codes(
    a: Tensor,
    w: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    zero: Tensor | None,
    sums: Tensor | None,
    grid: Tensor,
    next_sums: bool,
) -> tuple[Tensor, Tensor]:
    """A Linear and GELU whose output is already what the next layer reads: its bytes, and their sums (else empty)."""
    out = linear_reference(a, FoldedWeight(w, scale, offset, zero), sums, bias)
    codes, total = gelu_codes_reference(out, grid, next_sums)
    return codes, a.new_empty(0, dtype=torch.int32) if total is None else total


@int8_linear_gelu_codes.register_fake
def _(a, w, scale, offset, bias, zero, sums, grid, next_sums):
    rows = a.shape[0]
    return a.new_empty((rows, w.shape[0])), a.new_empty(rows if next_sums else 0, dtype=torch.int32)


@int8_linear_gelu_codes.register_kernel("cuda")
def _(a, w, scale, offset, bias, zero, sums, grid, next_sums):
    from carsam.runtime.kernels.linear import run

    out = torch.empty((a.shape[0], w.shape[0]), dtype=torch.int8, device=a.device)
    total = torch.zeros(a.shape[0] if next_sums else 0, dtype=torch.int32, device=a.device)
    if out.numel():
        run(a, w, out, scale, offset, bias, zero, sums, grid, total if next_sums else None)
    return out, total


class IntegerLinear(nn.Module):
    """A Linear that multiplies integers.

    Weights lie in memory as signed bytes, or two 4-bit codes a byte, unpacked right before each multiplication: half
    the memory for one small sweep (a layer's weights are read once by the sweep, and by every tile of the product
    afterwards).

    Buffers: ``weight`` (out, in) int8, or (out, in / 2) uint8; ``scale``, ``offset``, ``zero`` as
    :class:`FoldedWeight`; ``weight_zero`` (out, 1) int8 where weights are packed; ``grid`` as ``InputGrid.values``;
    ``shift`` (in,) float32, what is subtracted from the input, or None; ``bias`` (out,) float32 or None.

    Args:
        weight: Folded.
        bias: (out,) or None; what the shift makes of the output is part of it.
        grid: Of the input.
        packed: Keep 4-bit codes; weights must then be ``codes − weight_zero`` with codes of at most 4 bits.
        weight_zero: (out,) zero points, for ``packed``.
        shift: (in,) shift of a shifted grid.
    """

    def __init__(
        self,
        weight: FoldedWeight,
        bias: Tensor | None,
        grid: InputGrid,
        *,
        packed: bool = False,
        weight_zero: Tensor | None = None,
        shift: Tensor | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.packed = packed
        self.register_buffer("weight_zero", None)
        if packed:
            zeros = weight_zero.to(torch.int8)[:, None]
            codes = (weight.codes + zeros).to(torch.uint8)
            self.register_buffer("weight", pack_codes(codes, 4).view(self.out_features, -1))
            self.weight_zero = zeros
        else:
            self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("grid", grid.values)
        self.register_buffer("shift", None if shift is None else shift.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def _apply(self, fn, recurse=True):
        """Moves to another device; the grids stay float32 whatever the model's type becomes (``.bfloat16()``)."""
        kept = {name: getattr(self, name) for name in ("scale", "grid", "shift", "bias")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None:
                setattr(self, name, buffer.to(self.weight.device))
        return self

    @classmethod
    def of(cls, layer: PackedLayer | QuantizedLayer, *, packed: bool = True) -> IntegerLinear:
        """The integer form of a packed layer, or of a quantized one whose weights are integers.

        Args:
            layer: One for which :func:`why_not` has no reason.
            packed: Keep weights of at most 4 bits two a byte.

        Raises:
            ConfigError: There is a reason.
        """
        if reason := why_not(layer):
            raise ConfigError(f"this layer cannot run on integers: {reason}.")
        codes = layer.integer_weight() if isinstance(layer, PackedLayer) else layer.codes
        grid = InputGrid.of(layer.input_quantizer)
        folded = fold(codes, layer.weight_scale, layer.weight_zero_point, layer.weight_bits, grid)
        packed = packed and layer.weight_bits <= 4 and codes.shape[1] % 2 == 0
        bias, shift = layer.bias, None
        if is_shifted(layer.input_quantizer):
            shift = layer.input_quantizer.shift
            zeros = layer.weight_zero_point.float()[:, None]
            moved = (codes.float() - zeros).double() @ shift.double() * layer.weight_scale.double()
            bias = moved.float() if bias is None else (bias.double() + moved).float()
        return cls(folded, bias, grid, packed=packed, weight_zero=layer.weight_zero_point, shift=shift)

    @property
    def needs_sums(self) -> bool:
        """Whether sums of the input's rows are needed."""
        return self.zero is not None

    def integer_weight(self) -> Tensor:
        """(out, in) int8."""
        if not self.packed:
            return self.weight
        nibbles = torch.stack((self.weight & 15, self.weight >> 4), dim=-1).view(self.out_features, self.in_features)
        return nibbles.to(torch.int8) - self.weight_zero

    def from_codes(self, codes: Tensor, sums: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(..., in) int8, and sums (...,) → (..., out)."""
        rows = codes.reshape(-1, self.in_features)
        sums = sums.reshape(-1) if self.needs_sums else None
        weight = self.integer_weight()
        out = torch.ops.carsam.int8_linear(rows, weight, self.scale, self.offset, self.bias, self.zero, sums, dtype)
        return out.view(*codes.shape[:-1], self.out_features)

    def to_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The bytes of an input (..., in), and sums where they are needed."""
        return to_codes(x if self.shift is None else x.float() - self.shift, self.grid, self.needs_sums)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), in the type of ``x``."""
        return self.from_codes(*self.to_codes(x), x.dtype)

    def gelu_codes(self, x: Tensor, following: IntegerLinear) -> tuple[Tensor, Tensor]:
        """(..., in) → what ``following`` reads of GELU of the output: (rows, out) int8, and sums (rows,) or empty.

        The input of ``following`` must not be shifted.
        """
        codes, sums = self.to_codes(x)
        rows = codes.reshape(-1, self.in_features)
        return torch.ops.carsam.int8_linear_gelu_codes(
            rows,
            self.integer_weight(),
            self.scale,
            self.offset,
            self.bias,
            self.zero,
            sums.reshape(-1) if self.needs_sums else None,
            following.grid,
            following.needs_sums,
        )

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, packed={self.packed}"


def why_not(layer: nn.Module) -> str:
    """Why a quantized layer cannot run on integers; empty where it can."""
    if not isinstance(layer, (PackedLayer, QuantizedLayer)):
        return "it is not quantized"
    if layer.conv is not None:
        return "it is a convolution"
    if layer.weight_bits > 8:
        return "its weights are in floating point"
    if isinstance(layer, QuantizedLayer) and layer.codes is None:
        return "its weights are not integers yet"
    quantizer = layer.input_quantizer
    if not (is_uniform(quantizer) or is_shifted(quantizer)):
        return f"its input is on the grid {quantizer.grid}, which is not one step for the whole tensor"
    if quantizer.bits > 8:
        return "its input is in floating point"
    return "" if quantizer.is_calibrated else "its input has no range yet"
