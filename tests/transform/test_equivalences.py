"""Equivalences leave the float model's outputs as they are, on every family; what a table forbids is refused."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL_MODELS, small_model
from torch import nn

from carsam.models.family import find_sites
from carsam.transform import attention_equivalences as attention
from carsam.transform.norm_scale import scale_norm, shift_norm, smoothing
from carsam.transform.operands import Refused, operand
from carsam.transform.rotation import hadamard, keeping_ones, random_orthogonal, rotate_residual
from carsam.transform.statistics import ChannelStatistics

SEEDS = st.integers(0, 2**32 - 1)
# The sites of a SAM 2 with memory are those of the image model, and it is not called with an image.
FAMILIES = sorted(set(SMALL_MODELS) - {"sam2_video"})
few = settings(max_examples=3, deadline=None)


@functools.cache
def subject(name):
    """Small model with something in its biases and norms, its sites, an image and what it gives."""
    model = small_model(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
            if isinstance(module, (nn.LayerNorm, nn.Linear)) and module.bias is not None:
                module.bias.add_(0.2 * torch.randn(module.bias.shape, generator=generator))
    sites = find_sites(model)
    side = sites.family.image_size(model)
    inputs = {
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        "input_boxes": torch.tensor([[[0.1, 0.2, 0.6, 0.7], [0.0, 0.0, 0.9, 0.8]]]) * side,
    }
    with torch.no_grad():
        return model, sites, inputs, model(**inputs)


@torch.no_grad()
def assert_unchanged(name, change):
    """``change(model, sites)`` does something to the weights and nothing to the outputs."""
    model, sites, inputs, before = subject(name)
    changed = copy.deepcopy(model)
    change(changed, sites)
    assert any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed.state_dict().values()))
    after = changed(**inputs)
    # Logits of these models are of the order of 1; the same sums in another order of single precision.
    torch.testing.assert_close(after.pred_masks, before.pred_masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.iou_scores, before.iou_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_not_compensated_shows(name):
    """At every attention and operand, ten times above the tolerance of the tests below."""
    model, sites, inputs, before = subject(name)
    for site in sites.attentions:
        for which in ("query", "value"):
            changed = copy.deepcopy(model)
            part = operand(changed, site, which)
            part.scale(0.2 + 3 * torch.rand(len(part), generator=drawn(0)))
            assert (changed(**inputs).pred_masks - before.pred_masks).abs().max() > 1e-3, (site.name, which)


def exact(sites, name):
    """The attentions of a family on which everything is allowed."""
    found = [site for site in sites.attentions if not site.rotary and not site.pooled]
    assert found, name
    return found


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(SEEDS)
def test_centring(name, seed):
    generator = drawn(seed)

    def change(model, sites):
        for site in exact(sites, name):
            width = len(operand(model, site, "key"))
            attention.centre_keys(model, site, torch.randn(width, generator=generator))
            attention.centre_values(model, site, torch.randn(width, generator=generator))

    assert_unchanged(name, change)


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(SEEDS)
def test_scales(name, seed):
    generator = drawn(seed)

    def change(model, sites):
        for site in exact(sites, name):
            part = operand(model, site, "query")
            factor = 0.2 + 3 * torch.rand(1 if site.positions else part.heads, part.head_dim, generator=generator)
            factor = factor.expand(part.heads, -1).flatten()
            attention.scale_query_key(model, site, factor)
            attention.scale_value_output(model, site, 0.2 + 3 * torch.rand(len(part), generator=generator))

    assert_unchanged(name, change)


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(SEEDS)
def test_maps_of_heads(name, seed):
    generator = drawn(seed)

    def matrices(part, shared):
        size = part.head_dim
        well_conditioned = random_orthogonal(size, generator) * (0.5 + torch.rand(size, generator=generator))
        one = well_conditioned.expand(part.heads, -1, -1)
        more = [random_orthogonal(size, generator) for _ in range(part.heads)]
        return one if shared else torch.stack(more) @ one

    def change(model, sites):
        for site in exact(sites, name):
            part = operand(model, site, "query")
            attention.map_query_key(model, site, matrices(part, bool(site.positions)))
            attention.map_value_output(model, site, matrices(part, False))

    assert_unchanged(name, change)


@pytest.mark.parametrize("name", FAMILIES)
@few
@given(SEEDS)
def test_norms(name, seed):
    generator = drawn(seed)

    def change(model, sites):
        assert sites.readers
        for norm, layer in sites.readers:
            width = model.get_submodule(norm).weight.numel()
            if layer not in sites.padded:
                shift_norm(model, sites, norm, layer, torch.randn(width, generator=generator))
            scale_norm(model, norm, layer, 0.2 + 3 * torch.rand(width, generator=generator))

    assert_unchanged(name, change)


@few
@given(SEEDS)
def test_rotation_of_sams_stream(seed):
    generator = drawn(seed)

    def change(model, sites):
        width = model.config.vision_config.hidden_size
        rotate_residual(model, sites, keeping_ones(random_orthogonal(width - 1, generator)))

    assert_unchanged("sam", change)
    assert subject("sam")[1].padded, "windows that are padded are part of the test"


@given(st.integers(1, 100))
@settings(deadline=None)
def test_orthogonal_matrices(size):
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(hadamard(size) @ hadamard(size).T, eye)
    if size > 1:
        kept = keeping_ones(random_orthogonal(size - 1, drawn(size)))
        torch.testing.assert_close(kept @ kept.T, eye)
        torch.testing.assert_close(kept.sum(0), torch.ones(size, dtype=torch.float64))
    if size & (size - 1) == 0:
        torch.testing.assert_close(hadamard(size).abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


def test_what_a_table_forbids_is_refused_and_changes_nothing():
    model, sites, *_ = subject("sam")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    site = sites.attentions[-1]
    ones = torch.ones(len(operand(model, site, "key")))
    eye = torch.eye(operand(model, site, "key").head_dim).expand(operand(model, site, "key").heads, -1, -1)
    with pytest.raises(Refused, match="RoPE"):
        attention.centre_keys(model, replace(site, rotary=True), ones)
    with pytest.raises(Refused, match="RoPE"):
        attention.scale_query_key(model, replace(site, rotary=True), ones)
    with pytest.raises(Refused, match="RoPE"):
        attention.map_query_key(model, replace(site, rotary=True), eye)
    with pytest.raises(Refused, match="pooled"):
        attention.map_query_key(model, replace(site, pooled=True), eye)
    shared = sites.attentions[0]
    part = operand(model, shared, "query")
    with pytest.raises(Refused, match="relative positions"):
        attention.scale_query_key(model, shared, torch.arange(1.0, len(part) + 1))
    with pytest.raises(Refused, match="relative positions"):
        maps = torch.stack([random_orthogonal(part.head_dim, drawn(head)) for head in range(part.heads)])
        attention.map_query_key(model, shared, maps)
    norm, layer = next(pair for pair in sites.readers if pair[1] in sites.padded)
    with pytest.raises(Refused, match="padded with zeros"):
        shift_norm(model, sites, norm, layer, torch.ones(model.get_submodule(norm).weight.numel()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stream_that_may_not_be_rotated_is_refused_with_the_reason():
    model, sites, *_ = subject("tinyvit")
    with pytest.raises(Refused, match="depthwise"):
        rotate_residual(model, sites, torch.eye(8))
    model, sites, *_ = subject("sam")
    with pytest.raises(Refused, match="image encoder stays"):
        rotate_residual(model, sites.of_decoder(), torch.eye(8))
    model = copy.deepcopy(model)
    norm, _ = next(pair for pair in sites.readers if pair[1] in sites.padded)
    with torch.no_grad():
        model.get_submodule(norm).weight[3] = 0.0
    before = model.get_submodule(norm).bias.clone()
    with pytest.raises(Refused, match="weight near zero"):
        rotate_residual(model, sites, torch.eye(model.config.vision_config.hidden_size))
    assert torch.equal(model.get_submodule(norm).bias, before)


@torch.no_grad()
@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_factors_even_out_what_they_are_made_for(seed):
    generator = drawn(seed)
    spread = 0.3 + 3 * torch.rand(8, generator=generator)
    query, key, flat = ChannelStatistics(), ChannelStatistics(), ChannelStatistics()
    query.update(torch.randn(4000, 8, generator=generator) * spread)
    key.update(torch.randn(4000, 8, generator=generator))
    flat.update(torch.randn(4000, 8, generator=generator))
    t = attention.balance(query, key, 2, shared=False)
    torch.testing.assert_close(t.view(2, 4).log().mean(1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    # Both operands have the same spread in every channel of a head afterwards, up to a factor for the head.
    ratio = (t * query.rms) / (key.std / t)
    torch.testing.assert_close(ratio.view(2, 4), ratio.view(2, 4)[:, :1].expand(-1, 4), rtol=0.05, atol=0)
    shared = attention.balance(query, key, 2, shared=True).view(2, 4)
    assert torch.equal(shared[0], shared[1])
    even = attention.even_values(query, True, 2)
    assert (query.std * even).log().std() < 0.55 * query.std.log().std()
    s = smoothing(query, torch.ones(5, 8), 1.0, centred=False)
    assert (query.reach / s).log().std() < 1e-3 + 0.2 * query.reach.log().std()
