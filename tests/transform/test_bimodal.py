"""BIG: the density rule, and that flipping channels leaves QKᵀ what it was."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import find_peaks as scipy_peaks
from scipy.stats import gaussian_kde
from torch import nn

from carsam.models.sites import find_sites
from carsam.transform.bimodal import (
    channel_signs,
    count_modes,
    density,
    find_peaks,
    flip_channels,
    integrate_bimodal_keys,
)
from carsam.transform.stress import stress


def two_modes(seed=0, apart=8.0):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (4000,), generator=generator) * 2.0 - 1
    return torch.randn(4000, generator=generator) + apart * signs


def test_density_is_scipys():
    values = two_modes()
    grid, heights = density(values)
    expected = gaussian_kde(values.numpy())(grid.numpy())
    # The same bandwidth rule; scipy divides the variance by n − 1 as well.
    torch.testing.assert_close(heights, torch.from_numpy(expected), rtol=1e-6, atol=1e-12)


@given(st.lists(st.integers(0, 6), min_size=3, max_size=60), st.integers(1, 9), st.integers(0, 4))
def test_peaks_are_scipys(heights, distance, least):
    heights = [float(v) + 1e-3 * i for i, v in enumerate(heights)]  # scipy's order among equal peaks is its own
    expected, _ = scipy_peaks(heights, height=float(least), distance=distance)
    assert find_peaks(torch.tensor(heights, dtype=torch.float64), least=least, distance=distance) == expected.tolist()


@given(st.lists(st.integers(0, 3), min_size=3, max_size=40))
def test_plateaus_are_scipys(heights):
    expected, _ = scipy_peaks([float(v) for v in heights], height=1.0)
    assert find_peaks(torch.tensor(heights, dtype=torch.float64), least=1.0, distance=1) == expected.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_modes(seed):
    assert count_modes(two_modes(seed)) == 2
    assert count_modes(torch.randn(4000, generator=torch.Generator().manual_seed(seed))) == 1
    assert count_modes(torch.full((10,), 3.0)) == 1


@torch.no_grad()
@given(st.integers(0, 2**32 - 1))
def test_flipping_leaves_the_scores_and_puts_the_means_on_one_side(seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = nn.Linear(8, 12), nn.Linear(8, 12)
    for parameter in (*query.parameters(), *key.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, y = torch.randn(2, 20, 8, generator=generator)
    before = query(x) @ key(y).T
    signs = channel_signs(key(y).mean(0))
    flip_channels(query, key, signs)
    torch.testing.assert_close(query(x) @ key(y).T, before, rtol=1e-5, atol=1e-4)
    assert bool((key(y).mean(0) > -1e-6).all())


@torch.no_grad()
def test_big_integrates_the_stressed_twins_keys_and_leaves_unimodal_ones(nano, small_set):
    twin = stress(copy.deepcopy(nano), 1.0)
    image = small_set.images[0]
    inputs = {"pixel_values": image.pixel_values, "input_boxes": image.boxes[None]}
    before = twin(**inputs).pred_masks
    reports = integrate_bimodal_keys(twin, find_sites(twin), small_set)
    flipped = [report for report in reports if report["flipped_channels"]]
    assert flipped and all(report["modes"] == 2 for report in flipped)
    # Sums of the same products in single precision, with keys of magnitude 8.
    torch.testing.assert_close(twin(**inputs).pred_masks, before, atol=2e-3, rtol=1e-3)
    again = {r["attention"]: r for r in integrate_bimodal_keys(twin, find_sites(twin), small_set)}
    assert all(again[report["attention"]]["modes"] == 1 for report in flipped)
    for report in reports:
        if report["modes"] == 1:
            assert report["flipped_channels"] == 0
