"""The Triton kernels against their references: on a GPU, or by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_integers import packed_layer

from carsam.runtime.attention import quantized_attention, steps_of
from carsam.runtime.integers import FoldedWeight, gelu_codes_reference, linear_reference, to_codes
from carsam.runtime.linear import IntegerLinear


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with PyTorch's CUDA builds, or alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run")
@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="this is the interpreter")
def test_in_the_interpreter():
    """Triton decides at its first import whether it interprets: another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.fixture
def kernels():
    """The modules of kernels, run by Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds, or alone: pip install triton")
    if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("no GPU; test_in_the_interpreter runs this file again with Triton's interpreter")
    from carsam.runtime.kernels import attention, linear

    return linear, attention


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), [(37, 20, 64), (16, 40, 48)])
def test_the_linear_kernel_is_its_reference(kernels, bits, m, n, k):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = IntegerLinear.of(packed_layer(bits, bits, k, n), packed=False).to(device)
    following = IntegerLinear.of(packed_layer(bits, bits, n, 8, 3), packed=False).to(device)
    a, sums = to_codes(torch.randn(m, k, device=device), layer.grid, layer.needs_sums)
    weight = FoldedWeight(layer.weight, layer.scale, layer.offset, layer.zero)
    config = kernels[0].Config(16, 32, 32, 4, 1)
    out = torch.full((m, n), torch.nan, device=device)
    kernels[0].launch(config, a, layer.weight, out, layer.scale, layer.offset, layer.bias, layer.zero, sums)
    expected = linear_reference(a, weight, sums, layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # a multiplication and an addition, perhaps fused

    codes = torch.full((m, n), -77, dtype=torch.int8, device=device)
    next_sums = torch.zeros(m, dtype=torch.int32, device=device) if following.needs_sums else None
    rest = layer.scale, layer.offset, layer.bias, layer.zero, sums, following.grid, next_sums
    kernels[0].launch(config, a, layer.weight, codes, *rest)
    expected_codes, expected_sums = gelu_codes_reference(expected, following.grid, following.needs_sums)
    # erf differs in the last digit, so a value at the very edge of a step may fall to the other side.
    assert (codes.int() - expected_codes.int()).abs().max() <= 1
    assert (codes != expected_codes).float().mean() < 0.01
    if next_sums is not None:
        assert torch.equal(next_sums - expected_sums, (codes.int() - expected_codes.int()).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("height", "width", "channels"), [(5, 6, 24), (4, 4, 16)])
def test_the_attention_kernel_is_its_reference(kernels, raw, height, width, channels):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    tokens = height * width
    qkv = torch.randn(2, tokens, 3, 2, channels, device=device)
    rel_h, rel_w = (torch.randn(2, 2, tokens, n, device=device) for n in (height, width))
    steps = [0.2, -7.0, 8.0, 0.25, -6.0, 9.0, 0.3, -8.0, 7.0, 1 / 15, 0.0, 15.0]
    grids = torch.tensor([*steps, 0.2 * 0.25 * channels**-0.5 * 1.4426950408889634], device=device)
    values = qkv if raw else steps_of(qkv, grids)
    expected = quantized_attention._init_fn(values, rel_h, rel_w, grids, height, width, raw, torch.float32)
    out = torch.full((2, tokens, 2, channels), torch.nan, device=device)
    kernels[1].launch(values, rel_h, rel_w, grids, out, height, width, raw=raw, block_m=16, keys=32, warps=4, stages=1)
    # Where P lies at the edge of a step, exp2 in another order of operations may fall to the other side: one step of P
    # times a few steps of V.
    assert (out - expected).abs().max() <= 8 * 0.3 / 15 * 2
    torch.testing.assert_close(out.mean(), expected.mean(), rtol=0, atol=1e-3)
    assert ((out - expected).abs() < 1e-5).float().mean() > 0.9
