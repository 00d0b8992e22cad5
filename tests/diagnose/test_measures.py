"""The measures on rows made by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.diagnose.measures import (
    FLOOR,
    RelativeError,
    dead_rows,
    entropy,
    focus_overlap,
    kl_divergence,
    smoothed,
    total_variation,
)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def pairs_of_rows(draw):
    """Float rows that sum to one, and what a 4-bit grid of some range makes of them (it may be nothing)."""
    keys = draw(st.integers(1, 40))
    scores = torch.randn(5, keys, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**20))))
    probs = torch.softmax(draw(st.floats(0, 20)) * scores, -1)
    step = draw(st.floats(1e-3, 2))
    return probs, (probs / step).round().clamp(0, 15) * step


@given(pairs_of_rows())
def test_ranges(pair):
    probs, quantized = pair
    keys = probs.shape[-1]
    assert torch.allclose(smoothed(quantized).sum(-1), torch.ones(5))
    kl = kl_divergence(probs, quantized)
    assert (kl >= 0).all()
    assert (kl <= math.log(keys * (1 + FLOOR) / FLOOR) + 1e-5).all()
    for each in pair:
        assert (entropy(each) >= -1e-6).all()
        assert (entropy(each) <= math.log(keys) + 1e-5).all()
    overlap = focus_overlap(probs, quantized)
    assert ((overlap >= 0) & (overlap <= 1)).all()


@given(pairs_of_rows())
def test_equal_rows(pair):
    for probs in pair:
        assert torch.equal(entropy(probs) - entropy(probs), torch.zeros(5))
        assert torch.equal(kl_divergence(probs, probs), torch.zeros(5))
        alive = ~dead_rows(probs)
        assert torch.equal(focus_overlap(probs, probs), alive.float())


def test_entropy_of_known_rows():
    values = entropy(rows([0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]))
    assert values.tolist() == pytest.approx([math.log(4), 0, math.log(2), math.log(4)], abs=2e-3)


def test_rows_that_lost_mass_are_brought_to_one():
    probs = rows([0.5, 0.3, 0.2])
    assert kl_divergence(probs, 0.4 * probs).item() == pytest.approx(0, abs=1e-7)
    assert entropy(0.4 * probs).item() == pytest.approx(entropy(probs).item(), abs=1e-3)


def test_kl_of_known_rows():
    half, whole = rows([0.5, 0.5]), rows([1.0, 0.0])
    # All of P̂ in one of two places: the other counts as the floor's share.
    floor = FLOOR / 2 / (1 + FLOOR)
    expected = 0.5 * math.log(0.5 / (1 - floor)) + 0.5 * math.log(0.5 / floor)
    assert kl_divergence(half, whole).item() == pytest.approx(expected, rel=1e-9)
    assert kl_divergence(whole, half).item() == pytest.approx(math.log(2), abs=1e-3)
    # A dead row is uniform.
    assert kl_divergence(whole, rows([0.0, 0.0])).item() == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("probs", "quantized", "overlap"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.1, 0.1], 1),  # a half of the maximum is not above it
        ([0.4, 0.4, 0.1, 0.1], [0.5, 0.2, 0.0, 0.0], 1 / 2),
        ([0.9, 0.1, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0], 0),
        ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0], 0),
        ([0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.1], 1),
        ([0.3, 0.3, 0.3, 0.1], [0.0, 0.3, 0.3, 0.3], 2 / 4),
    ],
)
def test_focus_overlap(probs, quantized, overlap):
    assert focus_overlap(rows(probs), rows(quantized)).item() == pytest.approx(overlap)


def test_total_variation():
    assert total_variation([1.0, math.e, 1.0, math.e**-2]) == pytest.approx(4)
    assert total_variation([0.3]) == total_variation([]) == 0
    assert total_variation([0.2, 0.2]) == 0
    assert math.isfinite(total_variation([0.0, 1.0]))


def test_relative_error_over_several_tensors():
    generator = torch.Generator().manual_seed(0)
    reference = 3 + torch.randn(6, 5, generator=generator)
    value = reference + 0.1 * torch.randn(6, 5, generator=generator)
    error = RelativeError()
    assert math.isnan(error.value)
    for part in (slice(0, 2), slice(2, 6)):
        error.update(value[part], reference[part])
    expected = (value - reference).square().sum() / (reference - reference.mean()).square().sum()
    assert error.value == pytest.approx(expected.item(), rel=1e-5)
