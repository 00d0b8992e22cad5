"""ONNX: the reference evaluator's QuantizeLinear and DequantizeLinear, and its storage of 4- and 2-bit tensors.

QuantizeLinear is saturate(round_half_even(x / scale) + zero_point) with a division, so codes are equal without excuse.
"""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from carsam.pack.bits import pack_codes
from carsam.pack.layers import PackedLayer
from carsam.quantizers import ActivationQuantizer, QuantizedLayer
from carsam.quantizers.affine import decode, encode
from carsam.quantizers.rounding import weight_grid

# bits: ONNX's type, numpy's type. Bits without a type of their own are UINT8 with a Clip in a QDQ graph.
TYPES = {
    2: (TensorProto.UINT2, ml_dtypes.uint2),
    4: (TensorProto.UINT4, ml_dtypes.uint4),
    8: (TensorProto.UINT8, np.uint8),
}
OPSET = 25  # the first with UINT2


def run(nodes, x, outputs, constants):
    """Runs a graph of one input ``x``; ``outputs`` are names with ONNX's type."""
    shape = [None] * x.dim()
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    onnx.checker.check_model(made)
    return ReferenceEvaluator(made).run(None, {"x": x.numpy()})


def quantize(x, scale, zero, bits, **attributes):
    """Codes and values by ONNX."""
    kind, dtype = TYPES[bits]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    constants = [("s", scale.numpy()), ("z", zero.numpy().astype(np.uint8).astype(dtype))]
    codes, values = run(nodes, x, [("q", kind), ("y", TensorProto.FLOAT)], constants)
    return torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(values)


@pytest.mark.parametrize("bits", TYPES)
def test_activations_per_tensor(bits, activations):
    quantizer = ActivationQuantizer(bits, always=True)
    quantizer.set_range(activations.min().item() / 2, activations.max().item() / 3)
    codes, values = quantize(activations, quantizer.scale, quantizer.zero_point, bits)
    assert torch.equal(quantizer.encode(activations), codes)
    torch.testing.assert_close(quantizer(activations), values)
    assert codes.min() == 0 and codes.max() == 2**bits - 1


@pytest.mark.parametrize("bits", TYPES)
def test_weights_per_channel(bits, weight):
    scale, zero = weight_grid(weight, bits)
    codes, values = quantize(weight, scale, zero, bits, axis=0)
    ours = encode(weight, scale[:, None], zero[:, None], bits)
    assert torch.equal(ours.to(torch.uint8), codes)
    torch.testing.assert_close(decode(ours, scale[:, None], zero[:, None]), values)


def test_a_half_rounds_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 14.5, 20.0, -20.0])
    codes, _ = quantize(x, torch.tensor(1.0), torch.tensor(4.0), 4)
    assert encode(x, torch.tensor(1.0), torch.tensor(4.0), 4).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_the_packed_bytes_are_onnxs(bits, count):
    """Low bits first, the last byte filled with zeros."""
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    tensor = numpy_helper.from_array(codes.numpy().astype(TYPES[bits][1]))
    assert tensor.data_type == TYPES[bits][0]
    assert tensor.raw_data == pack_codes(codes, bits).numpy().tobytes()


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_linear_is_its_qdq_graph(bits, activations, weight):
    kind = TYPES[bits][1]
    source = torch.nn.Linear(96, 24)
    source.weight.copy_(weight)
    quantizer = ActivationQuantizer(bits, always=True)
    quantizer.set_range(-5.0, 8.0)
    layer = QuantizedLayer(source, bits, quantizer)
    layer.fit_weight()
    layer.freeze()
    packed = PackedLayer.from_quantized(layer)

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "b"], ["y"], transB=1),
    ]
    constants = [
        ("xs", quantizer.scale.numpy()),
        ("xz", quantizer.zero_point.numpy().astype(kind)),
        ("w", packed.integer_weight().numpy().astype(kind)),
        ("ws", packed.weight_scale.numpy()),
        ("wz", packed.weight_zero_point.numpy().astype(kind)),
        ("b", packed.bias.numpy()),
    ]
    (expected,) = run(nodes, activations, [("y", TensorProto.FLOAT)], constants)
    # Sums of 96 products in another order.
    torch.testing.assert_close(packed(activations), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
