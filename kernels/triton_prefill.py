"""Attention of pieces of several queries on GPUs: a program has a tile of queries and visits all keys that they see.

In exact mode it adds up spans of keys as `triton_decode` does, with as many rows in a tile and by the same functions:
a query has the same bits in a piece and alone.

Shapes: S sequences, H query heads in K groups of G, the others as in `triton_keys`."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_keys import LOWEST, merge, quotient, visit
from .triton_tile import rounded


@triton.jit
def _sequence_of(starts, tile, S, QUERIES: tl.constexpr):
    """Which sequence a tile belongs to, when sequence s has the tiles from starts[s] // QUERIES + s on."""
    low, high = tile * 0, tile * 0 + S
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(starts + middle) // QUERIES).to(tl.int32) + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["table_stride", "S"])
def piece_kernel(
    q_ptr,
    k_pages,
    v_pages,
    out_ptr,
    tables,
    lens,
    starts,
    table_stride,
    page_stride,
    scale,
    S,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Program (j, k): tile j, counted from the last one since those have most to do, for key/value head k. Sequences
    of one query are left to the other kernel."""
    QUERIES: tl.constexpr = ROWS // G
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(starts, tile, S, QUERIES)
    piece = tl.load(starts + sequence).to(tl.int32)
    piece_end = tl.load(starts + sequence + 1).to(tl.int32)
    first = piece + (tile - piece // QUERIES - sequence) * QUERIES
    if first >= piece_end or piece_end - piece == 1:
        return
    hidden = tl.load(lens + sequence) - piece_end
    row, channel = tl.arange(0, ROWS), tl.arange(0, DIM)
    last = tl.minimum(first + QUERIES, piece_end) - 1
    query = first + row // G
    valid = (query <= last) & (row < QUERIES * G)
    query = tl.minimum(query, last)
    at = query * (K * G) + kv_head * G + row % G
    inside = valid[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + at.to(tl.int64)[:, None] * D + channel[None, :], mask=inside, other=0.0)
    seen = query + hidden + 1
    top = tl.full((ROWS,), LOWEST, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DIM), tl.float32)
    total_top, total_mass, total_sums = top, mass, sums
    table = tables + sequence.to(tl.int64) * table_stride
    # Blocks that every row sees whole, then those at the diagonal.
    whole = (first + hidden + 1) // BLOCK * BLOCK
    for MASKED in tl.static_range(2):
        total_top, total_mass, total_sums, top, mass, sums = visit(
            q,
            k_pages,
            v_pages,
            table,
            page_stride,
            kv_head,
            scale,
            seen,
            whole if MASKED else 0,
            last + hidden + 1 if MASKED else whole,
            total_top,
            total_mass,
            total_sums,
            top,
            mass,
            sums,
            D,
            DIM,
            B,
            ROWS,
            BLOCK,
            SPAN,
            MASKED=MASKED,
            MERGED=MERGED,
        )
    if MERGED:
        _, mass, sums = merge(total_top, total_mass, total_sums, top, mass, sums)
    result = rounded(quotient(sums, mass), out_ptr.dtype.element_ty)
    tl.store(out_ptr + at.to(tl.int64)[:, None] * D + channel[None, :], result, mask=inside)
