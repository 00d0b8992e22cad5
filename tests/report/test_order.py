"""Sites of a packed folder in execution order, told from their names alone."""

import random

from packed_example import layers_and_attentions

from carsam.models.names import names_of_type
from carsam.report.order import layout_sites

SAM = names_of_type("sam")


def layout_of(layers, attentions):
    grid = {"grid": "uniform", "bits": 4}
    return {
        "layers": {name: {"weight": 4, "input": grid} for name in sorted(layers)},
        "attentions": {name: dict.fromkeys(("value", "query", "probs", "key"), grid) for name in sorted(attentions)},
    }


def test_a_block_in_detail():
    sites = layout_sites(layout_of(*layers_and_attentions(12)), SAM)
    block = [(site.layer, site.part) for site in sites if site.group == "vision_encoder.layers.10"]
    matmul = [("attention", part) for part in "QKVP"]
    others = [(layer, part) for layer in ("proj", "lin1", "lin2") for part in ("in", "w")]
    assert block == [("qkv", "in"), ("qkv", "w"), *matmul, *others]
    groups = list(dict.fromkeys(site.group for site in sites))
    assert [SAM.row_label(group) for group in groups[8:]] == [
        *("block 8", "block 9", "block 10", "block 11", "neck"),
        *("0 self", "0 tok→img", "0 mlp", "0 img→tok", "1 self", "1 tok→img", "1 mlp", "1 img→tok", "final"),
    ]


def test_unknown_names_come_last_and_in_order_of_their_numbers():
    names = ["vision_encoder.layers.2.x", "vision_encoder.layers.10.x", "vision_encoder.neck.a", "zoo.b", "zoo.c.9"]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=SAM.execution_key) == names
