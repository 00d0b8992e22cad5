"""Quantization of the decoder alone: what stays in floating point, what is said of it, and that nothing is shared."""

import json
from dataclasses import replace

import pytest
import torch
from places import EVALUATION_COCO, EVALUATION_IMAGES

import carsam
from carsam.bits.plan import FLOATING_ENCODER
from carsam.commands.recipe import quantize_config
from carsam.config import QuantizeConfig
from carsam.diagnose.run import diagnose
from carsam.errors import CarsamError, ConfigError
from carsam.models.family import find_sites
from carsam.output.finished import differing_settings, read_recipe
from carsam.pack.layers import PackedLayer
from carsam.report.page import render
from carsam.report.source import read_source
from carsam.run.comparison import Comparison, compare
from carsam.run.context import Hooks


@pytest.fixture(scope="session")
def decoder_config(quick_config) -> QuantizeConfig:
    return replace(quick_config, decoder_only=True)


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory, nano_folder, decoder_config):
    """A packed model of which only the decoder is quantized; read-only."""
    folder = tmp_path_factory.mktemp("decoder-only") / "nano"
    data = decoder_config.calibration.images
    carsam.quantize(nano_folder, data, decoder_config, out=folder, write_results=True)
    return folder


def test_the_encoder_is_the_float_one(decoder_folder, nano):
    packed = carsam.load(decoder_folder)
    float_state, state = nano.vision_encoder.state_dict(), packed.vision_encoder.state_dict()
    assert set(float_state) <= set(state)
    for name, value in float_state.items():
        assert torch.equal(state[name], value.to(torch.float16).float()), name
    sites = find_sites(packed)
    inside = [site.name for site in sites.layers if sites.in_decoder(site.name)]
    packed_layers = [name for name, module in packed.named_modules() if isinstance(module, PackedLayer)]
    assert sorted(packed_layers) == sorted(inside)


def test_the_layout_says_16_bits(decoder_folder):
    layout = json.loads((decoder_folder / "config.json").read_text())["quantization_config"]["layout"]
    for name, spec in layout["layers"].items():
        bits = 4 if name.startswith("mask_decoder.") else 16
        assert (spec["weight"], spec["input"]["bits"]) == (bits, bits), name
    for name, operands in layout["attentions"].items():
        expected = 4 if name.startswith("mask_decoder.") else 16
        assert {spec["bits"] for spec in operands.values()} == {expected}, name


def test_file_card_and_report_say_so(decoder_folder, packed_folder):
    assert read_recipe(decoder_folder)["decoder_only"] is True
    assert f"w4a4 (weights, activations), {FLOATING_ENCODER}" in (decoder_folder / "README.md").read_text()
    assert f"<strong>W4A4</strong>, {FLOATING_ENCODER}: <strong>" in render(read_source(decoder_folder, None)).html
    assert FLOATING_ENCODER not in (packed_folder / "README.md").read_text()
    assert FLOATING_ENCODER not in render(read_source(packed_folder, None)).html


def test_units_and_compensations_are_the_decoders(decoder_folder):
    spent = json.loads((decoder_folder / "results.json").read_text())["quantization"]
    assert spent["units"] and all(unit["unit"].startswith("mask_decoder.") for unit in spent["units"])
    assert any("+" in unit["unit"] or "pair" in unit["unit"] for unit in spent["units"]), "JCAR"
    assert len(spent["compensations"]) == 7


def test_it_evaluates_near_the_float_model(decoder_folder, packed_folder, nano):
    def iou(model):
        return carsam.evaluate_coco(model, EVALUATION_COCO, EVALUATION_IMAGES, limit=6).mean_iou

    decoder_only, floating = iou(carsam.load(decoder_folder)), iou(nano)
    assert iou(carsam.load(packed_folder)) < decoder_only < floating + 1


def test_it_is_diagnosed(decoder_folder, nano_folder, tmp_path):
    found, _ = diagnose(
        nano_folder, decoder_folder, EVALUATION_IMAGES, coco=EVALUATION_COCO, limit=1, out=tmp_path / "d"
    )
    assert all(site.site.startswith("mask_decoder.") for site in found.sensitivity)


@pytest.mark.parametrize("method", ["rtn", "ptq4sam-s", "ahcptq", "ahcq-sam"])
def test_every_kind_of_method_leaves_the_encoder(method, nano, small_set, decoder_config):
    settings = {"reconstruction": decoder_config.settings["reconstruction"]} if method in ("ahcptq", "ahcq-sam") else {}
    config = replace(decoder_config, method=method, settings=settings)
    packed = carsam.quantize(nano, small_set, config).model
    for name, value in nano.vision_encoder.state_dict().items():
        assert torch.equal(packed.vision_encoder.state_dict()[name], value), name
    assert isinstance(packed.get_submodule("mask_decoder.transformer.layers.0.self_attn.q_proj"), PackedLayer)


def test_an_override_of_the_encoder_alone_is_refused(nano, small_set, decoder_config):
    for pattern in ("vision_encoder.*", "*.neck.*"):
        with pytest.raises(ConfigError, match="matches only sites of the image encoder, which stays in floating point"):
            carsam.quantize(nano, small_set, replace(decoder_config, overrides={pattern: "w8a8"}))
    # One that matches sites of both counts for the decoder's.
    sites = find_sites(nano)
    plan = replace(decoder_config, overrides={"*.probs": "w4a8"}).bit_plan(sites)
    plan.check(sites)
    assert plan.activation_bits("vision_encoder.layers.0.attn.probs") == 16
    assert plan.activation_bits("mask_decoder.transformer.layers.0.self_attn.probs") == 8


def test_an_interrupted_run_goes_on_and_no_other_takes_its_units(decoder_folder, decoder_config, nano_folder, tmp_path):
    data, out = decoder_config.calibration.images, tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(model, unit):
        if unit.stage.endswith("layers.1"):
            raise Stop

    with pytest.raises(Stop):
        carsam.quantize(nano_folder, data, decoder_config, out=out, hooks=Hooks(learned=stop))
    with pytest.raises(CarsamError, match="decoder only"):
        carsam.quantize(nano_folder, data, replace(decoder_config, decoder_only=False), out=out, resume=True)
    found: list[str] = []
    carsam.quantize(nano_folder, data, decoder_config, out=out, resume=True, hooks=Hooks(unit_found=found.append))
    assert found and all(name.startswith("mask_decoder.") for name in found)
    assert (out / "model.safetensors").read_bytes() == (decoder_folder / "model.safetensors").read_bytes()
    config = replace(decoder_config, decoder_only=False)
    assert differing_settings(out, config, carsam.methods.base.create(config.method, config.settings), "") == [
        "decoder only"
    ]


def test_rows_of_a_comparison(nano_folder, quick_config, tmp_path):
    calibration = {**quick_config.to_dict()["calibration"]}
    rtn = {"method": "rtn", "settings": {"weight_observer": "min-max", "activation_observer": "min-max"}}
    rows = [{"name": "all", **rtn}, {"name": "decoder", **rtn, "decoder_only": True}]
    values = {"model": str(nano_folder), "calibration": calibration, "rows": rows}
    values |= {"coco": str(EVALUATION_COCO), "images": str(EVALUATION_IMAGES)}
    result = compare(Comparison.from_dict(values), tmp_path)
    whole, decoder = result.measurements
    assert decoder.notes == FLOATING_ENCODER and whole.notes == ""
    assert decoder.scores["mean_iou"] > whole.scores["mean_iou"] and decoder.bytes > whole.bytes
    assert FLOATING_ENCODER in result.to_markdown()


def test_the_flag_and_the_recipe(decoder_folder):
    assert quantize_config(decoder_only=True).decoder_only and not quantize_config().decoder_only
    assert quantize_config(recipe=decoder_folder / "recipe.yaml").decoder_only
