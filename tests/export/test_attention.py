"""The MatMuls of an attention: ONNX Runtime against the simulation, for every grid of P."""

import pytest
import torch

from carsam.export import attention
from carsam.export.attention import Call, lower_attention
from carsam.export.graph import Stretch
from carsam.models.attention import MatMulQuantizers
from carsam.quantizers import ActivationQuantizer, Log1pSoftmax, Log2Softmax, RowMaximumSoftmax, UniformSoftmax

HEADS, HEIGHT, WIDTH, DIM = 4, 4, 5, 8
TOKENS = HEIGHT * WIDTH


def uniform(bits, scale, zero):
    quantizer = ActivationQuantizer(bits, always=True)
    if bits < 16:
        quantizer.set_grid(torch.tensor(scale), torch.tensor(zero))
    return quantizer


def softmax(name, bits):
    if name == "uniform":
        probs = UniformSoftmax(bits, always=True)
        probs.quantizer.set_grid(torch.tensor(0.5 / (2**bits - 1)), torch.tensor(0))
        return probs
    if name == "row-max":
        return RowMaximumSoftmax(bits, always=True)
    if name == "log2":
        probs = Log2Softmax(bits, always=True)
        probs.set_grid(torch.tensor(0.75), 2)
        return probs
    probs = Log1pSoftmax(bits, always=True)
    probs.set_grid(torch.tensor(0.75), 20.0)
    return probs


def quantizers(name, bits):
    half = 2 ** (bits - 1)
    step = 4 / half
    operands = [uniform(bits, step * factor, half + shift) for factor, shift in ((1.0, 0), (0.9, 1), (0.8, -1))]
    return MatMulQuantizers(*operands, softmax(name, bits))


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(3))
    rows = torch.randn(HEADS, HEIGHT, WIDTH, HEIGHT, generator=generator)
    columns = torch.randn(HEADS, HEIGHT, WIDTH, WIDTH, generator=generator)
    return query, key, value, rows, columns


@pytest.mark.parametrize("bits", [4, 8])
# Whole; some heads at a time; some queries of a head at a time.
@pytest.mark.parametrize("part", [2**20, 2 * TOKENS * TOKENS, 5 * TOKENS])
@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("name", ["uniform", "row-max", "log2", "log1p"])
def test_every_grid_of_p(name, loops, bits, part, operands, run_stretch, monkeypatch):
    monkeypatch.setattr(attention, "PART" if loops else "UNROLLED_PART", part)
    matmul = quantizers(name, bits)
    query, key, value, rows, columns = operands
    expected = matmul.attend_grid(query, key, value, DIM**-0.5, (rows, columns))
    call = Call(
        "query",
        "key",
        "value",
        "output",
        DIM**-0.5,
        tuple(tuple(each.shape) for each in (query, key, value)),
        relative=("rows", "columns"),
        sides=(HEIGHT, WIDTH),
    )
    graph = Stretch("site")
    facts = lower_attention(graph, matmul, call, loops=loops)
    assert ("Scan" in {node.op_type for node in graph.nodes}) is (loops and part < 2**20)
    inputs = {"query": query, "key": key, "value": value, "rows": rows, "columns": columns}
    (found,) = run_stretch(graph, {name: each.numpy() for name, each in inputs.items()}, ["output"])
    # The MatMuls are exact; exp and log of the two libraries differ in the last bit, which moves no code here.
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-6, rtol=1e-5)
    pairs = HEADS * TOKENS * TOKENS * DIM
    assert facts.macs == 2 * pairs
    assert facts.integer_macs == (2 * pairs if name in ("uniform", "row-max") else pairs)
    assert (name in facts.reason) is (name in ("log2", "log1p"))


def test_an_attention_in_floating_point_with_a_mask(operands, run_stretch):
    matmul = MatMulQuantizers(*(uniform(16, 0, 0) for _ in range(3)), UniformSoftmax(16, always=True))
    query, key, value = operands[:3]
    mask = torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))
    expected, _ = matmul.attend(query, key, value, 0.5, mask)
    shapes = tuple(tuple(each.shape) for each in (query, key, value))
    graph = Stretch("site")
    facts = lower_attention(graph, matmul, Call("query", "key", "value", "output", 0.5, shapes, mask="mask"))
    inputs = {"query": query, "key": key, "value": value, "mask": mask}
    (found,) = run_stretch(graph, {name: each.numpy() for name, each in inputs.items()}, ["output"])
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-6, rtol=1e-5)
    assert facts.integer_macs == 0 and facts.reason
