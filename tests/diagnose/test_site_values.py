"""Ranges, histograms and clipping of the packed model's sites; errors of its weights."""

import math

import pytest
import torch

from carsam.calibrate.capture import capture_call
from carsam.diagnose.site_values import grid_ends, histogram, weight_error, weight_results
from carsam.predict.predictor import predict_logits
from carsam.quantizers import (
    ActivationQuantizer,
    GroupedQuantizer,
    HybridQuantizer,
    Log2Softmax,
    RowMaximumSoftmax,
    ShiftedQuantizer,
    UniformSoftmax,
)


def test_every_site_in_execution_order(passes, pair):
    names = [each.site for each in passes.sites]
    assert sorted(names) == sorted(pair.sites.activation_names)
    assert names[:6] == [
        *(f"vision_encoder.layers.0.attn.{part}" for part in ("qkv.input", "query", "key", "value", "probs")),
        "vision_encoder.layers.0.attn.proj.input",
    ]
    for each in passes.sites:
        assert (each.grid, each.bits) == ("uniform", 4)
        assert each.low <= each.high
        assert each.grid_low <= 0 <= each.grid_high
        assert 0 <= each.clipped < 0.5
        assert each.modes >= 1
        assert len(each.histogram.counts) == 64
        assert sum(each.histogram.counts) > 100
        if each.site.endswith(".probs"):
            assert each.low >= 0
            assert each.high <= 1


def test_ends_and_clipping_are_exact(passes, pair, samples):
    name = pair.sites.focus[-1]
    layer = pair.packed.get_submodule(name).k_proj
    values = []
    for sample, embedding in zip(samples, passes.embeddings[1]):

        def run(embedding=embedding, sample=sample):
            predict_logits(pair.packed, embedding, boxes=sample.boxes)

        values.append(capture_call(layer, run)[0][0].flatten())
    values = torch.cat(values)
    found = next(each for each in passes.sites if each.site == f"{name}.k_proj.input")
    assert (found.low, found.high) == pytest.approx((values.min().item(), values.max().item()), rel=1e-4)
    quantizer = layer.input_quantizer
    assert (found.grid_low, found.grid_high) == pytest.approx(
        tuple(end * quantizer.scale.item() for end in quantizer.limits())
    )
    half = quantizer.scale.item() / 2
    beyond = (values < found.grid_low - half) | (values > found.grid_high + half)
    assert found.clipped == pytest.approx(beyond.float().mean().item(), abs=2e-5)


def test_histogram():
    found = histogram(torch.tensor([0.0, 0.1, 0.9, 1.0, 1.0]), 0.0, 1.0, bins=4)
    assert (found.low, found.high, found.counts) == (0.0, 1.0, (2, 0, 0, 3))
    assert histogram(torch.full((7,), 2.0), 2.0, 2.0, bins=3).counts == (7, 0, 0)


def uniform(kind=ActivationQuantizer):
    quantizer = kind(4, always=True)
    inner = quantizer.quantizer if kind is UniformSoftmax else quantizer
    inner.set_grid(torch.tensor(0.5), torch.tensor(3.0))
    return quantizer


def hybrid():
    quantizer = HybridQuantizer(4, always=True)
    quantizer.set_grid(torch.tensor(0.5), torch.tensor(1.5), torch.tensor(-0.5), 8)
    return quantizer


def log2():
    quantizer = Log2Softmax(4, always=True)
    quantizer.set_grid(torch.tensor(0.8), 2)
    return quantizer


def shifted():
    quantizer = ShiftedQuantizer(4, always=True)
    quantizer.set_grid(torch.tensor(0.5), torch.tensor([-1.0, 0.0, 2.0]))
    return quantizer


def grouped():
    quantizer = GroupedQuantizer(4, always=True, groups=2, channels=3)
    quantizer.set_grid(torch.ones(2), torch.zeros(2), torch.tensor([0, 1, 1]))
    return quantizer


@pytest.mark.parametrize(
    ("quantizer", "ends"),
    [
        (uniform(), (-1.5, 6.0)),
        (uniform(UniformSoftmax), (-1.5, 6.0)),
        (hybrid(), (-0.5, 1.0 + 7 * 0.5)),
        (log2(), (0.0, 0.8)),
        (grouped(), (None, None)),
        (shifted(), (None, None)),
        (RowMaximumSoftmax(4, always=True), (None, None)),
    ],
)
def test_grid_ends(quantizer, ends):
    found = grid_ends(quantizer)
    assert found == ends if ends[0] is None else found == pytest.approx(ends, rel=1e-5)


def test_weight_error():
    weight = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    rounded = (weight * 8).round() / 8
    expected = ((rounded - weight).square().sum() / weight.square().sum()).item()
    assert weight_error(rounded, weight) == pytest.approx(expected)
    flips = torch.tensor([1, -1, 1, 1, -1, -1.0])[:, None, None]
    assert weight_error(rounded * flips, weight) == pytest.approx(expected)
    assert weight_error(weight, weight) == 0


def test_weights_of_the_packed_model(pair):
    results = weight_results(pair)
    assert [each.site for each in results] == [site.name for site in pair.sites.layers]
    for each in results:
        shape = pair.source.get_submodule(each.site).weight.shape
        assert (each.bits, each.parameters) == (4, math.prod(shape))
        # MAC's value branch, on three images, moves the value projections far.
        assert 1e-4 < each.error < 0.1 or (each.error > 0 and each.site.endswith("v_proj"))
