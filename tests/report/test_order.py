"""Sites in execution order, told from their names alone."""

import random

from packed_example import layers_and_attentions

from carsam.models.family import find_sites
from carsam.report.order import compact, execution_key, layout_sites, region, row_label, short


def layout_of(layers, attentions):
    grid = {"grid": "uniform", "bits": 4}
    return {
        "layers": {name: {"weight": 4, "input": grid} for name in sorted(layers)},
        "attentions": {name: dict.fromkeys(("value", "query", "probs", "key"), grid) for name in sorted(attentions)},
    }


def test_the_order_is_that_of_the_model(nano):
    sites = find_sites(nano)
    names = [site.name for site in sites.layers]
    ordered = layout_sites(layout_of(names, [site.name for site in sites.attentions]))
    assert [site.name for site in ordered if site.kind == "weight"] == names
    assert {site.name for site in ordered if site.kind == "activation"} == set(sites.activation_names)


def test_a_block_in_detail():
    sites = layout_sites(layout_of(*layers_and_attentions(12)))
    block = [(site.layer, site.part) for site in sites if site.group == "vision_encoder.layers.10"]
    matmul = [("attention", part) for part in "QKVP"]
    others = [(layer, part) for layer in ("proj", "lin1", "lin2") for part in ("in", "w")]
    assert block == [("qkv", "in"), ("qkv", "w"), *matmul, *others]
    groups = list(dict.fromkeys(site.group for site in sites))
    assert [row_label(group) for group in groups[8:]] == [
        *("block 8", "block 9", "block 10", "block 11", "neck"),
        *("0 self", "0 tok→img", "0 mlp", "0 img→tok", "1 self", "1 tok→img", "1 mlp", "1 img→tok", "final"),
    ]


def test_unknown_names_come_last_and_in_order_of_their_numbers():
    names = ["vision_encoder.layers.2.x", "vision_encoder.layers.10.x", "vision_encoder.neck.a", "zoo.b", "zoo.c.9"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=execution_key) == names


def test_names():
    name = "mask_decoder.transformer.layers.0.cross_attn_image_to_token.out_proj.input"
    assert short(name) == "decoder.layers.0.cross_attn_image_to_token.out_proj.input"
    assert compact(name) == "decoder 0 img→tok out_proj input"
    assert compact("vision_encoder.layers.31.attn.qkv") == "encoder 31 attn qkv"
    assert [region(n) for n in (name, "vision_encoder.layers.3", "vision_encoder.neck", "memory.x")] == [
        *("decoder transformer", "encoder blocks", "encoder neck", "other quantized layers"),
    ]
