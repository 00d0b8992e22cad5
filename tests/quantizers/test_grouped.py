"""CAG: grids per group of channels."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import GroupedQuantizer, simulate
from carsam.quantizers.affine import grid_from_range
from carsam.quantizers.grouped import MERGED_BY, SCHEDULE, channel_grids, group_grids, k_means
from carsam.quantizers.ranges import OBSERVERS, mse_grid

CHANNELS = 6


def test_channels_are_told_apart_by_their_ranges():
    wide = torch.tensor([1.0, 1.1, 0.9, 40.0, 41.0, 10.0, 9.5, 0.1])
    group = k_means(torch.stack([-wide, wide], 1), 4)[1]
    partition = {frozenset((group == g).nonzero().flatten().tolist()) for g in group.unique()}
    assert {frozenset({3, 4}), frozenset({5, 6})} <= partition
    # Ranges of equal width in other places are other ranges.
    apart = k_means(torch.tensor([[0.0, 1.0], [0.1, 1.1], [5.0, 6.0], [5.1, 6.1]]), 2)[1]
    assert apart[0] == apart[1] != apart[2] == apart[3]


@given(st.data())
def test_k_means_rests(data):
    """Every channel is in the nearest cluster, whose centre is the mean of its channels."""
    channels, groups = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    high = torch.randn(channels, generator=generator).exp()
    points = torch.stack([-high * torch.rand(channels, generator=generator), high], 1)
    centres, group = k_means(points, groups)
    assert group.shape == (channels,) and group.dtype == torch.int64 and int(group.min()) >= 0
    assert int(group.max()) < groups == len(centres)
    used = group.unique()
    means = torch.stack([points[group == index].mean(0) for index in used])
    torch.testing.assert_close(centres[used], means)
    distances = torch.cdist(points.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(used[distances.argmin(1)], group)


def test_without_enough_channels_groups_are_empty():
    one = torch.ones(1)
    assert int(group_grids(one, 7 * one, 4, 4, "ranges")[2]) in range(4)
    alike = torch.ones(9)
    assert len(group_grids(alike, 7 * alike, 4, 4, "grids")[2].unique()) == 1


def test_grids_as_they_are_weigh_zero_points_more_than_steps():
    """Two channels with one zero point and steps of 0.1 and 1, and one with another zero point."""
    scale, zero = torch.tensor([0.1, 1.0, 0.1]), torch.tensor([7.0, 7.0, 9.0])
    published, ours = (group_grids(scale, zero, 2, 4, by)[2].tolist() for by in ("grids", "ranges"))
    assert published[0] == published[1] != published[2]
    assert ours[0] == ours[2] != ours[1]


def samples(seed=1, rows=500):
    sizes = torch.tensor([1, 1.2, 0.9, 20, 21, 0.1])
    return torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed)) * sizes


def calibrated(x, observer="mse", **options):
    quantizer = GroupedQuantizer(4, **options)
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(x)
    recorder.apply(observer)
    return quantizer


@torch.no_grad()
def test_every_channel_has_a_grid_of_its_own_size_and_the_spec_knows_them():
    x = samples()
    quantizer = calibrated(x, groups=3)
    assert quantizer.spec() == {"grid": "grouped", "bits": 4, "groups": 3, "channels": CHANNELS}
    with simulate(activations=True):
        relative = (quantizer(x) - x).square().mean(0) / x.var(0)
    assert relative.max() < 0.03


def test_grids_of_channels_are_what_the_observer_makes_of_each():
    x = samples() + torch.tensor([0.0, 2.0, -1.0, 0, 30, 0])
    lows, highs = torch.stack([part.aminmax(dim=0).min for part in x.chunk(3)]), x.amax(0)[None].expand(3, -1)
    for observer in OBSERVERS:
        scale, zero = channel_grids(observer, lows, highs, x, 4)
        for channel in range(CHANNELS):
            ends = lows[:, channel], highs[:, channel]
            expected = OBSERVERS[observer](*ends, x[:, channel], 4)
            errors = []
            for s, z in (expected, (scale[channel], zero[channel])):
                rounded = ((x[:, channel] / s).round() + z).clamp(0, 15).sub(z) * s
                errors.append(float((rounded - x[:, channel]).square().mean()))
            if observer == "mse":
                # A coarser search over fewer values than mse_grid's.
                assert errors[1] < 1.1 * errors[0]
            else:
                torch.testing.assert_close(torch.stack([scale[channel], zero[channel]]), torch.stack(expected))


def test_grids_come_from_all_columns_of_a_map():
    """Image tokens row by row, the first column of the map all but empty, as of images padded at a side."""
    tokens = torch.randn(4, 64, 64, 256, generator=torch.Generator().manual_seed(0))
    tokens[:, :, 0] *= 0.01
    found = []
    for x in (tokens, tokens[:, :, 1:]):
        quantizer = GroupedQuantizer(4)
        recorder = RangeRecorder([quantizer])
        with recorder.recording(), simulate(activations=False):
            quantizer(x.flatten(1, 2))
        recorder.apply("mse")
        found.append(quantizer.scale.median())
    # The first column alone would ask for a hundredth of the step; samples differ by a few percent.
    torch.testing.assert_close(*found, rtol=0.2, atol=0)


def test_constant_and_one_sided_channels_have_grids():
    x = torch.stack([torch.zeros(50), torch.full((50,), 2.5), -torch.rand(50), torch.rand(50)], 1)
    ends = x.amin(0)[None], x.amax(0)[None]
    for observer in OBSERVERS:
        scale, zero = channel_grids(observer, *ends, x, 4)
        assert bool((scale > 0).all()) and bool(((zero >= 0) & (zero <= 15)).all())
        rounded = ((x / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        assert (rounded - x).abs().max() <= 0.17


def test_channels_come_together_while_their_steps_are_learned():
    generator = torch.Generator().manual_seed(0)
    channels, groups = 40, 2
    x = torch.randn(300, channels, generator=generator) * torch.rand(channels, generator=generator).add(0.2)
    x[:, ::2] += 0.5
    quantizer = calibrated(x, groups=groups, progressive=True)
    parameter = quantizer.learn_scale()
    assert parameter.shape == (channels,), "every channel starts with a step of its own"
    fine, _ = channel_grids("mse", x.amin(0)[None], x.amax(0)[None], x, 4)
    torch.testing.assert_close(quantizer.step(), fine)
    optimiser = torch.optim.Adam([parameter], lr=1e-2)
    counts, steps = [], 10
    for step in range(steps):
        with simulate(activations=True):
            loss = (quantizer(x) - x).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        quantizer.advance((step + 1) / steps)
        counts.append(len(quantizer.step().unique()))
    most = [channels, *(groups * times for _, times in SCHEDULE)]
    # After 20, 40, 60 and 80 % of the steps: 16, 8, 4 and 2 groups.
    assert counts[0] == channels and all(n <= m for n, m in zip(counts[1::2], most[1:])) and counts[-1] == groups
    with simulate(activations=True):
        learned = quantizer(x).detach()
    shared = quantizer.step().detach()
    quantizer.settle()
    assert quantizer.learned is None and quantizer.scale.shape == (groups,)
    with simulate(activations=True):
        torch.testing.assert_close(quantizer(x), learned)
    torch.testing.assert_close(quantizer.step_along(x), shared)
    again = GroupedQuantizer(**{k: v for k, v in quantizer.spec().items() if k != "grid"}, always=True)
    again.load_state_dict(quantizer.state_dict())
    assert again.fault() == "" and torch.equal(again.decode(again.encode(x)), quantizer.decode(quantizer.encode(x)))


def test_a_merged_group_does_not_clip_its_wide_members():
    x = samples() * torch.tensor([1.0, 4, 2, 0.3, 0.1, 9])
    errors = {}
    for merged_by in MERGED_BY:
        quantizer = calibrated(x, groups=1, progressive=True, merged_by=merged_by)
        quantizer.learn_scale()
        means = channel_grids("mse", x.amin(0)[None], x.amax(0)[None], x, 4)[0].mean()
        quantizer.settle()
        with simulate(activations=True):
            errors[merged_by] = float((quantizer(x) - x).square().mean())
        if merged_by == "mean":
            torch.testing.assert_close(quantizer.scale[0], means)
    scale, zero = mse_grid(x.flatten(), x.min(), x.max(), 4)
    best = float((((x / scale).round() + zero).clamp(0, 15).sub(zero) * scale - x).square().mean())
    assert errors["error"] < 0.5 * errors["mean"] and errors["error"] < 1.5 * best, "zero points are the members'"


def test_without_a_step_there_are_as_many_groups_in_the_end():
    quantizer = calibrated(samples(), groups=2, progressive=True)
    quantizer.learn_scale()
    quantizer.settle()
    assert quantizer.scale.shape == (2,) and quantizer.fault() == "" and len(quantizer.group) == CHANNELS
    few = calibrated(samples(), groups=9, progressive=True)
    few.learn_scale()
    few.settle()
    assert few.fault() == "" and len(few.group.unique()) == CHANNELS, "fewer channels than groups"


def test_one_channel_is_searched_as_a_tensor_is():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(3)).exp()
    scale, zero = channel_grids("mse", x.min()[None, None], x.max()[None, None], x[:, None], 4)
    expected = mse_grid(x, x.min(), x.max(), 4)

    def error(s, z):
        return float((((x / s).round() + z).clamp(0, 15).sub(z) * s - x).square().mean())

    assert error(scale, zero) < 1.05 * error(*expected) < error(*grid_from_range(x.min(), x.max(), 4))
