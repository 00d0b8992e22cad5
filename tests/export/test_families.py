"""A packed model of every family, halves exported, beside the simulation."""

import numpy as np
import pytest
import torch
from small_models import small_model

from carsam.export.graph import model_of
from carsam.export.trace import trace
from carsam.models.family import families, family_of, find_sites
from carsam.models.forward import encode_image, predict_logits
from carsam.models.sites import OPERANDS
from carsam.pack.bits import pack_codes
from carsam.pack.layers import PackedLayer
from carsam.pack.layout import build_packed
from carsam.quantizers import ActivationQuantizer
from carsam.quantizers.affine import encode
from carsam.quantizers.rounding import weight_grid

# At 8 bits a code that falls to the other side of a tie moves little; what is compared is the graph.
BITS = 8


def packed_model(name):
    """The small model with rounded weights and uniform grids over what its layers read on noise."""
    model = small_model(name).eval().requires_grad_(False)
    sites = find_sites(model)
    weights = {site.name: model.get_submodule(site.name).weight.clone() for site in sites.layers}
    biases = {site.name: model.get_submodule(site.name).bias for site in sites.layers}
    uniform = {"grid": "uniform", "bits": BITS}
    layout = {
        "layers": {site.name: {"weight": BITS, "input": uniform} for site in sites.layers},
        "attentions": {site.name: dict.fromkeys(OPERANDS, uniform) for site in sites.attentions},
    }
    build_packed(model, layout)
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        scale, zero = weight_grid(weight, BITS, observer="min-max")
        channel = (-1, *[1] * (weight.dim() - 1))
        codes = encode(weight, scale.view(channel), zero.view(channel), BITS)
        layer.weight.copy_(pack_codes(codes.to(torch.uint8), BITS))
        layer.weight_scale.copy_(scale)
        layer.weight_zero_point.copy_(zero)
        if biases[path] is not None:
            layer.bias.copy_(biases[path])
    for path, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            module.set_range(0.0, 1.0) if path.endswith("probs.quantizer") else module.set_range(-4.0, 4.0)
    return model


@pytest.mark.parametrize("name", sorted(families()))
@torch.no_grad()
def test_the_graph_computes_what_the_packed_model_computes(name, run_model):
    model = packed_model(name)
    family = family_of(model)
    seen = []
    for module in model.modules():
        if isinstance(module, PackedLayer):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    generator = torch.Generator().manual_seed(0)
    side, low_res = family.image_size(model), family.low_res_size(model)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    points = torch.rand(2, 3, 2, generator=generator) * side
    labels = torch.tensor([[1, 0, 1], [1, 1, 0]])
    mask = torch.randn(2, 1, low_res, low_res, generator=generator)
    embeddings = encode_image(model, pixels)
    logits, iou = predict_logits(model, embeddings, points=points, labels=labels, masks=mask, multimask_output=True)
    assert set(seen) == {torch.float32}, "a packed layer reads floats"

    core = trace(model, family)
    assert all(site.integer_macs == site.macs or "grouped" in site.reason for site in core.encoder.lowered)
    between = run_model(model_of(core.encoder.graph, {}), {"pixel_values": pixels.numpy()})
    # The predictors append a point that is none.
    none = torch.zeros(2, 1, 2), -torch.ones(2, 1)
    inputs = {
        **dict(zip(core.names, between)),
        "points": torch.cat([points, none[0]], 1).numpy(),
        "labels": torch.cat([labels.float(), none[1]], 1).numpy(),
        "mask": mask.numpy(),
        "has_mask": np.ones(1, np.float32),
    }
    found, scores = run_model(model_of(core.decoder.graph, {}), inputs)
    # Ties that fall to the other side by the last bit of a sum move logits of random weights by 1 or 2 %; a term that
    # is missing or in the wrong place moves them by tens.
    assert np.abs(found[:, 1:] - logits.numpy()).mean() < 0.05 * logits.abs().mean()
    np.testing.assert_allclose(scores[:, 1:], iou.numpy(), atol=0.02)
