"""Names for people: found by ``model_type``, in the order in which a model runs, without torch."""

import subprocess
import sys

import pytest
from tinyvit_state import SMALL

from carsam.models.family import families, find_sites
from carsam.models.names import REST, Names, names_of_type
from carsam.models.tinyvit.random import random_tinyvit
from carsam.report.order import layout_sites

IMAGE_TO_TOKEN = "mask_decoder.transformer.layers.0.cross_attn_image_to_token"


@pytest.fixture(scope="module")
def models(nano):
    return {"sam": nano, "tinyvit": random_tinyvit("mobilesam", 128, **SMALL)}


def test_every_family_has_a_table_of_its_own():
    tables = {family.name: family.names for family in families().values()}
    assert {"sam", "tinyvit"} <= set(tables)
    for name, table in tables.items():
        assert table.family == name
        assert table.title and table.model_types and table.decoder and table.regions
        for model_type in table.model_types:
            assert type(names_of_type(model_type)) is type(table)


@pytest.mark.parametrize("name", ["sam", "tinyvit"])
def test_the_order_told_from_names_is_that_of_the_model(name, models):
    sites = find_sites(models[name])
    layers, attentions = ([site.name for site in kind] for kind in (sites.layers, sites.attentions))
    grid = {"grid": "uniform", "bits": 4}
    layout = {
        "layers": {layer: {"weight": 4, "input": grid} for layer in sorted(layers)},
        "attentions": {
            attention: dict.fromkeys(("value", "query", "probs", "key"), grid) for attention in sorted(attentions)
        },
    }
    found = layout_sites(layout, sites.family.names)
    assert [site.name for site in found if site.kind == "weight"] == layers
    assert {site.name for site in found if site.kind == "activation"} == set(sites.activation_names)
    assert (
        list(dict.fromkeys(site.name.rpartition(".")[0] for site in found if site.layer == "attention")) == attentions
    )
    # One group a stage of the encoder, one an attention or MLP of the decoder; no row of the map comes twice.
    groups = [site.group for site in found]
    rows = [group for group, before in zip(groups, ["", *groups]) if group != before]
    assert len(rows) == len(set(rows))
    assert rows[: len(sites.encoder_stages)] == list(sites.encoder_stages)


@pytest.mark.parametrize("name", ["sam", "tinyvit"])
def test_every_layer_lies_in_a_region_and_the_decoder_is_where_it_is(name, models):
    sites = find_sites(models[name])
    names = sites.family.names
    assert names.decoder == sites.decoder
    for site in sites.layers:
        assert names.region(site.name) != REST
        assert names.in_decoder(site.name) == sites.in_decoder(site.name)


@pytest.mark.parametrize(
    ("model_type", "path", "short", "compact", "region", "row"),
    [
        (
            *("sam", f"{IMAGE_TO_TOKEN}.out_proj.input", "decoder.layers.0.cross_attn_image_to_token.out_proj.input"),
            *("decoder 0 img→tok out_proj input", "decoder transformer", "0 img→tok out_proj input"),
        ),
        (*("sam", "vision_encoder.layers.31", "encoder.layers.31", "encoder 31", "encoder blocks", "block 31"),),
        (
            *("tinyvit_sam", "vision_encoder.layers.7.local_conv", "encoder.layers.7.local_conv"),
            *("encoder 7 local_conv", "encoder stages", "7 local_conv"),
        ),
        (*("tinyvit_sam", "vision_encoder.layers.0", "encoder.layers.0", "encoder 0", "encoder stages", "layer 0"),),
        ("tinyvit_sam", "vision_encoder.neck", "encoder.neck", "encoder neck", "encoder neck", "neck"),
        ("sam", "memory.x", "memory.x", "memory x", REST, "memory x"),
        ("of another planet", "a.layers.3.b", "a.layers.3.b", "a 3 b", REST, "a 3 b"),
        (None, "vision_encoder.neck", "vision_encoder.neck", "vision_encoder neck", REST, "vision_encoder neck"),
        ([], "decoder", "decoder", "decoder", REST, "decoder"),
    ],
)
def test_names(model_type, path, short, compact, region, row):
    names = names_of_type(model_type)
    assert (names.short(path), names.compact(path), names.region(path), names.row_label(path)) == (
        *(short, compact, region, row),
    )


def test_short_names_within_a_sentence():
    assert names_of_type("sam").short("mlp of vision_encoder.layers.1 (kept)") == "mlp of encoder.layers.1 (kept)"


def test_where_the_encoder_is_set():
    assert names_of_type("tinyvit_sam").encoder_settings({"vision_config": {"depths": [1]}}) == {"depths": [1]}
    assert names_of_type("sam").encoder_settings({"vision_config": 3}) == {}
    assert Names().encoder_settings({"vision_config": {"depths": [1]}}) == {}


def test_they_need_no_torch():
    code = """
import sys
from carsam.models.names import names_of_type
assert [names_of_type(kind).title for kind in ("sam", "tinyvit_sam")] == ["SAM", "TinyViT SAM"]
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
