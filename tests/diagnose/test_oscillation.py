"""The decoder between nearest rounding and the finished model."""

import pytest
import torch

from carsam.diagnose.measures import total_variation
from carsam.diagnose.oscillation import (
    StageErrors,
    UnitGroup,
    moment_outputs,
    oscillation,
    unit_groups,
)
from carsam.diagnose.pair import round_to_nearest
from carsam.diagnose.passes import encode_images
from carsam.prompts.calibration import CalibrationSet
from carsam.quantizers import QuantizedLayer, simulate
from carsam.reconstruct.layerwise import single_layer
from carsam.reconstruct.units import decoder_units, encoder_units

DECODER = "mask_decoder.transformer"


@pytest.fixture(scope="module")
def course(pair, samples, passes):
    _, rounded = round_to_nearest(pair, CalibrationSet.of(samples))
    with simulate(weights=True, activations=True):
        nearest = encode_images(rounded, pair, samples)
    boxes = [sample.boxes for sample in samples]
    seen = []
    found = oscillation(pair, rounded, boxes, (*passes.embeddings, nearest), lambda *done: seen.append(done))
    assert seen[-1][0] == seen[-1][1] == len(found.moments) + 1
    assert rounded.get_submodule(f"{DECODER}.layers.0.mlp") is pair.packed.get_submodule(f"{DECODER}.layers.0.mlp")
    return found


def test_moments_follow_the_units(course):
    assert [moment.after.removeprefix(DECODER + ".") for moment in course.moments] == [
        *("nearest rounding", "encoder", "layers.0.self_attn", "layers.0.pair", "layers.1.self_attn", "layers.1.pair"),
        "final_attn_token_to_image",
    ]
    assert course.stages == (
        *(
            f"layers.{block}.{part}"
            for block in (0, 1)
            for part in ("self_attn", "cross_attn_token_to_image", "mlp", "cross_attn_image_to_token")
        ),
        "final_attn_token_to_image",
    )
    for moment in course.moments:
        assert len(moment.errors) == 9
        assert all(0 < error < 2 for error in moment.errors)
        assert moment.total_variation == pytest.approx(total_variation(moment.errors))


def test_the_last_moment_is_the_packed_model(course):
    """Apart from what is left in floating point, which the packed file rounds to FP16."""
    assert course.moments[-1].errors == pytest.approx(course.errors, rel=0.02)
    assert course.total_variation == pytest.approx(total_variation(course.errors))


def test_a_unit_changes_no_stage_before_it(course):
    by_name = {moment.after.removeprefix(DECODER + "."): moment.errors for moment in course.moments}
    stages = course.stages
    before, after = by_name["layers.0.pair"], by_name["layers.1.self_attn"]
    first = stages.index("layers.1.self_attn")
    assert before[:first] == after[:first]
    assert before[first] != after[first]


def test_neighbours_are_read_from_the_moments(course):
    pairs = {(each.stage, each.neighbour): each for each in course.neighbours}
    t2i, i2t = "layers.0.cross_attn_token_to_image", "layers.0.cross_attn_image_to_token"
    # Both lie in the pair, the fourth moment.
    for stage, neighbour in ((t2i, i2t), (i2t, t2i), ("layers.1.cross_attn_token_to_image", i2t)):
        index = course.stages.index(stage)
        each = pairs[stage, neighbour]
        assert (each.before, each.after) == (course.moments[2].errors[index], course.moments[3].errors[index])
    assert ("final_attn_token_to_image", "layers.1.cross_attn_image_to_token") in pairs
    assert len(pairs) == 6


def test_float_against_itself_is_exact(pair, samples, passes):
    meter = StageErrors(pair, [sample.boxes for sample in samples], passes.embeddings[0])
    # The targets lie in half precision.
    assert max(meter.measure(pair.reference, passes.embeddings[0])) < 1e-6


def test_stage_outputs_are_the_norms(pair, samples, passes):
    with moment_outputs(pair.packed, pair.sites) as outputs, torch.no_grad():
        pair.packed(pixel_values=samples[0].pixel_values, input_boxes=samples[0].boxes[None])
    assert [f"{DECODER}.{name}" for name in outputs] == [moment.name for moment in pair.sites.moments]
    assert outputs["layers.0.cross_attn_image_to_token"].shape == (2, 1, 256, 256)
    assert outputs["layers.0.mlp"].shape == (1, 2, 7, 256)
    # No hook is left behind.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.packed.modules())


@pytest.mark.parametrize(("granularity", "count"), [("module", 9), ("pair", 5), ("block", 3), ("decoder", 1)])
def test_groups_cover_the_decoder(granularity, count, pair):
    groups = unit_groups(encoder_units(pair.sites) + decoder_units(pair.sites, granularity), pair.sites)
    assert len(groups) == count
    for site in pair.sites.layers:
        if pair.sites.in_decoder(site.name):
            assert sum(group.holds(site.name) for group in groups) == 1
    for stage, neighbour in pair.sites.neighbours:
        assert any(group.holds(stage) for group in groups)
        assert any(group.holds(neighbour) for group in groups)


def test_an_attention_is_never_cut(pair):
    """Units of single layers: those of one attention are put into place together, after the last of them."""
    block = f"{DECODER}.layers.0"
    names = [f"{block}.self_attn.q_proj", f"{block}.self_attn.out_proj", f"{block}.mlp.lin1", f"{block}.mlp.lin2"]
    groups = unit_groups([single_layer(name, block, -1) for name in names], pair.sites)
    assert groups == (
        UnitGroup(f"{block}.self_attn.out_proj", (f"{block}.self_attn",)),
        UnitGroup(f"{block}.mlp.lin1", (f"{block}.mlp.lin1",)),
        UnitGroup(f"{block}.mlp.lin2", (f"{block}.mlp.lin2",)),
    )


def test_rounded_model_has_the_packed_models_bits(pair, samples):
    base, rounded = round_to_nearest(pair, CalibrationSet.of(samples[:1]))
    assert base is pair.reference  # CAR-SAM changes nothing before rounding
    for site in pair.sites.layers:
        layer = rounded.get_submodule(site.name)
        assert isinstance(layer, QuantizedLayer)
        assert (layer.weight_bits, layer.input_quantizer.bits) == (4, 4)
        assert len(layer.codes.unique()) <= 16
        # The float models keep their weights.
        assert pair.source.get_submodule(site.name).weight is pair.reference.get_submodule(site.name).weight
        assert not torch.equal(layer.weight, pair.source.get_submodule(site.name).weight)
