"""Maps of heads that are learned: exact in floating point on every family, and better on images they did not see."""

import copy
import functools

import pytest
import torch
from small_models import small_model

from carsam.bits.plan import BitPlan, Bits
from carsam.models.family import ENCODED, family_of, find_sites
from carsam.models.forward import watched
from carsam.prompts import image as prompted
from carsam.prompts.calibration import CalibrationSet
from carsam.prompts.image import PromptedImage
from carsam.quantizers import ActivationQuantizer, softmax_grids
from carsam.quantizers.ranges import Range, observed_grid
from carsam.transform import learned_maps
from carsam.transform.calls import captured_calls, small_calls
from carsam.transform.learned_maps import learn_maps
from carsam.transform.norm_choice import choose_norms
from carsam.transform.range_choice import choose_ranges

W4A4 = BitPlan(Bits(4, 4))


@functools.cache
def subject(name):
    """A small model whose queries and keys have a few large channels, read-only, and six images of noise."""
    model = small_model(name)
    generator = torch.Generator().manual_seed(0)
    sites = find_sites(model)
    with torch.no_grad():
        for site in sites.attentions:
            layer = model.get_submodule(site.key.layer)
            rows = site.key.rows(layer.out_features)
            layer.weight[rows] *= torch.linspace(0.5, 6, len(layer.weight[rows]))[:, None]
    side, images = family_of(model).image_size(model), []
    for index in range(6):
        corners = torch.rand(2, 2, 2, generator=generator).sort(dim=1).values * (side - 1)
        pixels = torch.randn(1, 3, side, side, generator=generator) + index % 3
        images.append(PromptedImage(str(index), pixels, corners.flatten(1)))
    return model, sites, CalibrationSet.of(images)


def learned(name, plan=W4A4, steps=40):
    model, sites, data = subject(name)
    changed = copy.deepcopy(model)
    grids = {site.name: "row-max" for site in sites.attentions}
    ranges, reports = learn_maps(
        changed,
        sites,
        plan,
        captured_calls(changed, sites, data, len(data.images))[0],
        softmax=lambda grid, _site, bits: softmax_grids()[grid](bits),
        grids=grids,
        observer="min-max",
        ranges={},
        steps=steps,
    )
    return model, changed, data, sites, ranges, reports


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(**image.inputs("cpu")).pred_masks.flatten() for image in data.images])


@pytest.mark.parametrize("name", ["sam", "tinyvit", "sam2"])
def test_the_float_model_stays_what_it_is_and_outputs_lose_less(name):
    model, changed, data, sites, ranges, reports = learned(name)
    assert any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed.state_dict().values()))
    torch.testing.assert_close(logits(changed, data), logits(model, data), atol=1e-4, rtol=1e-4)
    assert [report["attention"] for report in reports] == [site.name for site in sites.attentions]
    kept = [report for report in reports if report["kept"] != "none"]
    # What is kept is better by held-out images; here, with channels of such differing size, at nearly all attentions.
    assert len(kept) > len(reports) / 2 and all(report["error"] < 0.98 for report in kept)
    assert all(isinstance(each, Range) and each.low <= 0 <= each.high for each in ranges.values())
    names = {site.input for site in sites.layers} | {
        site.operand(which) for site in sites.attentions for which in ("query", "key", "value")
    }
    assert ranges.keys() <= names
    for site in sites.attentions:
        forbidden = site.rotary or site.pooled
        report = next(each for each in reports if each["attention"] == site.name)
        assert not (forbidden and "query-key" in report["kept"])


def test_nothing_is_learned_where_nothing_is_quantized():
    model, changed, _, _, ranges, reports = learned("sam", BitPlan(Bits(16, 16)))
    assert ranges == {} and reports == []
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed.state_dict().values()))


def test_nothing_is_learned_where_nothing_is_to_be_won(monkeypatch):
    """The small model's outputs hardly vary, so that its relative errors are large; the limit is moved instead."""
    monkeypatch.setattr(learned_maps, "LEAST_ERROR", 1e9)
    _, _, _, sites, ranges, reports = learned("sam")
    assert ranges == {} and [report["kept"] for report in reports] == ["none"] * len(sites.attentions)


def test_a_range_stands_where_an_observer_may():
    quantizer = ActivationQuantizer(4)
    quantizer.set_grid(*observed_grid(Range(-3.5, 4.0), *[torch.tensor([9.0])] * 3, 4))
    low, high = quantizer.limits()
    assert (low * float(quantizer.scale), high * float(quantizer.scale)) == (-3.5, 4.0)


def test_calls_of_many_scores_are_made_one_window_or_tile_at_a_time():
    windows = torch.randn(4, 14, 14, 8)
    by_name = small_calls(((), {"hidden_states": windows, "output_attentions": None}), 12)
    assert all(args == () and kwargs["output_attentions"] is None for args, kwargs in by_name)
    assert torch.equal(torch.cat([kwargs["hidden_states"] for _, kwargs in by_name]), windows)
    assert [args[0].shape for args, _ in small_calls(((windows,), {}), 12)] == [(1, 14, 14, 8)] * 4
    assert len(small_calls(((windows,), {}), 1)) == 1  # few scores: as they were
    image = torch.randn(1, 32, 24, 8)
    tiles = [args[0] for args, _ in small_calls(((image,), {}), 12)]
    assert [tile.shape for tile in tiles] == [(1, 16, 16, 8), (1, 16, 8, 8)] * 2
    assert torch.equal(torch.cat([torch.cat(tiles[:2], 2), torch.cat(tiles[2:], 2)], 1), image)
    # Of an attention between prompts and image nothing is cut.
    between = ((torch.randn(2, 4096, 8), torch.randn(2, 7, 8)), {})
    assert small_calls(between, 12) == [between]
    prompts = ((torch.randn(99, 70, 70, 8),), {"key": torch.randn(2, 7, 8)})
    assert small_calls(prompts, 12) == [prompts]


def test_every_attention_is_called_once_an_image_also_where_a_family_does_not_decode(monkeypatch):
    model, sites, data = subject("sam")
    with_decode, encoded = captured_calls(model, sites, data, 6)
    assert len(encoded) == 6
    monkeypatch.delattr(type(sites.family), "decode")
    without, encoded = captured_calls(model, sites, data, 6)
    assert encoded == []
    for calls in (with_decode, without):
        assert all((each.fit_images, each.judge_images) == ([0, 1, 3, 4], [2, 5]) for each in calls.values())


@pytest.mark.parametrize("name", ["sam", "sam2", "tinyvit"])
def test_of_large_images_a_few_show_the_encoder_and_all_show_the_decoder(name, monkeypatch):
    model, sites, data = subject(name)
    small, encoded = captured_calls(model, sites, data, 6)
    encodings: list[str] = []

    def around(half, run):
        encodings.append(half)
        return run()

    monkeypatch.setattr(prompted, "LARGE", data.images[0].pixel_values.shape[-1] - 1)
    with watched(around):
        unknown, _ = captured_calls(model, sites, data, 6)
    assert encodings.count("encode") == 6, "embeddings that nobody knows must be computed"
    known, encodings[:] = data.with_first_embeddings([each[ENCODED] for each in encoded]), []
    with watched(around):
        large, found = captured_calls(model, sites, known, 6)
        assert encodings.count("encode") == 3
        torch.testing.assert_close(found, encoded)
        ranges, _ = choose_ranges(model, sites, known, W4A4, observers=("mse", "min-max"), shifts=True)
        assert encodings.count("encode") == 6
        choose_norms(copy.deepcopy(model), sites, known, W4A4, strengths=(0.5,), shift=False)
        assert encodings.count("encode") == 9
    layers = {site.input for site in sites.layers if site.name.startswith(sites.decoder)}
    usual, _ = choose_ranges(model, sites, data, W4A4, observers=("mse", "min-max"), shifts=True)
    assert {site for site in ranges if site in layers} == {site for site in usual if site in layers} != set()
    for site in sites.attentions:
        seen = ([0, 1, 3, 4], [2, 5]) if site.name.startswith(sites.decoder) else ([0, 1], [2])
        assert (large[site.name].fit_images, large[site.name].judge_images) == seen
        assert len(unknown[site.name].fit) == len(small[site.name].fit) == 4
        for few, many in zip(large[site.name].fit, small[site.name].fit):
            torch.testing.assert_close(few, many)
