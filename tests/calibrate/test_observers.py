"""Observers, the activation cache, and capturing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from carsam.calibrate.cache import CacheSpace
from carsam.calibrate.capture import capture_call
from carsam.calibrate.observers import RangeRecorder
from carsam.errors import ConfigError
from carsam.quantizers import ActivationQuantizer
from carsam.quantizers.affine import decode, encode, grid_from_range
from carsam.quantizers.ranges import mse_grid
from carsam.quantizers.uniform import UniformRecord


def record(*passes):
    site = UniformRecord()
    for values in passes:
        site.update(torch.as_tensor(values))
    return site


def span(grid, bits):
    scale, zero = grid
    return float(-zero * scale), float((2**bits - 1 - zero) * scale)


def test_min_max_sees_all_passes_and_moving_average_their_mean():
    site = record([-1.0, 2.0], [-3.0, 6.0])
    assert span(site.uniform_grid(8, "min-max"), 8) == pytest.approx((-3, 6), abs=0.03)
    assert span(site.uniform_grid(8, "moving-average"), 8) == pytest.approx((-2, 4), abs=0.03)


def test_percentile_ignores_a_lone_outlier():
    values = torch.linspace(-1, 1, 16000)
    values[5] = 100.0
    assert span(record(values).uniform_grid(8, "percentile"), 8)[1] < 1.1


def squared_error(x, grid, bits):
    scale, zero = grid
    return (decode(encode(x, scale, zero, bits), scale, zero) - x).square().sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from([1.0, 30.0]))
def test_mse_beats_min_max(seed, bits, tail):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    x[::500] *= tail
    found = squared_error(x, mse_grid(x, x.min(), x.max(), bits), bits)
    # The error is weighed on a histogram, so a tie may fall to the wrong side by its resolution.
    assert found <= 1.02 * squared_error(x, grid_from_range(x.min(), x.max(), bits), bits)


def test_constant_and_one_sided_sites_have_a_grid():
    for values in (torch.zeros(10), torch.rand(100) + 1, -torch.rand(100)):
        scale, zero = record(values).uniform_grid(4, "mse")
        assert scale > 0 and 0 <= zero <= 15


def test_unknown_observer_names_the_choices():
    with pytest.raises(ConfigError, match="min-max"):
        record([1.0]).uniform_grid(4, "median")


def test_recorder_sees_its_modules_only_and_misses_are_errors():
    a, b = ActivationQuantizer(4), ActivationQuantizer(4)
    recorder = RangeRecorder([a])
    with recorder.recording():
        assert torch.equal(a(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
        b(torch.tensor([5.0]))
    recorder.apply("min-max")
    assert a.is_calibrated and not b.is_calibrated
    with pytest.raises(RuntimeError, match="saw no value"):
        RangeRecorder([b]).apply("min-max")


@pytest.mark.parametrize("budget", [2**30, 0])
def test_cache_gives_back_half_precision_in_memory_and_spilled(budget, tmp_path):
    cache = CacheSpace(budget, tmp_path).cache()
    a = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    same = torch.randn(1, 4).expand(6, 4)
    cache.append({"a": a, "same": same})
    cache.append({"a": 2 * a, "same": same + 1})
    got = cache.batch([0, 1], torch.device("cpu"))
    torch.testing.assert_close(got["a"], torch.cat([a, 2 * a]).half().float())
    torch.testing.assert_close(got["same"], torch.cat([same, same + 1]).half().float())
    stored, repeats = cache._items[0]["same"]
    assert stored.shape == (1, 4) and repeats == 6  # repeated rows are stored once


def test_cache_memory_is_accounted_and_released():
    space = CacheSpace(10_000)
    cache = space.cache()
    cache.append({"x": torch.randn(1000)})
    assert space.in_memory == 2000
    del cache
    assert space.in_memory == 0


def test_cache_saturates_instead_of_overflowing():
    cache = CacheSpace().cache()
    cache.append({"x": torch.tensor([1e9, -1e9])})
    assert torch.isfinite(cache.get(0, torch.device("cpu"))["x"]).all()


def test_capture_stops_at_the_module_and_cleans_up():
    late = []
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def run():
        second(first(torch.ones(1, 2)))
        late.append(1)

    args, _ = capture_call(second, run)
    torch.testing.assert_close(args[0], first(torch.ones(1, 2)))
    assert not late and not second._forward_pre_hooks
    with pytest.raises(RuntimeError, match="never reached"):
        capture_call(second, lambda: first(torch.ones(1, 2)))
