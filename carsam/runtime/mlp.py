"""An MLP on integers: the first product's epilogue already gives the bytes that the second one reads."""

from __future__ import annotations

from torch import Tensor, nn

from carsam.runtime.linear import IntegerLinear


class IntegerMlp(nn.Module):
    """Linear, GELU (the exact one), Linear.

    Args:
        first, second: The Linears.
    """

    def __init__(self, first: IntegerLinear, second: IntegerLinear):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out)."""
        codes, sums = self.first.gelu_codes(x, self.second)
        return self.second.from_codes(codes, sums, x.dtype).view(*x.shape[:-1], -1)
