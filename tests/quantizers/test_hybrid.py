"""HLUQ: log-uniform grids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.quantizers.affine import decode, encode, grid_from_range
from carsam.quantizers.hybrid import HybridQuantizer, round_hybrid, search_hybrid, zone_size


def hybrid(bits, scale=0.25, split=0.8, offset=-0.6):
    quantizer = HybridQuantizer(bits, always=True)
    quantizer.set_grid(torch.tensor(scale), torch.tensor(split), torch.tensor(offset))
    return quantizer


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_hluqs_zones_meet(bits):
    count, width = zone_size(bits), torch.tensor(1.7)
    quantizer = hybrid(bits, scale=1.0, split=1.7, offset=0.0)
    grid = quantizer.decode(torch.arange(2**bits))
    log, uniform = grid[:count], grid[count:]
    assert grid[0] == 0 and bool((grid.diff() > 0).all())
    torch.testing.assert_close(log[2:] / log[1:-1], torch.full((count - 2,), 2.0))
    assert log[-1] == width, "the top of the log zone is the split"
    torch.testing.assert_close(uniform, width + torch.arange(1, count + 1), msg="uniform steps start at the split")
    # Across the split nothing jumps by more than the neighbouring steps.
    around = torch.linspace(1.0, 3.0, 2001)
    rounded = round_hybrid(around.clone(), width, count)
    assert bool((rounded.diff() >= 0).all()) and (rounded - around).abs().max() <= 0.5001


def uniform_error(x, bits):
    scale, zero = grid_from_range(x.min(), x.max(), bits)
    return (decode(encode(x, scale, zero, bits), scale, zero) - x).square().mean()


@given(st.integers(0, 2**32 - 1))
def test_hluq_behind_a_relu_keeps_zero_and_serves_long_tails(seed):
    generator = torch.Generator().manual_seed(seed)
    # Half zeros, many small values, few large ones. Not every draw has a long tail; then the zones cost a little.
    x = torch.randn(4000, generator=generator).clamp(min=0) * torch.rand(4000, generator=generator).pow(6) * 20
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(*search_hybrid(x, x.min(), x.max(), 4))
    assert (quantizer(x) - x).square().mean() < 1.2 * uniform_error(x, 4)
    assert quantizer(torch.zeros(1)) == 0


def test_hluq_beats_a_uniform_grid_behind_gelu():
    x = torch.nn.functional.gelu(2 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(*search_hybrid(x, x.min(), x.max(), 4))
    assert (quantizer(x) - x).square().mean() < 0.8 * uniform_error(x, 4)
