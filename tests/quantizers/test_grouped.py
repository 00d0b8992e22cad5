"""CAG: grids per group of channels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import GroupedQuantizer, simulate
from carsam.quantizers.grouped import group_channels

CHANNELS = 6


def test_cag_separates_channels_by_range():
    wide = torch.tensor([1.0, 1.1, 0.9, 40.0, 41.0, 10.0, 9.5, 0.1])
    group = group_channels(-wide, wide, 4)
    partition = {frozenset((group == g).nonzero().flatten().tolist()) for g in group.unique()}
    assert {frozenset({3, 4}), frozenset({5, 6})} <= partition
    # Ranges of equal width in other places are other ranges.
    apart = group_channels(torch.tensor([0.0, 0.1, 5.0, 5.1]), torch.tensor([1.0, 1.1, 6.0, 6.1]), 2)
    assert apart[0] == apart[1] != apart[2] == apart[3]


@given(st.data())
def test_cag_ends_where_k_means_rests(data):
    """Every channel is in the nearest cluster, whose centre is the mean of its channels."""
    channels, groups = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    high = torch.randn(channels, generator=generator).exp()
    low = -high * torch.rand(channels, generator=generator)
    group = group_channels(low, high, groups)
    assert (
        group.shape == (channels,) and group.dtype == torch.int64 and 0 <= int(group.min()) <= int(group.max()) < groups
    )
    points, used = torch.stack([low, high], 1).double(), group.unique()
    centres = torch.stack([points[group == index].mean(0) for index in used])
    assert torch.equal(used[torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)], group)


def test_cag_without_enough_channels_leaves_groups_empty():
    one = torch.ones(1)
    assert int(group_channels(-one, one, 4)) in range(4)
    alike = torch.ones(9)
    assert len(group_channels(-alike, alike, 4).unique()) == 1
    assert len(group_channels(torch.zeros(5), torch.zeros(5), 4).unique()) == 1


@torch.no_grad()
def test_cag_beats_one_grid_where_channels_differ_and_keeps_its_channels_in_the_spec():
    x = torch.randn(500, CHANNELS, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 1, 1, 20, 20, 0.1])
    quantizer = GroupedQuantizer(4, groups=3)
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(x)
    recorder.apply("mse")
    assert quantizer.spec() == {"grid": "grouped", "bits": 4, "groups": 3, "channels": CHANNELS}
    with simulate(activations=True):
        relative = (quantizer(x) - x).square().mean(0) / x.var(0)
    assert relative.max() < 0.03, "every channel has a grid of its own size"
