"""The refit against dense least squares; rounding with feedback against its objective and against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carsam.compensate.ridge import LayerMoments, Objective, centred, correct_bias, refit, ridge, round_with_feedback
from carsam.errors import ConfigError
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import weight_grid

SEEDS = st.integers(0, 2**32 - 1)


def case(seed, groups=2, rows=60, d=6, out=4):
    """Float inputs with a column of ones, what quantization makes of them, and a weight with its bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows, d, generator=generator, dtype=torch.float64)
    x[..., 0] += 3  # a mean for the bias to meet
    noise = 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    noise[..., 0] += 0.2
    ones = torch.ones(groups, rows, 1, dtype=torch.float64)
    weight = torch.randn(groups, d + 1, out, generator=generator, dtype=torch.float64)
    return torch.cat([x, ones], -1), torch.cat([x + noise, ones], -1), weight


def gathered(quantized, floating, weight):
    moments = LayerMoments()
    for q, f in zip(quantized.split(20, dim=1), floating.split(20, dim=1)):
        moments.update(q, f, f @ weight)
    return moments


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(1e-4, 1.0))
def test_refit_is_dense_least_squares(seed, damping):
    floating, quantized, weight = case(seed)
    moments = gathered(quantized, floating, weight)
    found = refit(weight, moments, relative_damping=damping)
    lam = ridge(moments, damping, ones=True)
    for group, expected in enumerate(found):
        # ‖X W − X̂ W*‖² + ‖√λ (W* − W)‖² as one least squares problem of stacked rows.
        root = lam[group].sqrt().diag()
        left = torch.cat([quantized[group], root])
        right = torch.cat([floating[group] @ weight[group], root @ weight[group]])
        torch.testing.assert_close(expected, torch.linalg.lstsq(left, right).solution, rtol=1e-6, atol=1e-8)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_the_bias_takes_the_mean_error_and_nothing_is_lost(seed):
    floating, quantized, weight = case(seed)
    moments = gathered(quantized, floating, weight)
    found = refit(weight, moments, relative_damping=1e-3)
    error = quantized @ found - floating @ weight
    assert error.mean(1).abs().max() < 1e-6 * (floating @ weight).abs().max()
    objective = Objective(weight, moments)
    dense = error.square().sum() / (floating @ weight).square().sum()
    assert objective.error(found) == pytest.approx(dense.item(), rel=1e-6)
    assert objective.error(found) < objective.error(weight)
    halves = gathered(quantized[:, :20], floating[:, :20], weight)
    halves += gathered(quantized[:, 20:], floating[:, 20:], weight)
    torch.testing.assert_close(halves.gram, moments.gram)
    assert Objective(weight, halves).error(found) == pytest.approx(objective.error(found))
    some = slice(1, None, 2)
    of_some = Objective(weight[..., some], moments.of(some)).error(found[..., some])
    dense = error[..., some].square().sum() / (floating @ weight)[..., some].square().sum()
    assert of_some == pytest.approx(dense.item(), rel=1e-6)


@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_the_bias_alone_is_least_squares_in_the_bias(seed):
    floating, quantized, weight = case(seed)
    moments = gathered(quantized, floating, weight)
    found = correct_bias(weight, moments)
    assert torch.equal(found[:, :-1], weight[:, :-1])
    expected = weight[:, -1] + (floating @ weight - quantized @ weight).mean(1)
    torch.testing.assert_close(found[:, -1], expected)


def test_equal_inputs_change_nothing_and_no_damping_is_refused():
    floating, _, weight = case(0)
    moments = gathered(floating, floating, weight)
    assert torch.equal(refit(weight, moments), weight)
    with pytest.raises(ConfigError, match="must be positive"):
        refit(weight, moments, relative_damping=0.0)


def test_centred_moments():
    _, quantized, _ = case(3)
    around = quantized[..., :-1] - quantized[..., :-1].mean(1, keepdim=True)
    gram = quantized.transpose(-2, -1) @ quantized
    torch.testing.assert_close(centred(gram), around.transpose(-2, -1) @ around)


def grids(weight, bits):
    scale, zero = weight_grid(weight.transpose(-2, -1).flatten(0, 1).float(), bits, observer="min-max")
    return scale.view(len(weight), -1).double(), zero.view(len(weight), -1).double()


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_feedback_lowers_the_error_of_the_outputs(seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 200, 12, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(2, 12, 6, generator=generator, dtype=torch.float64)
    scale, zero = grids(weight, 3)
    gram = x.transpose(-2, -1) @ x
    codes = round_with_feedback(weight, gram, scale, zero, 3)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 7
    nearest = encode(weight.clone(), scale[:, None], zero[:, None], 3)

    def error(of):
        return (x @ (decode(of, scale[:, None], zero[:, None]) - weight)).square().sum()

    assert error(codes) < error(nearest) * (1 + 1e-9)
    assert not torch.equal(codes, nearest)


@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_feedback_of_uncorrelated_inputs_is_nearest_and_it_is_never_worse(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 4, 1, generator=generator, dtype=torch.float64)
    scale, zero = grids(weight, 2)
    nearest = encode(weight.clone(), scale[:, None], zero[:, None], 2)
    assert torch.equal(round_with_feedback(weight, torch.eye(4)[None] * 3.0, scale, zero, 2), nearest)
    x = torch.randn(1, 30, 4, generator=generator, dtype=torch.float64)
    gram = x.transpose(-2, -1) @ x
    found = round_with_feedback(weight, gram, scale, zero, 2)

    def error(codes):
        return (x @ (decode(codes, scale[:, None], zero[:, None]) - weight)).square().sum().item()

    every = [torch.tensor(c, dtype=torch.float64).view(1, 4, 1) for c in itertools.product(range(4), repeat=4)]
    assert min(map(error, every)) - 1e-9 <= error(found) <= error(nearest) + 1e-9


def test_the_order_of_blocks_does_not_matter(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 40, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(40, 40, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 40, 8, generator=generator, dtype=torch.float64)
    scale, zero = grids(weight, 4)
    gram = x.transpose(-2, -1) @ x
    whole = round_with_feedback(weight, gram, scale, zero, 4)
    monkeypatch.setattr("carsam.compensate.ridge.BLOCK", 7)
    assert torch.equal(round_with_feedback(weight, gram, scale, zero, 4), whole)
