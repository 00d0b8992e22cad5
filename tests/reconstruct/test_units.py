"""Units, the pair, losses and the optimiser loop, on the embedded model."""

import copy

import pytest
import torch

from carsam.bits.plan import BitPlan
from carsam.calibrate.cache import CacheSpace, variances
from carsam.calibrate.observers import RangeRecorder
from carsam.errors import ConfigError
from carsam.methods.base import Method
from carsam.models.family import GRANULARITIES, find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sam.decoder import decoder_input
from carsam.prompts.calibration import CalibrationImage
from carsam.quantizers import QuantizedLayer, SiteQuantizer, simulate
from carsam.quantizers.simulation import product
from carsam.reconstruct.losses import relative_loss
from carsam.reconstruct.optimize import PHASES, ReconstructionSettings, UnitData, optimise, relative_errors, unit_seed
from carsam.reconstruct.units import check_cover, decoder_units, encoder_units, run_unit
from carsam.run.walk import fit_weights


@pytest.fixture(scope="module")
def arguments(nano):
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(1, 256, 16, 16, generator=g)
    boxes = torch.tensor([[10.0, 20.0, 90.0, 120.0], [50.0, 60.0, 200.0, 220.0], [0.0, 0.0, 30.0, 40.0]])
    return embedding, boxes


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_site_lies_in_exactly_one_unit(nano, granularity):
    sites = find_sites(nano)
    check_cover(encoder_units(sites) + decoder_units(sites, granularity), sites)
    with pytest.raises(AssertionError):
        check_cover(encoder_units(sites) + decoder_units(sites, granularity)[1:], sites)


def test_unknown_granularity_names_the_choices(nano):
    with pytest.raises(ConfigError, match="pair"):
        decoder_units(find_sites(nano), "head")


def enter(model, embedding, boxes):
    """The inputs of the decoder's first stage, and its stages."""
    _, decoder = find_sites(model).family.parts(find_sites(model))
    image = CalibrationImage("", torch.empty(0), boxes)
    with torch.no_grad():
        return decoder.enter(model, {"hidden_states": embedding}, image), decoder.stages


@torch.no_grad()
def test_walking_block_by_block_is_the_transformer(nano, arguments):
    """The stages that the walk strings together, and the pair within a block, compute what the model computes."""
    sites = find_sites(nano)
    call = decoder_input(nano, *arguments)
    expected = nano.mask_decoder.transformer(attention_similarity=None, **call)
    inputs, (*blocks, last) = enter(nano, *arguments)
    for block in blocks:
        whole = block.run(nano, inputs)
        pair = next(unit for unit in decoder_units(sites, "pair") if unit.name == f"{block.name}.pair")
        captured = pair.capture(nano, lambda inputs=inputs, block=block: block.run(nano, inputs))
        for a, b in zip(run_unit(nano, pair, captured), whole.values()):
            torch.testing.assert_close(a, b)
        inputs = block.following(nano, inputs, whole)
    torch.testing.assert_close(whole["keys"], expected[1])
    final = last.run(nano, inputs)["queries"]
    tokens = nano.mask_decoder.transformer.layer_norm_final_attn(whole["queries"] + final)
    torch.testing.assert_close(tokens, expected[0])


@torch.no_grad()
def test_prompts_along_the_first_dimension_are_the_models_own(nano, arguments):
    embedding, boxes = arguments
    call = decoder_input(nano, embedding, boxes)
    expected = {}

    def keep(module, args, kwargs, output):
        expected["out"] = output

    hook = nano.mask_decoder.transformer.register_forward_hook(keep, with_kwargs=True)
    nano(image_embeddings=embedding, input_boxes=boxes[None], multimask_output=False)
    hook.remove()
    tokens, image = nano.mask_decoder.transformer(attention_similarity=None, **call)
    torch.testing.assert_close(tokens.transpose(0, 1), expected["out"][0])
    torch.testing.assert_close(image, expected["out"][1])


@torch.no_grad()
def test_encoder_stages_are_the_encoder(nano):
    pixels = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    sites = find_sites(nano)
    encoder, _ = sites.family.parts(sites)
    values = encoder.enter(nano, {}, CalibrationImage("", pixels, torch.empty(0, 4)))
    for unit, stage in zip(encoder_units(sites), encoder.stages):
        assert unit.scope == (stage.name,) and stage.following is None
        values = unit.run(nano, values)
    torch.testing.assert_close(values["hidden_states"], nano.vision_encoder(pixels).last_hidden_state)


def test_loss_is_relative_and_counts_channels():
    a, b = torch.randn(4, 7, 16), torch.randn(4, 7, 16)
    loss = relative_loss((a, a), (b, b), [2.0, 4.0])
    per_token = (a - b).square().sum(-1).mean()
    torch.testing.assert_close(loss, per_token / 2 + per_token / 4)
    image = torch.randn(2, 16, 3, 5)
    last = image.movedim(1, -1)
    channels_first = relative_loss((image,), (0 * image,), [1.0], 1)
    torch.testing.assert_close(channels_first, relative_loss((last,), (0 * last,), [1.0]))


def pair_problem(nano, arguments, drop):
    """The first block's pair at 4 bits with its data from two items."""
    sites = find_sites(nano)
    model = copy.deepcopy(nano)
    method = Method()
    prepare_model(model, sites, BitPlan.parse("w4a4"), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model, "mse")
    unit = next(unit for unit in decoder_units(sites, "pair") if len(unit.scope) > 1)
    space = CacheSpace()
    inputs, targets = space.cache(), space.cache()
    with torch.no_grad():
        for scale in (1.0, 1.3):
            call, (first, *_) = enter(nano, arguments[0] * scale, arguments[1])
            captured = unit.capture(nano, lambda call=call, first=first: first.run(nano, call))
            inputs.append(captured)
            targets.append(dict(zip("ab", run_unit(nano, unit, captured))))
    recorder = RangeRecorder(unit.modules(model))
    with recorder.recording(), simulate(weights=True):
        for i in range(2):
            run_unit(model, unit, inputs.get(i, torch.device("cpu")))
    recorder.apply("mse")
    data = UnitData(inputs, inputs, targets, variances(targets))
    return model, unit, data, ReconstructionSettings(drop=drop)


def test_reconstruction_lowers_the_error_of_both_outputs_and_freezes(nano, arguments):
    model, unit, data, settings = pair_problem(nano, arguments, drop=0.0)
    device = torch.device("cpu")
    before = relative_errors(model, unit, data, device)
    losses = optimise(model, unit, data, settings, steps=40, seed=0, device=device)
    kept = []
    after = relative_errors(model, unit, data, device, kept.append)
    assert all(b > a for b, a in zip(before, after))
    assert len(losses) == 40 and losses[-1][1] < losses[0][1]
    assert len(kept) == len(data.quantized) and kept[0][0].shape == data.batch_targets([0], device)[0].shape
    layers = [m for module in unit.modules(model) for m in module.modules() if hasattr(m, "codes")]
    assert layers and all(layer.codes is not None and layer.alpha is None for layer in layers)


def test_same_seed_same_integers_other_seed_others(nano, arguments):
    def codes(seed):
        model, unit, data, settings = pair_problem(nano, arguments, drop=0.5)
        torch.manual_seed(seed * 7 + 1)  # the caller's random state must not matter
        optimise(model, unit, data, settings, steps=5, seed=seed, device=torch.device("cpu"))
        return torch.cat([m.codes.flatten() for x in unit.modules(model) for m in x.modules() if hasattr(m, "codes")])

    first = codes(0)
    assert torch.equal(first, codes(0))
    assert not torch.equal(first, codes(1))
    assert unit_seed(0, "a") != unit_seed(0, "b") != unit_seed(1, "b")


def test_mixed_precision_learns_next_to_the_same(nano, arguments):
    """Products alone are rounded to bfloat16, and in the loop alone."""
    device, errors, codes = torch.device("cpu"), [], []
    for mixed in (False, True):
        model, unit, data, _ = pair_problem(nano, arguments, drop=0.0)
        settings = ReconstructionSettings(drop=0.0, mixed_precision=mixed)
        optimise(model, unit, data, settings, steps=40, seed=0, device=device)
        parts = [m for module in unit.modules(model) for m in module.modules()]
        codes.append(torch.cat([m.codes.flatten() for m in parts if isinstance(m, QuantizedLayer)]))
        errors.append(relative_errors(model, unit, data, device))
        assert all(m.weight.dtype == torch.float32 for m in parts if isinstance(m, QuantizedLayer))
    assert not torch.equal(*codes) and (codes[0] == codes[1]).float().mean() > 0.95
    # What is left is an error of 4 bits, a hundred times that of a product.
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_products_are_rounded_where_the_simulation_asks():
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = product(torch.matmul, a, b)
    assert torch.equal(exact, a @ b)
    with simulate(mixed=True):
        rounded = product(torch.matmul, a, b)
        bias = product(torch.nn.functional.linear, a, b, None)
    assert rounded.dtype == bias.dtype == torch.float32 and not torch.equal(rounded, exact)
    # 2^-9 of every operand, and of the sum.
    assert (rounded - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("phases", PHASES)
def test_weights_first_decides_rounding_before_steps_of_activations(phases, nano, arguments):
    """BRECQ's two phases: no step of an activation has a part in the rounding. Together they have."""
    device, codes, steps = torch.device("cpu"), [], []
    for scale_rate in (1e-4, 0.1):
        model, unit, data, _ = pair_problem(nano, arguments, drop=0.0)
        settings = ReconstructionSettings(drop=0.0, phases=phases, rounding_rate=0.1, scale_rate=scale_rate)
        optimise(model, unit, data, settings, steps=4, seed=0, device=device)
        parts = [m for module in unit.modules(model) for m in module.modules()]
        codes.append(torch.cat([m.codes.flatten() for m in parts if isinstance(m, QuantizedLayer)]))
        steps.append(torch.stack([m.scale for m in parts if isinstance(m, SiteQuantizer)]))
    assert not torch.equal(*steps)
    assert torch.equal(*codes) == (phases == "weights-first")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="unknown phases 'both'; choose from joint, weights-first"):
        ReconstructionSettings(phases="both")

    for wrong in ({"steps": -1}, {"drop": 1.0}, {"images_per_step": 0}):
        with pytest.raises(ConfigError):
            ReconstructionSettings(**wrong)
