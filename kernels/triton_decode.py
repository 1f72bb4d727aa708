"""Attention of sequences with one query on GPUs: `span_kernel` visits each span of keys by a program of its own, and
`merge_kernel` adds the spans of a sequence in order. So a sequence has the same bits in any batch.

Shapes: W spans, H query heads in K groups of G, the others as in `triton_keys`."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_keys import LOWEST, merge, quotient, visit
from .triton_tile import rounded


@triton.jit(do_not_specialize=["table_stride"])
def span_kernel(
    q_ptr,
    k_pages,
    v_pages,
    sums_ptr,
    stats_ptr,
    tables,
    lens,
    starts,
    spans,
    table_stride,
    page_stride,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (w * K + k): span w for key/value head k. Writes sums [W, H, D] and stats [W, H, 2]: reference, mass."""
    item, kv_head = tl.program_id(0) // K, tl.program_id(0) % K
    sequence = tl.load(spans + 2 * item)
    if sequence < 0:
        return
    first = tl.load(spans + 2 * item + 1) * SPAN
    query = tl.load(starts + sequence).to(tl.int32)
    length = tl.load(lens + sequence)
    row, channel = tl.arange(0, ROWS), tl.arange(0, DIM)
    head = kv_head * G + row
    valid = row < G
    inside = valid[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + (query * (K * G) + head)[:, None] * D + channel[None, :], mask=inside, other=0.0)
    top = tl.full((ROWS,), LOWEST, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    _, _, _, top, mass, sums = visit(
        q,
        k_pages,
        v_pages,
        tables + sequence.to(tl.int64) * table_stride,
        page_stride,
        kv_head,
        scale,
        tl.zeros((ROWS,), tl.int32) + length,
        first,
        tl.minimum(first + SPAN, length),
        top,
        mass,
        sums,
        top,
        mass,
        sums,
        D,
        DIM,
        B,
        ROWS,
        BLOCK,
        SPAN,
        MASKED=True,
        MERGED=False,
    )
    out = item.to(tl.int64) * (K * G) + head
    tl.store(sums_ptr + out[:, None] * D + channel[None, :], sums, mask=inside)
    tl.store(stats_ptr + 2 * out, top, mask=valid)
    tl.store(stats_ptr + 2 * out + 1, mass, mask=valid)


@triton.jit
def merge_kernel(
    sums_ptr,
    stats_ptr,
    out_ptr,
    starts,
    first_spans,
    H: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Program (h, s): adds the spans of sequence s, if it has one query, in order. Zeros without any span."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    query = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - query != 1:
        return
    span = tl.load(first_spans + sequence)
    end = tl.load(first_spans + sequence + 1)
    one, channel = tl.arange(0, 1), tl.arange(0, DIM)
    top = tl.full((1,), LOWEST, tl.float32)
    mass = tl.zeros((1,), tl.float32)
    sums = tl.zeros((1, DIM), tl.float32)
    for start in range(span, end, UNROLL):
        for j in tl.static_range(UNROLL):
            item = one + start + j
            at = item.to(tl.int64) * H + head
            there = item < end
            span_top = tl.load(stats_ptr + 2 * at, mask=there, other=LOWEST)
            span_mass = tl.load(stats_ptr + 2 * at + 1, mask=there, other=0.0)
            inside = there[:, None] & (channel < D)[None, :]
            span_sums = tl.load(sums_ptr + at[:, None] * D + channel[None, :], mask=inside, other=0.0)
            top, mass, sums = merge(top, mass, sums, span_top, span_mass, span_sums)
    mass = tl.where(end > span, mass, 1.0)
    result = rounded(quotient(sums, mass), out_ptr.dtype.element_ty)
    out = (one.to(tl.int64) + query) * H + head
    tl.store(out_ptr + out[:, None] * D + channel[None, :], result, mask=(channel < D)[None, :])
