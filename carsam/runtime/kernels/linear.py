"""INT8 matrix product whose epilogue dequantizes, adds the bias, and may already quantize for the next layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from carsam.errors import DeviceError

# 1.5 · 2^23: adding and subtracting it rounds a float32 below 2^22 to the nearest whole number, ties to even, as
# torch.round does; in Triton's interpreter as well.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def to_steps(x, scale, low, high):
    """clip(round(x / scale), low, high); clipped first, so that rounding stays in its range (low, high are whole)."""
    steps = tl.minimum(tl.maximum(x / scale, low), high)
    return (steps + MAGIC) - MAGIC


@triton.jit
def linear_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    zero_ptr,
    sums_ptr,
    next_ptr,
    next_sums_ptr,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GELU_CODES: tl.constexpr,
    HAS_NEXT_SUMS: tl.constexpr,
):
    """out (M, N) of a (M, K) int8 and w (N, K) int8, both row-major; see carsam.runtime.integers.linear_reference.

    With GELU_CODES, out is int8: the codes of GELU(out) on the grid at next_ptr, whose sums go to next_sums_ptr (M,).
    """
    # Programs that run together share rows of a and of w, so both stay in the L2 cache.
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    size_m = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + (pid % (GROUP_M * blocks_n)) % size_m
    block_n = (pid % (GROUP_M * blocks_n)) // size_m

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Beyond the edge other rows are read, whose results are not stored: cheaper than a mask.
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * K + inner[None, :]
    w_ptrs = w_ptr + (columns % N)[None, :] * K + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=inner[None, :] < K - k, other=0)
            w = tl.load(w_ptrs, mask=inner[:, None] < K - k, other=0)
        total = tl.dot(a, w, total, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    inside = columns < N
    total -= tl.load(offset_ptr + columns, mask=inside, other=0)[None, :]
    if HAS_ZERO:
        zero = tl.load(zero_ptr + columns, mask=inside, other=0)
        total -= tl.load(sums_ptr + rows, mask=rows < M, other=0)[:, None] * zero[None, :]
    out = total.to(tl.float32) * tl.load(scale_ptr + columns, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    both = (rows < M)[:, None] & inside[None, :]
    # A base of 64 bits and offsets of 32: pointers of 64 bits for a whole tile do not fit into the registers.
    out_ptrs = out_ptr + (block_m * BLOCK_M).to(tl.int64) * N + tl.arange(0, BLOCK_M)[:, None] * N + columns[None, :]
    if GELU_CODES:
        out = 0.5 * out * (1.0 + tl.erf(out * 0.7071067811865476))
        steps = to_steps(out, tl.load(next_ptr), tl.load(next_ptr + 1), tl.load(next_ptr + 2))
        if HAS_NEXT_SUMS:
            row_sums = tl.sum(tl.where(both, steps, 0.0), axis=1).to(tl.int32)
            tl.atomic_add(next_sums_ptr + rows, row_sums, mask=rows < M)
        tl.store(out_ptrs, (steps + tl.load(next_ptr + 3)).to(tl.int8), mask=both)
    else:
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=both)


@dataclass(frozen=True)
class Config:
    """Tile of the output, tile of the inner dimension, warps, and stages of the pipeline that loads ahead."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Few, because each is compiled and timed when a shape is first met; the last two are for a decoder's few tokens.
LARGE = (
    Config(128, 256, 128, 8, 3),
    Config(256, 128, 128, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(128, 128, 128, 8, 4),
    Config(128, 128, 128, 4, 4),
)
SMALL = (Config(64, 64, 128, 4, 3), Config(16, 64, 128, 4, 3))
SMALL_M = 512


def launch(
    config: Config,
    a: Tensor,
    w: Tensor,
    out: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    zero: Tensor | None = None,
    sums: Tensor | None = None,
    next_grid: Tensor | None = None,
    next_sums: Tensor | None = None,
) -> None:
    """Runs the kernel with one configuration; arguments as of :func:`carsam.runtime.linear.int8_linear`."""
    (m, k), n = a.shape, w.shape[0]
    linear_kernel[(triton.cdiv(m, config.m) * triton.cdiv(n, config.n),)](
        a,
        w,
        out,
        scale,
        offset,
        scale if bias is None else bias,
        offset if zero is None else zero,
        offset if zero is None else sums,
        scale if next_grid is None else next_grid,
        offset if next_sums is None else next_sums,
        m,
        n,
        k,
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        GROUP_M=8,
        EVEN_K=k % config.k == 0,
        HAS_BIAS=bias is not None,
        HAS_ZERO=zero is not None,
        GELU_CODES=next_grid is not None,
        HAS_NEXT_SUMS=next_sums is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )


_fastest: dict[tuple, Config] = {}


def run(a: Tensor, w: Tensor, out: Tensor, *rest: Tensor | None) -> None:
    """Runs the kernel with the configuration that was fastest when a problem of this size was first met."""
    launch(fastest(a, w, out, *rest), a, w, out, *rest)


def fastest(a: Tensor, w: Tensor, out: Tensor, *rest: Tensor | None) -> Config:
    """The configuration for these arguments, timed where a problem of this size is new."""
    m, (n, k) = a.shape[0], w.shape
    key = (max(16, triton.next_power_of_2(m)), n, k, out.dtype, tuple(each is not None for each in rest), a.device)
    if key not in _fastest:
        _fastest[key] = _time(SMALL if m <= SMALL_M else LARGE, a, w, out, *rest)
    return _fastest[key]


def _time(configs: tuple[Config, ...], *arguments: Tensor | None) -> Config:
    # Sums are added to, so trials get sums of their own.
    *arguments, next_sums = arguments
    next_sums = None if next_sums is None else next_sums.clone()
    times: dict[Config, float] = {}
    for config in configs:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            for _ in range(2):
                launch(config, *arguments, next_sums)
        except triton.runtime.errors.OutOfResources:  # a GPU with less shared memory
            continue
        start.record()
        for _ in range(5):
            launch(config, *arguments, next_sums)
        end.record()
        end.synchronize()
        times[config] = start.elapsed_time(end)
    if not times:
        raise DeviceError("no configuration of the INT8 kernel fits this GPU's shared memory; use runtime='torch'.")
    return min(times, key=times.__getitem__)
