"""Evenly spaced samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.quantizers.sampling import (
    even_ranks,
    odd_step_for,
    odd_step_within,
    sampled_patches,
    step_for,
    strided,
)

COUNTS = st.integers(0, 10**7)
WANTED = st.integers(1, 10**5)


@given(COUNTS, WANTED)
def test_a_step_leaves_what_is_wanted(count, wanted):
    step = step_for(count, wanted)
    assert step == 1 or wanted <= len(range(0, count, step)) <= 2 * wanted


@given(COUNTS, WANTED)
def test_odd_steps_leave_about_what_is_wanted(count, wanted):
    step, kept = odd_step_for(count, wanted), len(range(0, count, odd_step_for(count, wanted)))
    assert step % 2 == 1
    assert step == 1 and kept == count if count < 2 * wanted else 0.6 * wanted <= kept <= 2 * wanted


@given(st.integers(1, 10**7), WANTED)
def test_odd_steps_within_leave_no_more(count, most):
    step = odd_step_within(count, most)
    assert step % 2 == 1 and len(range(0, count, step)) <= most
    assert (step == 1) == (count <= most)


@given(st.integers(1, 10**6))
def test_an_odd_step_sees_every_channel_of_an_even_number(positions):
    """256 channels, the fastest dimension: a step of 16 would see 16 of them."""
    step = odd_step_for(256 * positions, 2**14)
    assert len({(step * k) % 256 for k in range(256)}) == 256


def test_strided_keeps_few_values_and_the_first():
    values = torch.arange(12.0).view(3, 4)
    assert torch.equal(strided(values, 100), torch.arange(12.0))
    assert strided(values, 4).tolist() == [0, 3, 6, 9]  # a step of 3
    assert strided(values, 6).tolist() == [0, 3, 6, 9]  # a step of 2, made odd


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (1, [0])])
def test_even_ranks_hold_both_ends(count, expected):
    assert even_ranks(torch.arange(count), 5).tolist() == expected


@given(
    batch=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    most=st.integers(1, 100),
)
def test_sampled_patches_are_those_of_unfold(batch, kernel, stride, padding, dilation, groups, most):
    x = torch.randn(batch, 4, 8, 9, generator=torch.Generator().manual_seed(most))
    found = sampled_patches(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, most=most)
    every = torch.nn.functional.unfold(x, kernel, dilation, padding, stride)
    every = every.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    assert torch.equal(found, every[:, :: odd_step_within(every.shape[1], most)])
