"""BIG: the density rule, and that flipping channels leaves QKᵀ what it was."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from carsam.models.family import find_sites
from carsam.transform.bimodal import (
    channel_signs,
    count_modes,
    density,
    flip_channels,
    integrate_bimodal_keys,
)
from carsam.transform.stress import stress


def two_modes(seed=0, apart=8.0):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (4000,), generator=generator) * 2.0 - 1
    return torch.randn(4000, generator=generator) + apart * signs


def test_density_has_scotts_bandwidth():
    values = two_modes().double()
    grid, heights = density(values)
    assert (grid[0], grid[-1]) == (values.min().item(), values.max().item())
    width = values.std().item() * len(values) ** -0.2
    kernels = torch.exp(-0.5 * ((torch.from_numpy(grid)[:, None] - values) / width).square())
    np.testing.assert_allclose(heights, kernels.mean(1) / (width * math.sqrt(2 * math.pi)), rtol=1e-6, atol=1e-12)
    assert 0.95 < heights.sum() * (grid[1] - grid[0]) < 1, "but for the tails beyond the ends"


@pytest.mark.parametrize("seed", range(3))
def test_modes(seed):
    assert count_modes(two_modes(seed)) == 2
    assert count_modes(torch.randn(4000, generator=torch.Generator().manual_seed(seed))) == 1


@pytest.mark.parametrize(
    "values",
    [
        torch.full((10,), 3.0),
        torch.zeros(0),
        torch.tensor([1.0]),
        torch.tensor([1.0, float("nan"), 2.0]),
        torch.tensor([-float("inf"), 0.0, 1.0]),
        torch.tensor([1.0, 1.0 + 1e-7] * 40),
        torch.tensor([0.0, 1e-45] * 40),
    ],
    ids=["constant", "none", "one", "nan", "infinite", "nearly constant", "tiny"],
)
def test_values_without_a_density_have_one_mode(values):
    assert count_modes(values) == 1


def test_a_sample_that_is_constant_has_one_mode():
    values = torch.zeros(3 * 2**13)
    values[1] = 1.0  # between two picks
    assert count_modes(values) == 1


@pytest.mark.parametrize("apart", [0.5, 1.0, 1.5])
def test_what_does_not_stand_apart_is_one_mode(apart):
    assert count_modes(two_modes(apart=apart)) == (1 if apart < 1.2 else 2)


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


@torch.no_grad()
def test_the_published_rule_judges_what_tokens_read_of_the_image_by_one_image(nano, small_set):
    twin = stress(copy.deepcopy(nano), 1.0)
    sites = find_sites(twin)
    reports = integrate_bimodal_keys(copy.deepcopy(twin), sites, small_set, rule="published")
    assert [report["attention"] for report in reports] == [s.name for s in sites.attentions if s.name in sites.focus]
    assert any(report["flipped_channels"] for report in reports)
    # Other images than the first have no say, and of its prompts only the first has one in the modes.
    first = small_set.of(small_set.images[:1])
    assert integrate_bimodal_keys(copy.deepcopy(twin), sites, first, rule="published") == reports
    everywhere = integrate_bimodal_keys(copy.deepcopy(twin), sites, small_set)
    assert {report["attention"] for report in reports} < {report["attention"] for report in everywhere}
