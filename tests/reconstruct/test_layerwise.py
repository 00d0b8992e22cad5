"""AdaRound: layer by layer, and on the grid at the end."""

import copy

import torch

from carsam.calibrate.cache import CacheSpace, cached, variances
from carsam.calibrate.observers import RangeRecorder
from carsam.config import QuantizeConfig
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.models.prepare import prepare_model
from carsam.prompts.calibration import CalibrationImage
from carsam.quantizers import QuantizedLayer, simulate
from carsam.quantizers.affine import encode
from carsam.reconstruct.layerwise import execution_order, optimise_layers
from carsam.reconstruct.optimize import UnitData, relative_errors
from carsam.reconstruct.units import encoder_units, run_unit
from carsam.run.context import RunContext
from carsam.run.walk import Walk, fit_weights


def prepared(nano, method):
    model = copy.deepcopy(nano)
    sites = find_sites(model)
    prepare_model(model, sites, QuantizeConfig().bit_plan(), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model, "min-max")
    return model, sites


def first_inputs(model, image):
    """Inputs of the first stage for an image."""
    sites = find_sites(model)
    encoder, _ = sites.family.parts(sites)
    return encoder.enter(model, {}, image)


def test_layers_come_in_the_order_of_execution(nano, pixel_values):
    model, sites = prepared(nano, create("rtn"))
    unit = encoder_units(sites)[0]
    inputs = first_inputs(model, CalibrationImage("", pixel_values, torch.empty(0, 4)))
    order = execution_order(model, unit, lambda: run_unit(model, unit, inputs))
    assert [name.removeprefix(unit.name + ".") for name in order] == ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks must not stay"


def test_adaround_ends_on_the_grid_and_on_a_neighbouring_code(nano, small_set):
    settings = {"reconstruction": {"steps": 60, "decoder_steps": 0}, "weight_observer": "min-max"}
    method = create("adaround", settings)
    model, sites = prepared(nano, method)
    floats = {site.name: model.get_submodule(site.name).weight.clone() for site in sites.layers}
    report = Walk(model, copy.deepcopy(nano), sites, method, small_set, "", RunContext()).run()

    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    moved = 0
    for name, layer in layers.items():
        assert layer.codes is not None and layer.alpha is None
        scale, zero = layer._per_channel(layer.weight_scale), layer._per_channel(layer.weight_zero_point)
        # On the grid, and on one of the two codes around the float weight (or at the grid's end).
        assert torch.equal(encode(layer.weight, scale, zero, 4).to(torch.uint8), layer.codes)
        position = (floats[name] / scale + zero).clamp(0, 15)
        assert bool(((layer.codes - position).abs() < 1.001).all())
        nearest = encode(floats[name], scale, zero, 4)
        moved += int((nearest != layer.codes).sum())
    assert moved > 0, "learning changed no rounding"
    first = report.units[0]
    assert first.steps == 4 * 60 and [step for step, _ in first.losses] == sorted(step for step, _ in first.losses)


def test_learned_layers_lower_the_error_of_their_block(nano, small_set):
    method = create("adaround")
    (model, sites), (rtn, _) = prepared(nano, method), prepared(nano, method)
    unit, space, device = encoder_units(sites)[0], CacheSpace(), torch.device("cpu")
    stages = [first_inputs(nano, image) for image in small_set.images]
    inputs = cached(space, stages)
    targets = cached(space, ({"output_0": run_unit(nano, unit, stage)[0]} for stage in stages))
    data = UnitData(inputs, inputs, targets, variances(targets))
    for of in (model, rtn):
        recorder = RangeRecorder(unit.modules(of))
        with recorder.recording(), simulate(weights=True):
            for stage in stages:
                run_unit(of, unit, stage)
        recorder.apply("mse")
    settings = method.reconstruction_for(unit)
    losses = optimise_layers(model, nano, unit, data, settings, steps=200, seed=0, device=device, space=space)
    assert len(losses) == 4
    assert relative_errors(model, unit, data, device)[0] < 0.9 * relative_errors(rtn, unit, data, device)[0]
