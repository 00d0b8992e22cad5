"""AHCQ-SAM: what it has beside AHCPTQ, and what it shares with it."""

import json

import pytest

import carsam
from carsam.config import QuantizeConfig
from carsam.errors import ConfigError
from carsam.methods.base import create
from carsam.models.family import find_sites
from carsam.run.context import Hooks

QUICK = {
    "reconstruction": {"steps": 2, "decoder_steps": 2},
    "weight_observer": "min-max",
    "activation_observer": "min-max",
}


def test_units_are_encoder_blocks_and_whole_decoder_blocks(nano):
    sites = find_sites(nano)
    ours, ahcptq = (create(name).units(sites) for name in ("ahcq-sam", "ahcptq"))
    encoder = [unit.name for unit in ahcptq if not sites.in_decoder(unit.stage)]
    assert [unit.name for unit in ours] == [*encoder, *sites.decoder_stages]
    modules = create("ahcq-sam", {"granularity": "module"}).units(sites)
    assert [unit.name for unit in modules] == [unit.name for unit in ahcptq]


def test_without_its_additions_a_unit_is_ahcptqs(nano):
    sites = find_sites(nano)
    plain = {"softmax": "log2", "acnr": {"enabled": False}, "granularity": "module"}
    ours, ahcptq = create("ahcq-sam", plain), create("ahcptq")
    for unit in ahcptq.units(sites):
        assert ours.unit_settings(unit, sites) == ahcptq.unit_settings(unit, sites)
        assert create("ahcq-sam").unit_settings(unit, sites) != ahcptq.unit_settings(unit, sites)


def test_notes_say_what_is_not_uniform():
    notes = create("ahcq-sam").notes
    assert all(word in notes for word in ("log1p", "log-uniform", "per group"))
    assert "one code too many" in create("ahcq-sam", {"extra_code": True}).notes
    with pytest.raises(ConfigError, match="extra_code belongs to softmax=log1p or log2, not to uniform"):
        create("ahcq-sam", {"extra_code": True, "softmax": "uniform"})


def test_a_run_reports_the_layers_and_the_folder_names_the_grid(nano, small_set, tmp_path):
    out = tmp_path / "packed"
    settings = {**QUICK, "extra_code": True}
    result = carsam.quantize(
        nano, small_set, QuantizeConfig(method="ahcq-sam", settings=settings), out=out, write_results=True
    )
    reports = result.report.compensations
    assert reports and all(report.condition[0] >= 100 > report.condition[1] for report in reports)
    noted = json.loads((out / "results.json").read_text())["quantization"]
    assert [entry["layer"] for entry in noted["compensations"]] == [report.layer for report in reports]
    assert {entry["transform"] for entry in noted["transforms"]} == {"BIG"}
    layout = json.loads((out / "config.json").read_text())["quantization_config"]["layout"]
    probs = {json.dumps(attention["probs"], sort_keys=True) for attention in layout["attentions"].values()}
    assert probs == {'{"bits": 4, "extra_code": 1, "grid": "log1p"}'}
    carsam.load(out)


def test_steps_of_the_softmax_grid_are_not_learned(nano, small_set):
    learned = {}

    def look(model, unit):
        for name, module in model.named_modules():
            if unit.holds(name) and name.endswith("matmul.probs"):
                learned[name] = (module.learned, float(module.scale))

    config = QuantizeConfig(method="ahcq-sam", settings={**QUICK, "acnr": {"enabled": False}})
    result = carsam.quantize(nano, small_set, config, hooks=Hooks(learned=look))
    assert learned and not result.report.compensations
    for name, (parameter, scale) in learned.items():
        assert parameter is None
        assert float(result.model.get_submodule(name).scale) == scale
