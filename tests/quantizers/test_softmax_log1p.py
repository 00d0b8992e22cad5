"""LNQ: codes of P that are uniform in ln(1 + αx)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carsam.calibrate.observers import RangeRecorder
from carsam.quantizers import SiteQuantizer, simulate
from carsam.quantizers.softmax_log1p import COARSE, Log1pSoftmax, round_log1p

ALPHAS = st.sampled_from(Log1pSoftmax.ALPHAS)
BITS = st.integers(2, 8)
SCALES = st.floats(1e-4, 1.0)


def log1p(bits, alpha=20.0, scale=0.8, **options):
    quantizer = Log1pSoftmax(bits, always=True, **options)
    quantizer.set_grid(torch.tensor(scale), alpha)
    return quantizer


def probabilities(seed, spread, queries=16, keys=48):
    """Scores (2, queries, keys) of that spread, and values (2, keys, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(2, queries, keys, generator=generator), torch.randn(2, keys, 8, generator=generator)


def calibrated(scores, value, bits=4):
    quantizer = Log1pSoftmax(bits)
    recorder = RangeRecorder([quantizer])
    with recorder.recording():
        quantizer(scores, value=value)
    recorder.apply("mse")
    return quantizer


@given(bits=BITS, alpha=ALPHAS, scale=SCALES)
def test_the_grid_is_the_formula(bits, alpha, scale):
    quantizer, top = log1p(bits, alpha, scale), 2**bits - 1
    codes = torch.arange(2**bits)
    exact = ((1 + alpha * scale) ** (codes.double() / top) - 1) / alpha
    torch.testing.assert_close(quantizer.decode(codes).double(), exact, rtol=1e-4, atol=1e-7)
    assert quantizer.decode(codes)[0] == 0, "nothing is a code of its own"
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes.to(torch.uint8)), "codes round trip"


@given(bits=BITS, alpha=ALPHAS, scale=SCALES)
def test_rounding_is_monotone_idempotent_and_stays_in_range(bits, alpha, scale):
    quantizer = log1p(bits, alpha, scale)
    x = torch.linspace(0, 1.5 * scale, 1001)
    once = quantizer.round(x, quantizer.scale)
    assert bool((once.diff() >= 0).all()) and once.min() == 0
    torch.testing.assert_close(once[-1], quantizer.scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(quantizer.round(once, quantizer.scale), once, rtol=1e-5, atol=1e-7 * scale)
    assert len(quantizer.encode(x).unique()) <= 2**bits


@given(bits=st.integers(3, 6), scale=SCALES)
def test_a_small_alpha_is_the_uniform_grid_and_a_large_one_is_finer_near_zero(bits, scale):
    codes = torch.arange(2**bits)
    uniform = scale * codes / (2**bits - 1)
    torch.testing.assert_close(log1p(bits, 0.001, scale).decode(codes), uniform, rtol=1e-3, atol=0)
    first = [float(log1p(bits, alpha, scale).decode(codes)[1]) for alpha in Log1pSoftmax.ALPHAS]
    assert first == sorted(first, reverse=True)


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 8.0))
def test_error_of_pv_is_not_above_that_of_the_best_uniform_grid_over_the_same_ranges(seed, spread):
    scores, value = probabilities(seed, spread)
    quantizer = calibrated(scores, value)
    probs = torch.softmax(scores, -1)

    def error(rounded):
        return float(((rounded - probs) @ value).square().sum())

    steps = COARSE * probs.max() / 15
    uniform = min(error((probs / step).round().clamp(0, 15) * step) for step in steps)
    # The search sees a part of the rows, rounded to half precision: on few values it can miss the best by some percent.
    assert error(quantizer.round(probs, quantizer.scale)) <= 1.15 * uniform + 1e-5
    assert 0.0999 * probs.max() <= quantizer.scale <= 1.0001 * probs.max()


def test_the_search_takes_the_pair_with_the_least_error_of_pv():
    scores, value = probabilities(0, 3.0)
    quantizer, probs = calibrated(scores, value), torch.softmax(scores, -1)
    high = probs.max()

    def error(scale, curve):
        return float(((round_log1p(probs, scale, curve, 15) - probs) @ value).square().sum())

    pairs = [(alpha, share * high) for alpha in Log1pSoftmax.ALPHAS for share in COARSE]
    least = min(error(scale, alpha * scale) for alpha, scale in pairs)
    # Rows and values are kept in half precision, so two pairs of nearly the same error may change places.
    assert error(quantizer.scale, quantizer.curve) <= 1.02 * least
    assert float(quantizer.curve / quantizer.scale) == pytest.approx(10.0), "neither end of the choice"


def test_without_values_the_largest_probability_is_the_top():
    scores, _ = probabilities(0, 2.0)
    quantizer = calibrated(scores, None)
    assert quantizer.scale == torch.softmax(scores, -1).max() and quantizer.fault() == ""


def test_the_public_codes_seventeenth_value_is_an_option():
    x = torch.linspace(0, 1, 4001)
    assert len(log1p(4).encode(x).unique()) == 16
    extra = log1p(4, extra_code=1)
    assert extra.spec() == {"grid": "log1p", "bits": 4, "extra_code": 1}
    assert len(extra.encode(x).unique()) == 17 and float(extra.decode(torch.tensor(16))) == pytest.approx(0.8)


@pytest.mark.parametrize("curve", [0.0, -1.0, float("nan"), float("inf")])
def test_a_curve_without_a_grid_is_a_fault(curve):
    quantizer = log1p(4)
    quantizer.curve.fill_(curve)
    assert quantizer.fault() == "no usable curve"


def test_values_above_the_top_are_clipped_and_pass_no_gradient():
    quantizer = log1p(4, alpha=5.0, scale=0.5)
    x = torch.tensor([0.0, 0.2, 0.5, 0.9], requires_grad=True)
    quantizer.always = False
    with simulate(activations=True):
        out = SiteQuantizer.forward(quantizer, x)
    out.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert quantizer.clipped(x.detach()).tolist() == [False, False, False, True]
