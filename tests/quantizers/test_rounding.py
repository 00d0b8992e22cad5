"""Weight grids and AdaRound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import SoftRound, initial_alpha, rectified_sigmoid, rounding_span, weight_grid

seeds = st.integers(0, 2**32 - 1)


def weights(seed, shape=(6, 40)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(2, 8))
def test_mse_search_is_never_worse_than_the_full_range(seed, bits):
    w = weights(seed)

    def error(observer):
        s, z = (v[:, None] for v in weight_grid(w, bits, observer=observer))
        return (decode(encode(w, s, z, bits), s, z) - w).abs().pow(2.4).sum(1)

    assert (error("mse") <= error("min-max") + 1e-6).all()


def test_grid_does_not_depend_on_how_rows_are_grouped(monkeypatch):
    w = weights(0, (64, 100))
    whole = weight_grid(w, 4)
    monkeypatch.setattr("carsam.quantizers.rounding.SEARCH_ELEMENTS", 300)
    for a, b in zip(whole, weight_grid(w, 4)):
        assert torch.equal(a, b)


@given(seeds, st.integers(2, 8))
def test_learned_rounding_starts_at_the_float_weight(seed, bits):
    w = weights(seed)
    s, z = (v[:, None] for v in weight_grid(w, bits, observer="min-max"))
    base, span = rounding_span(w, s, z, bits)
    soft = SoftRound.apply(initial_alpha(w, s), base, span, None)
    inside = span > 0
    torch.testing.assert_close(soft[inside], w[inside], atol=1e-5, rtol=1e-4)


def test_gradient_with_regulariser_is_that_of_the_written_out_loss():
    w, upstream = weights(1), weights(2)
    s, z = (v[:, None] for v in weight_grid(w, 4))
    alpha = initial_alpha(w, s).requires_grad_()
    SoftRound.apply(alpha, *rounding_span(w, s, z, 4), (0.01, 7.0)).backward(upstream)

    alpha2 = alpha.detach().clone().requires_grad_()
    h = (torch.sigmoid(alpha2) * 1.2 - 0.1).clamp(0, 1)
    soft = s * (((w / s).floor() + h + z).clamp(0, 15) - z)
    ((soft * upstream).sum() + 0.01 * (1 - (2 * h - 1).abs().pow(7)).sum()).backward()
    torch.testing.assert_close(alpha.grad, alpha2.grad)


def test_a_layer_ends_on_the_grid_and_follows_alpha():
    torch.manual_seed(0)
    linear = nn.Linear(20, 8)
    layer = QuantizedLayer(linear, 4, ActivationQuantizer(16))
    original = layer.weight.detach().clone()
    layer.fit_weight()
    alpha = layer.learn_rounding()
    with torch.no_grad():
        alpha.copy_(torch.randn_like(alpha) * 5)
    up = alpha.detach() >= 0
    scale, zero = layer.weight_scale[:, None], layer.weight_zero_point[:, None]
    expected = ((original / scale).floor() + up + zero).clamp(0, 15)
    layer.freeze()
    assert torch.equal(layer.codes.float(), expected)
    torch.testing.assert_close(layer.weight, (expected - zero) * scale)
    assert torch.equal(layer.simulated_weight(), layer.weight)


def test_hard_and_soft_agree_once_rounding_is_decided():
    w = weights(3)
    s, z = (v[:, None] for v in weight_grid(w, 4))
    alpha = torch.where(weights(4) > 0, 20.0, -20.0)
    assert set(rectified_sigmoid(alpha).unique().tolist()) == {0.0, 1.0}
    soft = SoftRound.apply(alpha, *rounding_span(w, s, z, 4), None)
    codes = soft / s + z
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_conv_is_quantized_like_its_unfolded_linear():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    layer = QuantizedLayer(conv, 4, ActivationQuantizer(16))
    layer.fit_weight()
    x = torch.randn(2, 3, 6, 6)
    with simulate(weights=True):
        out = layer(x)
    columns = nn.functional.unfold(x, 3, padding=1)
    s, z = (v[:, None] for v in weight_grid(conv.weight.detach().flatten(1), 4))
    weight = decode(encode(conv.weight.detach().flatten(1), s, z, 4), s, z)
    torch.testing.assert_close(out.flatten(2), weight @ columns, atol=1e-5, rtol=1e-4)
