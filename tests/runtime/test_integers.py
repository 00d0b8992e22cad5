"""Integer layers compute what simulated ones do; here by the references of the kernels."""

import copy

import pytest
import torch
from torch import nn

from carsam.bits.plan import BitPlan
from carsam.calibrate.observers import RangeRecorder
from carsam.errors import ConfigError
from carsam.models.family import family_of, find_sites
from carsam.models.prepare import prepare_model
from carsam.models.sam.random import random_sam
from carsam.pack.layers import PackedLayer
from carsam.quantizers import ActivationQuantizer, QuantizedLayer, UniformSoftmax, simulate
from carsam.quantizers.grouped import GroupedQuantizer
from carsam.quantizers.shifted import ShiftedQuantizer
from carsam.runtime.attention import QuantizedRelativeAttention
from carsam.runtime.convert import integer_linears
from carsam.runtime.linear import IntegerLinear, why_not
from carsam.runtime.mlp import IntegerMlp


def packed_layer(weight_bits, input_bits, inputs=24, outputs=10, seed=0, bias=True):
    """A Linear on integers; its input's range is not symmetric, its channels' neither."""
    torch.manual_seed(seed)
    source = nn.Linear(inputs, outputs, bias=bias)
    source.weight.data += torch.linspace(-0.2, 0.3, outputs)[:, None]
    quantizer = ActivationQuantizer(input_bits)
    quantizer.set_range(-0.9, 2.1)
    layer = QuantizedLayer(source.requires_grad_(False), weight_bits, quantizer)
    layer.fit_weight("min-max")
    layer.freeze()
    quantizer.always = True
    return PackedLayer.from_quantized(layer)


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(4, 4), (6, 6), (8, 8), (4, 8), (8, 4), (7, 7), (3, 2)])
def test_a_layer_is_exact(weight_bits, input_bits):
    layer = packed_layer(weight_bits, input_bits)
    integer = IntegerLinear.of(layer)
    assert integer.packed == (weight_bits <= 4) and integer.needs_sums == (weight_bits == 8)
    x = torch.randn(5, 7, 24) * 2
    # The same sum of the same products of integers, in float64 and then rounded once as the integers are.
    codes = layer.input_quantizer.encode(x).double() - layer.input_quantizer.zero_point.double()
    weights = layer.integer_weight().double() - layer.weight_zero_point.double()[:, None]
    total = codes @ weights.t()
    scale = layer.weight_scale * layer.input_quantizer.scale
    assert torch.equal(integer(x), total.float() * scale + layer.bias)
    # The simulation adds rounded products: 24 of them, each off by no more than float32's half step.
    torch.testing.assert_close(integer(x), layer(x), rtol=1e-5, atol=1e-5)


def test_packed_and_unpacked_weights_are_the_same():
    layer = packed_layer(4, 4, bias=False)
    packed, plain = IntegerLinear.of(layer), IntegerLinear.of(layer, packed=False)
    assert packed.weight.numel() * 2 == plain.weight.numel() and packed.weight.dtype == torch.uint8
    assert torch.equal(packed.integer_weight(), plain.weight)


def test_a_change_of_type_leaves_the_grids():
    layer = IntegerLinear.of(packed_layer(4, 4)).to(torch.bfloat16)
    assert {layer.scale.dtype, layer.grid.dtype, layer.bias.dtype} == {torch.float32}
    assert layer(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_an_mlp_is_its_layers(bits):
    first, second = packed_layer(bits, bits, 24, 20, 1), packed_layer(bits, bits, 20, 6, 2)
    x = torch.randn(2, 3, 24)
    mlp = IntegerMlp(IntegerLinear.of(first), IntegerLinear.of(second))
    expected = IntegerLinear.of(second)(torch.nn.functional.gelu(IntegerLinear.of(first)(x)))
    assert torch.equal(mlp(x), expected)


def frozen(bits, **changes):
    """A quantized random SAM, and an image for it."""
    model = random_sam("nano", 128, blocks=2)
    sites = find_sites(model)
    prepare_model(
        model, sites, BitPlan.parse(bits), lambda site, b, role: ActivationQuantizer(b), lambda s, b: UniformSoftmax(b)
    )
    for name, quantizer in changes.items():
        model.get_submodule(name.replace("__", ".")).input_quantizer = quantizer
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    recorder = RangeRecorder([model])
    with recorder.recording():
        model(pixel_values=image, input_boxes=torch.tensor([[[10.0, 20.0, 90.0, 100.0]]]))
    recorder.apply("min-max")
    for site in sites.layers:
        layer = model.get_submodule(site.name)
        layer.fit_weight("min-max")
        layer.freeze()
    return model.eval(), image


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_a_model_on_integers_computes_what_the_simulated_one_does(bits):
    model, image = frozen(bits)
    with torch.no_grad(), simulate(weights=True, activations=True):
        expected = family_of(model).encode_image(model, image)
        done = integer_linears(model)
        got = family_of(model).encode_image(model, image)
    assert done.modules == {"QuantizedRelativeAttention": 2, "IntegerMlp": 2}
    assert done.simulated == {"it is a convolution": 2}
    # Sums in another order move a few values over the edge of their step, and later layers make more of it: the
    # simulated model moves as far when its input does by a millionth.
    assert (got - expected).norm() / expected.norm() < 0.05


def test_the_parts_of_a_model_compute_what_the_simulated_ones_do():
    model, image = frozen("w8a8")
    integer = copy.deepcopy(model)
    integer_linears(integer)
    seen = {}

    def keep(name):
        return lambda module, args, kwargs, out: seen.update({name: (args, kwargs, out)})

    for name, module in model.named_modules():
        if name.endswith((".attn", ".mlp")) and "vision" in name:
            module.register_forward_hook(keep(name), with_kwargs=True)
    with torch.no_grad(), simulate(weights=True, activations=True):
        family_of(model).encode_image(model, image)
        assert len(seen) == 4
        for name, (args, kwargs, out) in seen.items():
            got = integer.get_submodule(name)(*args, **kwargs)
            got, out = (each if torch.is_tensor(each) else each[0] for each in (got, out))
            # One value of thousands at the edge of its step.
            assert (got - out).norm() / out.norm() < 1e-3, name


def test_what_cannot_run_says_why():
    grouped = GroupedQuantizer(4)
    model, image = frozen("w4a4", vision_encoder__layers__0__mlp__lin2=grouped)
    with torch.no_grad(), simulate(weights=True, activations=True):
        expected = family_of(model).encode_image(model, image)
        done = integer_linears(model)
        got = family_of(model).encode_image(model, image)
    assert done.modules["IntegerMlp"] == 1
    assert done.simulated["its input is on the grid grouped, which is not one step for the whole tensor"] == 1
    assert (got - expected).norm() / expected.norm() < 0.1
    with pytest.raises(ConfigError, match="no layer of this SamModel can run on integers: it is not quantized"):
        integer_linears(random_sam("nano", 128, blocks=2))
    floating = QuantizedLayer(nn.Linear(4, 4), 16, ActivationQuantizer(16))
    assert why_not(floating) == "its weights are in floating point"
    with pytest.raises(ConfigError, match="floating point"):
        IntegerLinear.of(floating)


@pytest.mark.parametrize("layer", ["mlp.lin1", "mlp.lin2", "attn.qkv"])
def test_a_shift_for_each_channel_is_subtracted_before_and_part_of_the_bias(layer):
    """In front of a second MLP layer there is no kernel that gives its bytes: the two stay apart."""
    model, image = frozen("w4a4", **{f"vision_encoder.layers.0.{layer}".replace(".", "__"): ShiftedQuantizer(4)})
    with torch.no_grad(), simulate(weights=True, activations=True):
        module = copy.deepcopy(model.get_submodule(f"vision_encoder.layers.0.{layer}"))
        x = torch.randn(5, module.weight.shape[1], generator=torch.Generator().manual_seed(1))
        # Sums in another order: far less than a step of the output's spread.
        torch.testing.assert_close(IntegerLinear.of(module)(x), module(x), rtol=1e-4, atol=1e-4)
        expected = family_of(model).encode_image(model, image)
        done = integer_linears(model)
        got = family_of(model).encode_image(model, image)
    assert done.modules["IntegerMlp"] == (1 if layer == "mlp.lin2" else 2)
    assert done.simulated == {"it is a convolution": 2}
    assert (got - expected).norm() / expected.norm() < 0.1


def test_the_attention_module_is_found_again():
    """The copy of a converted model keeps its grids."""
    model, image = frozen("w4a4")
    integer_linears(model)
    twin = copy.deepcopy(model)
    assert any(isinstance(module, QuantizedRelativeAttention) for module in twin.modules())
    with torch.no_grad():
        assert torch.equal(family_of(model).encode_image(model, image), family_of(twin).encode_image(twin, image))
