"""AGQ: logarithmic codes of P."""

import pytest
import torch

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers.softmax_log2 import Log2Softmax, round_log2


def log2(bits, tau=2, scale=0.8):
    quantizer = Log2Softmax(bits, always=True)
    quantizer.set_grid(torch.tensor(scale), tau)
    return quantizer


@pytest.mark.parametrize("tau", Log2Softmax.TAUS)
@pytest.mark.parametrize("bits", [3, 4, 6])  # at 8 bits the lowest codes are below single precision
def test_agq_has_tau_codes_to_a_factor_of_two(tau, bits):
    grid = log2(bits, tau).decode(torch.arange(2**bits))
    assert grid[0] == pytest.approx(0.8)
    torch.testing.assert_close(grid[:-1] / grid[1:], torch.full((2**bits - 1,), 2 ** (1 / tau)))
    # Rounded in the logarithm: the error is at most half a code's factor.
    x = torch.linspace(float(grid[-1]), 0.8, 1000)
    ratio = round_log2(x, torch.tensor(0.8), tau, bits) / x
    assert ratio.max() <= 2 ** (0.5 / tau) * 1.0001 and ratio.min() >= 2 ** (-0.5 / tau) * 0.9999


@torch.no_grad()
def test_agq_takes_the_granularity_with_the_least_error_of_pv():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 32, 8, generator=generator)
    chosen = {}
    for name, spread in (("sharp", 6.0), ("broad", 0.3)):
        scores = spread * torch.randn(2, 16, 32, generator=generator)
        quantizer = Log2Softmax(4)
        recorder = RangeRecorder([quantizer])
        with recorder.recording():
            quantizer(scores, value=value)
        recorder.apply("mse")
        probs = torch.softmax(scores, -1)
        assert quantizer.scale == pytest.approx(probs.max().item())
        errors = {
            tau: ((round_log2(probs, quantizer.scale, tau, 4) - probs) @ value).square().sum().item()
            for tau in quantizer.TAUS
        }
        assert int(quantizer.tau) == min(errors, key=errors.get)
        chosen[name] = int(quantizer.tau)
    assert chosen["sharp"] < chosen["broad"], "a broad attention needs fine steps near the top, a sharp one reach"
