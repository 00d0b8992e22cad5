"""Queries and keys that are turned by their positions (RoPE, arXiv 2104.09864): pairs of neighbouring channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How the tokens of one operand are turned.

    Attributes:
        cos, sin: (tokens, channels); the two channels of a pair have the same angle.
    """

    cos: Tensor
    sin: Tensor

    def turn(self, values: Tensor) -> Tensor:
        """(..., tokens, channels) as the MatMul reads them."""
        return values * self.cos + _quarter(values) * self.sin

    def turn_back(self, values: Tensor) -> Tensor:
        """(..., tokens, channels) as the projection gives them."""
        return values * self.cos - _quarter(values) * self.sin

    def mean(self, matrix: Tensor) -> Tensor:
        """The mean over tokens t of R_t M R_tᵀ, where turning a row y is y R_t.

        With a pair of channels as one complex number, y M y'ᵀ = Re(zᴴ P z' + zᵀ Q z') and a turn multiplies z by
        exp(iθ): entries of P by exp(i(θ' − θ)), those of Q by exp(i(θ' + θ)).

        Args:
            matrix: (..., channels, channels).
        """
        turns = torch.complex(self.cos[:, ::2].double(), self.sin[:, ::2].double())
        apart, together = (turns.mH @ turns / len(turns)), (turns.mT @ turns / len(turns))
        pairs = matrix.double().unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))  # (..., j, 2, k, 2)
        (a, b), (c, d) = ([pairs[..., row, :, column] for column in (0, 1)] for row in (0, 1))
        p = torch.complex(a + d, c - b) / 2 * apart
        q = torch.complex(a - d, -(b + c)) / 2 * together
        first = torch.stack((p.real + q.real, -p.imag - q.imag), -1)
        second = torch.stack((p.imag - q.imag, p.real - q.real), -1)
        return torch.stack((first, second), -3).flatten(-2).flatten(-3, -2)


def _quarter(values: Tensor) -> Tensor:
    """Every pair (x, y) a quarter turn further: (−y, x)."""
    first, second = values.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), -1).flatten(-2)
