"""Device functions that attention's kernels share: how a program visits keys block by block, and how the sums of spans
of keys are added. References of exponents are whole numbers, so sums are rescaled by powers of two, exactly. Knows
nothing of sequences.

Shapes: ROWS query rows of a program, BLOCK keys visited at a time; D head_dim, DIM the same rounded up to what matrix
units take; B tokens a page."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_tile import INTERPRETED, rounded

LOWEST = tl.constexpr(-1.0e30)
"""The reference of no key at all: finite, so that differences of it are numbers."""


@triton.jit
def _dot(a, b, sums):
    """sums + a b, float32."""
    if INTERPRETED:  # by numpy, which takes bfloat16 for whole numbers, and whose rows depend on where they are
        return tl.dot(a.to(tl.float64), b.to(tl.float64), sums.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _power_of_two(k):
    """2^k for whole k <= 0, exactly; 0 below the normal numbers."""
    return ((tl.maximum(k, -127.0) + 127.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def merge(total_top, total_mass, total_sums, top, mass, sums):
    """Add a span to the spans before it."""
    new_top = tl.maximum(total_top, top)
    before, now = _power_of_two(total_top - new_top), _power_of_two(top - new_top)
    total_mass = total_mass * before + mass * now
    total_sums = total_sums * before[:, None] + sums * now[:, None]
    return new_top, total_mass, total_sums


@triton.jit
def quotient(sums, mass):
    """Adding 0 turns -0 into 0, which is what a sum becomes in a block that it does not see."""
    return sums * tl.div_rn(1.0, mass)[:, None] + 0.0


@triton.jit
def _pages_of(table, start, end, B: tl.constexpr, BLOCK: tl.constexpr):
    """Page ids of the block of keys at `start`: one number where a block lies inside a page."""
    if B % BLOCK == 0:
        pages = tl.load(table + start // B, mask=start < end, other=0)
    else:
        at = start + tl.arange(0, BLOCK)
        pages = tl.load(table + at // B, mask=at < end, other=0)
    return pages


@triton.jit
def visit(
    q,
    k_pages,
    v_pages,
    table,
    page_stride,
    kv_head,
    scale,
    seen,
    start,
    end,
    total_top,
    total_mass,
    total_sums,
    top,
    mass,
    sums,
    D: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Visit keys start..end, block by block. `seen` [ROWS] is how many keys each row sees, which matters if MASKED.
    MERGED: whenever a span begins, what was summed before it goes to the totals."""
    key = tl.arange(0, BLOCK)
    channel = tl.arange(0, DIM)
    chunk: tl.constexpr = 16 if B % 16 == 0 else (8 if B % 8 == 0 else 1)
    k_head, v_head = k_pages + kv_head * (D * B), v_pages + kv_head * (D * B)
    pages = _pages_of(table, start, end, B, BLOCK)
    for at in range(start, end, BLOCK):
        # Loaded a block ahead, or the addresses of the next keys would wait for it.
        next_pages = _pages_of(table, at + BLOCK, end, B, BLOCK)
        if B % BLOCK == 0:
            page = pages.to(tl.int64) * page_stride
            inside = tl.multiple_of(at % B, BLOCK)  # Triton 3.6 does not see it, and would load key by key
            k_at = k_head + page + inside + channel[:, None] * B + key[None, :]
            v_at = v_head + page + inside * D + key[:, None] * D + channel[None, :]
        else:
            page = pages.to(tl.int64) * page_stride
            inside = (at + key) % B
            column = tl.max_contiguous(tl.multiple_of(page + inside, chunk), chunk)
            k_at = k_head + channel[:, None] * B + column[None, :]
            v_at = v_head + (page + inside * D)[:, None] + channel[None, :]
        if D == DIM:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=channel[:, None] < D, other=0.0)
        if MASKED or D != DIM:
            # What lies behind the last key may be another request's NaN, which a weight of 0 would not hide.
            v = tl.load(v_at, mask=((at + key) < end)[:, None] & (channel < D)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        scores = _dot(q, k.to(q.dtype), tl.zeros((ROWS, BLOCK), tl.float32)) * scale
        if MASKED:
            scores = tl.where((at + key)[None, :] < seen[:, None], scores, float("-inf"))
        if MERGED:  # noqa: SIM102 - `and` would not be decided when compiling
            if at % SPAN == 0:
                total_top, total_mass, total_sums = merge(total_top, total_mass, total_sums, top, mass, sums)
                top = tl.full((ROWS,), LOWEST, tl.float32)
                mass = tl.zeros((ROWS,), tl.float32)
                sums = tl.zeros((ROWS, DIM), tl.float32)
        new_top = tl.maximum(top, tl.ceil(tl.max(scores, 1)))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = _power_of_two(top - new_top)
        mass = mass * shrink + tl.sum(weights, 1)
        sums = _dot(rounded(weights, q.dtype), v.to(q.dtype), sums * shrink[:, None])
        top = new_top
        pages = next_pages
    return total_top, total_mass, total_sums, top, mass, sums
