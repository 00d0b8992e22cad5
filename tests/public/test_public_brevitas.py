"""Brevitas: AdaRound's soft and hard rounding with its gradient, regulariser and schedule; grids of weights."""

import pytest
import torch
from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid
from brevitas.inject.enum import LearnedRoundImplType
from brevitas.nn import QuantLinear
from brevitas.quant.scaled_int import Int8WeightPerChannelFloat
from brevitas.quant.shifted_scaled_int import ShiftedUint8WeightPerChannelFloat, ShiftedUint8WeightPerChannelFloatMSE
from brevitas_examples.common.learned_round.learned_round_method import (
    LinearTempDecay,
    RoundRegularisationLoss,
    insert_learned_round_quantizers,
    return_learned_round_quantizers,
)
from torch import nn

from carsam.calibrate.cache import CacheSpace
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, simulate
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import SoftRound, rectified_sigmoid, weight_grid
from carsam.reconstruct.layerwise import single_layer
from carsam.reconstruct.optimize import ReconstructionSettings, UnitData, optimise

BITS = (2, 4, 8)


def asymmetric(weight, bits, quantizer=ShiftedUint8WeightPerChannelFloat):
    """Brevitas' layer of the same weights with one asymmetric grid per output channel."""
    layer = QuantLinear(weight.shape[1], weight.shape[0], bias=False, weight_quant=quantizer, weight_bit_width=bits)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.eval()


def learning(weight, bits):
    """Their layer and ours, learning the rounding of the same weights on the same grid.

    The grid is symmetric: the zero points of an asymmetric one go through the learned rounding as well in Brevitas, and
    come out as others than those it started from.
    """
    symmetric = {"weight_quant": Int8WeightPerChannelFloat, "weight_narrow_range": False}
    theirs = QuantLinear(weight.shape[1], weight.shape[0], bias=False, weight_bit_width=bits, **symmetric)
    ours = QuantizedLayer(nn.Linear(weight.shape[1], weight.shape[0], bias=False), bits, ActivationQuantizer(16))
    with torch.no_grad():
        theirs.weight.copy_(weight)
        ours.weight.copy_(weight)
    theirs.eval()
    ours.weight_scale = theirs.quant_weight().scale.detach().flatten()
    ours.weight_zero_point = torch.full_like(ours.weight_scale, 2 ** (bits - 1))
    ours.learn_rounding()
    insert_learned_round_quantizers(theirs, LearnedRoundImplType.HARD_SIGMOID)
    return theirs, ours


def rounding(layer):
    (found,) = return_learned_round_quantizers(layer)
    return found


def test_rectified_sigmoid():
    alpha = torch.linspace(-6, 6, 4001)
    soft, hard = LearnedRoundHardSigmoid().train(), LearnedRoundHardSigmoid().eval()
    torch.testing.assert_close(rectified_sigmoid(alpha.clone()), soft(alpha))
    # The hard form: α ≥ 0 here, h > ½ there; α = 0 alone, which is half-way, goes up here and down there.
    away = alpha != 0
    assert torch.equal((alpha >= 0)[away], hard(alpha).bool()[away])


@pytest.mark.parametrize("bits", BITS)
def test_min_max_grid_and_nearest_rounding(bits, weight, same_codes):
    found = asymmetric(weight, bits).quant_weight()
    scale, zero = weight_grid(weight, bits, observer="min-max")
    torch.testing.assert_close(scale, found.scale.flatten())
    assert torch.equal(zero, found.zero_point.flatten())
    same_codes(encode(weight, scale[:, None], zero[:, None], bits), found.int(), weight / scale[:, None])


@pytest.mark.parametrize("bits", BITS)
def test_learned_rounding_starts_alike(bits, weight):
    theirs, ours = learning(weight, bits)
    value, alpha = rounding(theirs).value.detach(), ours.alpha.detach()
    torch.testing.assert_close(rectified_sigmoid(alpha.clone()), rectified_sigmoid(value.clone()), atol=1e-5, rtol=0)
    torch.testing.assert_close(alpha, value, atol=1e-3, rtol=1e-3)


def set_alpha(theirs, ours, seed):
    """Another α for both, where h takes all values from 0 to 1."""
    alpha = 2 * torch.randn(ours.alpha.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours.alpha.copy_(alpha)
        rounding(theirs).value.copy_(alpha)
    return alpha


@pytest.mark.parametrize("bits", BITS)
def test_soft_weights_and_their_gradient(bits, weight):
    theirs, ours = learning(weight, bits)
    set_alpha(theirs, ours, 0)
    with simulate(weights=True):
        soft = ours.simulated_weight()
    expected = theirs.train().quant_weight().value
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    soft.backward(upstream)
    expected.backward(upstream)
    # Where rounding up leaves the grid the clip stops the gradient here; theirs passes straight through the clip.
    free = ours._span[1] > 0
    assert 0.5 < free.float().mean() < 1
    assert not bool(ours.alpha.grad[~free].any()) and bool(rounding(theirs).value.grad[~free].any())
    torch.testing.assert_close(ours.alpha.grad[free], rounding(theirs).value.grad[free], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_hard_rounding(bits, weight):
    theirs, ours = learning(weight, bits)
    set_alpha(theirs, ours, 2)
    nearest = encode(weight, ours.weight_scale[:, None], ours.weight_zero_point[:, None], bits)
    ours.freeze()
    signed = theirs.eval().quant_weight().int().int()
    assert torch.equal(ours.codes.int() - 2 ** (bits - 1), signed)
    assert not torch.equal(ours.codes.float(), nearest)


@pytest.mark.parametrize("step", [0, 19, 20, 50, 99])
def test_regulariser(step, weight):
    """Its gradient; AdaRound's β and λ at a step of a hundred."""
    theirs, ours = learning(weight, 4)
    alpha = set_alpha(theirs, ours, 3)
    theirs.train()
    loss = RoundRegularisationLoss(theirs, weight=0.01, max_count=100, b_range=(20, 2), warmup=0.2)
    loss.iter = step - 1  # it counts before it looks
    value = loss(torch.zeros(1), torch.zeros(1))
    penalty = penalties(100)[step]
    if penalty is None:
        assert value == 0
        return
    value.backward()
    alpha.requires_grad_()
    zero = torch.zeros_like(weight)
    SoftRound.apply(alpha, zero, zero, penalty).sum().backward()
    assert alpha.grad.abs().max() > 1e-4
    torch.testing.assert_close(alpha.grad, rounding(theirs).value.grad, rtol=1e-4, atol=1e-6)


def penalties(steps):
    """What the optimiser loop sets on a layer, step by step."""
    toy = nn.Module()
    toy.layer = QuantizedLayer(nn.Linear(3, 2), 4, ActivationQuantizer(16))
    toy.layer.fit_weight("min-max")
    caches = [CacheSpace().cache() for _ in range(3)]
    for cache, name in zip(caches, ("x", "x", "y")):
        cache.append({name: torch.ones(1, 3 if name == "x" else 2)})
    seen = []
    unit, settings = single_layer("layer", "layer", -1), ReconstructionSettings(learn_scales=False)
    optimise(
        toy,
        unit,
        UnitData(*caches, [1.0]),
        settings,
        steps=steps,
        seed=0,
        device=torch.device("cpu"),
        progress=lambda _: seen.append(toy.layer.penalty),
    )
    return seen


def test_schedule_of_the_regulariser():
    decay = LinearTempDecay(250, rel_start_decay=0.2, start_b=20, end_b=2)
    found = penalties(250)
    assert found[:50] == [None] * 50 and len(found) == 250
    for step, (weight, beta) in enumerate(found[50:], start=50):
        assert weight == 0.01 and beta == pytest.approx(decay(step))


@pytest.mark.parametrize("bits", [3, 4])
def test_mse_search_is_no_worse(bits, weight):
    """Theirs shrinks the step and keeps the zero point, so that some rows come out better, but fewer."""

    def error(found):
        return (found - weight).square().sum(1)

    def searched(observer):
        scale, zero = (v[:, None] for v in weight_grid(weight, bits, observer=observer, power=2))
        return error(decode(encode(weight, scale, zero, bits), scale, zero))

    expected = error(asymmetric(weight, bits, ShiftedUint8WeightPerChannelFloatMSE).quant_weight().value)
    ratio = searched("mse") / expected
    assert bool((expected < searched("min-max")).any())
    assert ratio.mean() < 1 and ratio.max() < 1.15
