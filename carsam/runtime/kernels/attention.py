"""Attention with relative positions whose four MatMul operands are quantized, without a map in memory.

P must be normalised before it is quantized, so the scores are computed twice: once for each row's maximum and sum,
once for P itself. Codes minus zero point are whole numbers up to 255, which float16 holds exactly, and tensor cores
add their products in float32: QKᵀ is exact for up to 256 channels a head, and so is PV as long as its sums stay below
2^24.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from carsam.runtime.kernels.linear import to_steps

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_steps(ptrs, mask, grid_ptr, RAW: tl.constexpr):
    """A tile of an operand as steps of its grid, in float16."""
    x = tl.load(ptrs, mask=mask, other=0.0)
    if RAW:
        x = to_steps(x.to(tl.float32), tl.load(grid_ptr), tl.load(grid_ptr + 1), tl.load(grid_ptr + 2))
    return x.to(tl.float16)


@triton.jit
def attention_kernel(
    qkv_ptr,
    rel_h_ptr,
    rel_w_ptr,
    grids_ptr,
    out_ptr,
    HEADS,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PAD1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PAD_W: tl.constexpr,
    RAW: tl.constexpr,
):
    """One head's queries, BLOCK_M at a time, over all keys, ROWS rows of the image at a time.

    A head's channels are two pieces, D0 a power of two and the rest D1 (padded to PAD1; 0: none), because a tile's
    sides are powers of two: 80 channels cost 64 + 16 and not 128. Rows of keys are padded to PAD_W for the same reason.
    """
    block, index = tl.program_id(0), tl.program_id(1)
    batch, head = (index // HEADS).to(tl.int64), index % HEADS
    D: tl.constexpr = D0 + D1
    tokens = HEIGHT * WIDTH
    stride = 3 * HEADS * D
    base = qkv_ptr + batch * tokens * stride + head * D
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = queries < tokens
    d0 = tl.arange(0, D0)
    q_ptrs = base + queries[:, None] * stride
    q0 = load_steps(q_ptrs + d0[None, :], valid[:, None], grids_ptr, RAW)
    if PAD1 > 0:
        d1 = D0 + tl.arange(0, PAD1)
        in1 = d1 < D
        q1 = load_steps(q_ptrs + d1[None, :], valid[:, None] & in1[None, :], grids_ptr, RAW)
    factor = tl.load(grids_ptr + 12)

    keys = tl.arange(0, ROWS * PAD_W)
    key_row, key_column = keys // PAD_W, keys % PAD_W
    row = index.to(tl.int64) * tokens + queries
    # Along a row of the image relative positions are the same for every row of keys: loaded once.
    along = valid[:, None] & (key_column < WIDTH)[None, :]
    rel_w = tl.load(rel_w_ptr + row[:, None] * WIDTH + key_column[None, :], mask=along, other=0.0).to(tl.float32)
    rel_h_ptrs = rel_h_ptr + row[:, None] * HEIGHT + key_row[None, :]
    rel_w *= LOG2E

    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, HEIGHT, ROWS):
        there = (key_row + start < HEIGHT) & (key_column < WIDTH)
        k_ptrs = base + HEADS * D + ((start + key_row) * WIDTH + key_column)[None, :] * stride
        k0 = load_steps(k_ptrs + d0[:, None], there[None, :], grids_ptr + 3, RAW)
        scores = tl.dot(q0, k0)
        if PAD1 > 0:
            k1 = load_steps(k_ptrs + d1[:, None], there[None, :] & in1[:, None], grids_ptr + 3, RAW)
            scores = tl.dot(q1, k1, scores)
        rel_h = tl.load(rel_h_ptrs + start, mask=valid[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], scores * factor + rel_h * LOG2E + rel_w, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
        top = higher

    scale_p, low_p, high_p = tl.load(grids_ptr + 9), tl.load(grids_ptr + 10), tl.load(grids_ptr + 11)
    share = 1.0 / (total * scale_p)
    out0 = tl.zeros((BLOCK_M, D0), dtype=tl.float32)
    if PAD1 > 0:
        out1 = tl.zeros((BLOCK_M, PAD1), dtype=tl.float32)
    for start in range(0, HEIGHT, ROWS):
        there = (key_row + start < HEIGHT) & (key_column < WIDTH)
        place = (start + key_row) * WIDTH + key_column
        k_ptrs = base + HEADS * D + place[None, :] * stride
        k0 = load_steps(k_ptrs + d0[:, None], there[None, :], grids_ptr + 3, RAW)
        scores = tl.dot(q0, k0)
        if PAD1 > 0:
            k1 = load_steps(k_ptrs + d1[:, None], there[None, :] & in1[:, None], grids_ptr + 3, RAW)
            scores = tl.dot(q1, k1, scores)
        rel_h = tl.load(rel_h_ptrs + start, mask=valid[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = scores * factor + rel_h * LOG2E + rel_w
        probs = tl.exp2(scores - top[:, None]) * share[:, None]
        probs = tl.where(there[None, :], to_steps(probs, 1.0, low_p, high_p), 0.0).to(tl.float16)
        v_ptrs = base + 2 * HEADS * D + place[:, None] * stride
        v0 = load_steps(v_ptrs + d0[None, :], there[:, None], grids_ptr + 6, RAW)
        out0 = tl.dot(probs, v0, out0)
        if PAD1 > 0:
            v1 = load_steps(v_ptrs + d1[None, :], there[:, None] & in1[None, :], grids_ptr + 6, RAW)
            out1 = tl.dot(probs, v1, out1)

    step = scale_p * tl.load(grids_ptr + 6)
    out_ptrs = out_ptr + (batch * tokens + queries)[:, None] * (HEADS * D) + head * D
    tl.store(out_ptrs + d0[None, :], (out0 * step).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    if PAD1 > 0:
        tl.store(
            out_ptrs + d1[None, :],
            (out1 * step).to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & in1[None, :],
        )


def pieces(channels: int) -> tuple[int, int, int]:
    """A head's channels as ``(D0, D1, PAD1)``: the largest power of two, the rest, and the rest's padded size."""
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    return first, rest, max(16, triton.next_power_of_2(rest)) if rest else 0


def launch(
    qkv: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    grids: Tensor,
    out: Tensor,
    height: int,
    width: int,
    *,
    raw: bool,
    block_m: int = 128,
    keys: int = 64,
    warps: int = 8,
    stages: int = 2,
) -> None:
    """Runs the kernel; arguments as of :func:`carsam.runtime.attention.quantized_attention`.

    Args:
        qkv, rel_h, rel_w, grids, out: Contiguous.
        height, width: Of the image or window, in tokens.
        raw: Whether ``qkv`` holds values, to be quantized as they are loaded, and not steps.
        block_m: Queries a program takes.
        keys: Keys at a time, about.
        warps, stages: Of a program.
    """
    batch, tokens, _, heads, channels = qkv.shape
    first, rest, padded = pieces(channels)
    pad_w = max(16, triton.next_power_of_2(width))
    rows = max(1, keys // pad_w)
    attention_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
        qkv,
        rel_h,
        rel_w,
        grids,
        out,
        heads,
        height,
        width,
        D0=first,
        D1=rest,
        PAD1=padded,
        BLOCK_M=block_m,
        ROWS=rows,
        PAD_W=pad_w,
        RAW=raw,
        num_warps=warps,
        num_stages=stages,
    )
