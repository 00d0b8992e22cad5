"""Maps of heads in closed form: their algebra, the bound that they reach, and what they save at 4 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carsam.quantizers.affine import decode, encode
from carsam.quantizers.ranges import mse_grid
from carsam.transform.attention_equivalences import balance
from carsam.transform.maps import evening, geometric_mean, per_head, powered, query_key_map, value_output_map
from carsam.transform.statistics import ChannelStatistics

SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)
HEADS, SIZE = 2, 8


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def moments(seed, heads=HEADS):
    """Positive matrices (heads, d, d) of moderate condition."""
    x = torch.randn(heads, 40, SIZE, generator=drawn(seed), dtype=torch.float64)
    return x.transpose(-2, -1) @ x / 40


@few
@given(SEEDS)
def test_the_geometric_mean_solves_its_equation(seed):
    a, b = moments(seed), moments(seed + 1)
    mean = geometric_mean(a, b)
    torch.testing.assert_close(mean @ torch.linalg.inv(a) @ mean, b)
    torch.testing.assert_close(geometric_mean(a, a), a)


@few
@given(SEEDS)
def test_both_operands_have_the_same_moments_in_channels_of_one_size_and_no_map_does_better(seed):
    a, b = moments(seed), moments(seed + 1)
    m = evening(a, b)
    inverse = torch.linalg.inv(m)
    first, second = m.mT @ a @ m, inverse @ b @ inverse.mT
    # One factor stands between them (the middle of all stretches), and the regulariser's ten-thousandth.
    factor = first.diagonal(dim1=-2, dim2=-1).sum() / second.diagonal(dim1=-2, dim2=-1).sum()
    torch.testing.assert_close(first, factor * second, rtol=0.02, atol=0.02 * first.abs().max().item())
    diagonal = first.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, diagonal.mean(-1, keepdim=True).expand_as(diagonal), rtol=0.02, atol=0)

    def traces(x, y):
        return x.diagonal(dim1=-2, dim2=-1).sum(-1) * y.diagonal(dim1=-2, dim2=-1).sum(-1)

    root = powered(a, 0.5)
    least = powered(root @ b @ root, 0.5).diagonal(dim1=-2, dim2=-1).sum(-1).square()
    torch.testing.assert_close(traces(first, second), least, rtol=0.01, atol=0)
    for other in (seed + 2, seed + 3):
        t = torch.randn(HEADS, SIZE, SIZE, generator=drawn(other), dtype=torch.float64)
        back = torch.linalg.inv(t)
        assert bool((traces(t.mT @ a @ t, back @ b @ back.mT) >= 0.999 * least).all())


def correlated(seed, tokens=600):
    """Queries and keys (tokens, channels) whose channels go together and differ in size, as a decoder's do."""
    generator = drawn(seed)
    found = []
    for _ in range(2):
        mixing = torch.randn(HEADS, SIZE, SIZE, generator=generator) * torch.logspace(-1, 0.7, SIZE)
        found.append((torch.randn(HEADS, tokens, SIZE, generator=generator) @ mixing).transpose(0, 1).flatten(1))
    return found


def rounded(x):
    grid = mse_grid(x.flatten(), x.min(), x.max(), 4)
    return decode(encode(x, *grid, 4), *grid)


def score_error(query, key):
    """‖Q Kᵀ − Q̂ K̂ᵀ‖² of all heads, one 4-bit step for each tensor."""
    apart = [each.unflatten(-1, (HEADS, SIZE)).transpose(0, 1) for each in (query, key, rounded(query), rounded(key))]
    return (apart[0] @ apart[1].mT - apart[2] @ apart[3].mT).square().sum().item()


@few
@given(SEEDS)
def test_scores_lose_less_than_half_of_what_they_lose_by_the_balance(seed):
    query, key = correlated(seed)
    found = ChannelStatistics(pairs=True), ChannelStatistics(pairs=True)
    for statistics, values in zip(found, (query, key)):
        statistics.update(values[::2])
        statistics.update(values[1::2])
        torch.testing.assert_close(
            statistics.covariance, torch.cov(values.T.double(), correction=0), rtol=1e-4, atol=1e-4
        )
    m = query_key_map(found[0].moments, found[1].covariance, HEADS, shared=False).float()

    def mapped(x, matrices):
        return (x.unflatten(-1, (HEADS, SIZE)).transpose(0, 1) @ matrices).transpose(0, 1).flatten(1)

    by_map = score_error(mapped(query, m), mapped(key, torch.linalg.inv(m).mT))
    t = balance(*found, HEADS, shared=False).float()
    # Channels that go together are what no diagonal can even out; a quarter is usual here.
    assert by_map < 0.5 * min(score_error(query * t, key / t), score_error(query, key))


def test_heads_that_share_their_positions_share_their_map():
    query, key = (torch.block_diag(*moments(seed)) for seed in (0, 1))
    found = query_key_map(query, key, HEADS, shared=True)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(per_head(query, HEADS), moments(0))


def test_values_of_all_heads_get_one_size():
    value = torch.block_diag(*(moments(0) * torch.tensor([1.0, 9.0])[:, None, None]))
    weight = torch.randn(12, HEADS * SIZE, generator=drawn(2))
    r = value_output_map(value, weight, HEADS)
    sizes = (r.mT @ per_head(value, HEADS) @ r).diagonal(dim1=-2, dim2=-1).flatten()
    assert (sizes.max() / sizes.min()).item() == pytest.approx(1, abs=0.05)
