"""AdaRound: layer by layer, and on the grid at the end."""

import copy

import torch

from carsam.calibrate.cache import CacheSpace, cached, variances
from carsam.calibrate.observers import RangeRecorder
from carsam.config import QuantizeConfig
from carsam.methods.base import create
from carsam.models.prepare import prepare_model
from carsam.models.sites import find_sites
from carsam.quantizers import QuantizedLayer, simulate
from carsam.quantizers.affine import encode
from carsam.reconstruct.layerwise import execution_order, optimise_layers
from carsam.reconstruct.optimize import UnitData, relative_errors
from carsam.reconstruct.units import encoder_units, first_stage_input, run_unit
from carsam.run.store import UnitStore
from carsam.run.walk import Walk, fit_weights


def prepared(nano, method):
    model = copy.deepcopy(nano)
    sites = find_sites(model)
    prepare_model(model, sites, QuantizeConfig().bit_plan(), method.quantizer_for, method.softmax_for)
    model.requires_grad_(False)
    fit_weights(model, "min-max")
    return model, sites


def test_layers_come_in_the_order_of_execution(nano, pixel_values):
    model, sites = prepared(nano, create("rtn"))
    unit = encoder_units(sites)[0]
    hidden = first_stage_input(model, pixel_values)
    order = execution_order(model, unit, lambda: run_unit(model, unit, {"hidden_states": hidden}))
    assert [name.removeprefix(unit.name + ".") for name in order] == ["attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"]
    assert not any(module._forward_pre_hooks for module in model.modules()), "hooks must not stay"


def test_adaround_ends_on_the_grid_and_on_a_neighbouring_code(nano, small_set):
    settings = {"reconstruction": {"steps": 60, "decoder_steps": 0}, "weight_observer": "min-max"}
    method = create("adaround", settings)
    model, sites = prepared(nano, method)
    floats = {site.name: model.get_submodule(site.name).weight.clone() for site in sites.linears}
    walk = Walk(
        model, copy.deepcopy(nano), sites, method, small_set,
        seed=0, device=torch.device("cpu"), base_key="", store=UnitStore(None), space=CacheSpace(),
    )  # fmt: skip
    report = walk.run()

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
    stages = [{"hidden_states": first_stage_input(nano, image.pixel_values)} for image in small_set.images]
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
