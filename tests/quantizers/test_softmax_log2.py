"""AGQ: logarithmic codes of P."""

import pytest
import torch

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers.softmax_log2 import RECORDED_VALUES, Log2Softmax, ProbabilityRecord, round_log2


def log2(bits, tau=2, scale=0.8, **options):
    quantizer = Log2Softmax(bits, always=True, **options)
    quantizer.set_grid(torch.tensor(scale), tau)
    return quantizer


@pytest.mark.parametrize("extra_code", [0, 1])
@pytest.mark.parametrize("tau", Log2Softmax.TAUS)
@pytest.mark.parametrize("bits", [3, 4, 6])  # at 8 bits the lowest codes are below single precision
def test_agq_has_tau_codes_to_a_factor_of_two_and_zero(tau, bits, extra_code):
    quantizer = log2(bits, tau, extra_code=extra_code)
    grid = quantizer.decode(torch.arange(2**bits + extra_code))
    assert grid[0] == pytest.approx(0.8) and grid[-1] == 0 and bool((grid[:-1] > 0).all())
    torch.testing.assert_close(grid[:-2] / grid[1:-1], torch.full((len(grid) - 2,), 2 ** (1 / tau)))
    # Rounded in the logarithm: the error is at most half a code's factor.
    x = torch.linspace(float(grid[-2]), 0.8, 1000)
    rounded = round_log2(x, torch.tensor(0.8), tau, quantizer.zero)
    ratio = rounded / x
    assert ratio.max() <= 2 ** (0.5 / tau) * 1.0001 and ratio.min() >= 2 ** (-0.5 / tau) * 0.9999
    torch.testing.assert_close(quantizer.decode(quantizer.encode(x)), rounded)
    # Half a code below the last one that is not zero, zero begins.
    edge = float(grid[-2]) * 2 ** (-0.5 / tau)
    around = round_log2(torch.tensor([0.0, 0.99 * edge, 1.01 * edge]), torch.tensor(0.8), tau, quantizer.zero)
    assert around[:2].tolist() == [0, 0] and around[2] == pytest.approx(float(grid[-2]))


def searched(spread, keys=32, passes=3):
    """A calibrated quantizer, and its P and V of all passes."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    quantizer = Log2Softmax(4)
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        for _ in range(passes):
            scores = spread * torch.randn(2, 16, keys, generator=generator)
            value = torch.randn(2, keys, 8, generator=generator)
            quantizer(scores, value=value)
            seen.append((torch.softmax(scores, -1), value))
    recorder.apply("mse")
    return quantizer, seen


@torch.no_grad()
def test_agq_takes_scale_and_granularity_with_the_least_error_of_pv():
    chosen = {}
    for name, spread, keys in (("sharp", 6.0, 32), ("broad", 0.3, 32), ("heavy-tailed", 3.0, 256)):
        quantizer, seen = searched(spread, keys)
        high = max(probs.max() for probs, _ in seen)

        def error(scale, tau, seen=seen, zero=quantizer.zero):
            return sum(((round_log2(p, scale, tau, zero) - p) @ v).square().sum().item() for p, v in seen)

        ours = error(quantizer.scale, int(quantizer.tau))
        tried = [error(share * high, tau) for share in torch.logspace(-1.5, 0, 60) for tau in quantizer.TAUS]
        assert ours <= 1.02 * min(tried), "P is kept in half precision"
        chosen[name] = int(quantizer.tau)
    assert chosen["heavy-tailed"] < chosen["broad"], "broad rows need fine steps near the top, heavy tails reach"


def test_few_rows_are_kept_where_they_are_long():
    record = ProbabilityRecord()
    record.update(torch.rand(8, 500, 4096), value=torch.rand(8, 4096, 4))
    kept = sum(rows.numel() for rows, _ in record.rows)
    assert RECORDED_VALUES / 2 <= kept <= 2 * RECORDED_VALUES
    ((rows, value),) = record.products(torch.device("cpu"))
    assert rows.shape[0] == value.shape[0] == len(record.rows) and rows.dtype == value.dtype == torch.float32
