"""Our mathematics against packages that PyPI serves, on the same numbers.

Each module is named for the package. All of them round halves to even, as carsam does; what they define otherwise is
said where it matters. Some multiply by the reciprocal of the step where carsam divides: values within rounding error of
a half may then fall to either side, and ``same_codes`` excuses those and no others.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Relative error of a division against a product with the reciprocal, on up to 2^8 steps: some 2^8 · 2^-23.
NEAR_A_HALF = 1e-4


@pytest.fixture(scope="session")
def same_codes() -> Callable[[Tensor, Tensor, Tensor], None]:
    """``check(ours, theirs, x / scale)``: equal, but one step apart where the quotient is all but a half."""

    def check(ours: Tensor, theirs: Tensor, quotient: Tensor) -> None:
        differ = ours.float() != theirs.float()
        excused = ((quotient - quotient.floor()) - 0.5).abs() < NEAR_A_HALF
        assert not bool((differ & ~excused).any())
        assert int(differ.sum()) <= 0.001 * differ.numel()
        assert float((ours.float() - theirs.float()).abs().max()) <= 1

    return check


@pytest.fixture
def activations() -> Tensor:
    """(64, 96) values with a mean, a tail and channels of different ranges."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 96, generator=generator) * (1 + 3 * torch.rand(96, generator=generator)) + 0.7
    values[::7, 5] *= 6
    return values


@pytest.fixture
def weight() -> Tensor:
    """(24, 96) weights; every row has both signs, so that no convention widens its range."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 96, generator=generator) * torch.logspace(-2, 0, 24)[:, None]
