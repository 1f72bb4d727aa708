"""Causal attention over paged keys on CPU, for decoding and prefill by one and the same arithmetic.

A query row visits its key pages in order with an online softmax; rows are computed four at a time only to share the
loading of keys and values. So a row's bits depend on its own sequence alone: not on batch mates, not on how a prompt
was cut into pieces, not on which part of it came from the prefix cache. Compiled once per (group size, head_dim, page
size), so that the inner loops have constant length; keys lie transposed inside a page, so that one vector holds one
channel of several tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .cpu_memory import dtype_tag, elements, exp_f32, i32_array, i64_array, jit, load, store
from .cpu_vector import vector_load, vector_multiply_add, vector_store, vector_zero

_QUERIES = 8
"""Query tokens of one sequence that visit a page together: enough to reuse it from the first-level cache."""


def tiled_attention(
    q_THd: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tables_SN: Tensor,
    lens_S: Tensor,
    q_starts: Tensor,
    scale: float,
) -> Tensor:
    """q_THd [T, H, d]; k_pages [P, K, d, B] and v_pages [P, K, B, d] views with contiguous pages; tables_SN int32
    page ids; lens_S int32 number of keys that each sequence's last query sees; q_starts int64 [S + 1]: sequence s
    owns queries q_starts[s]:q_starts[s + 1], the last of its keys. Returns [T, H, d] of q's dtype."""
    T, H, d = q_THd.shape
    P, K, B, _ = v_pages.shape
    out_THd = torch.empty_like(q_THd)
    _kernel(H // K, d, B)(
        q_THd.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out_THd.data_ptr(),
        tables_SN.data_ptr(),
        lens_S.data_ptr(),
        q_starts.data_ptr(),
        tables_SN.stride(0),
        v_pages.stride(0),
        lens_S.shape[0],
        T,
        K,
        P,
        np.float32(scale),
        dtype_tag(q_THd),
    )
    return out_THd


@jit
def _soften(scores, start, width, count, peak):
    """Turn a row's raw scores into weights relative to its running peak, in place; those from `count` on are not
    visible and become 0. Returns (new peak, factor by which earlier sums shrink, mass of these weights)."""
    top = peak
    for j in range(start, start + count):
        top = max(top, scores[j])
    total = np.float32(0.0)
    for j in range(start, start + count):
        scores[j] = exp_f32(scores[j] - top)
        total += scores[j]
    for j in range(start + count, start + width):
        scores[j] = np.float32(0.0)
    return top, exp_f32(peak - top), total


@cache
def _kernel(G: int, d: int, B: int) -> Callable[..., None]:
    """The kernel for G query heads per key/value head, head_dim d, B tokens a page. Its closure holds integers only:
    Numba's disk cache recognises nothing else from one process to the next."""
    width = math.gcd(B, d, 16)
    wide = math.gcd(d, 16)
    max_rows = -(-_QUERIES * G // 4) * 4
    queries = _QUERIES

    @jit
    def kernel(pq, pk, pv, pout, ptables, plens, pstarts, table_stride, page_stride, S, T, K, P, scale, tag):
        q, out = elements(pq, T * K * G * d, tag), elements(pout, T * K * G * d, tag)
        k_pages, v_pages = elements(pk, P * page_stride, tag), elements(pv, P * page_stride, tag)
        tables, lens, starts = i32_array(ptables, S * table_stride), i32_array(plens, S), i64_array(pstarts, S + 1)
        query, sums = np.zeros(max_rows * d, np.float32), np.empty(max_rows * d, np.float32)
        scores = np.empty(max_rows * B, np.float32)
        peak, mass = np.empty(max_rows, np.float32), np.empty(max_rows, np.float32)
        one = np.float32(1.0)
        for s in range(S):
            for first in range(starts[s], starts[s + 1], queries):
                count = min(queries, starts[s + 1] - first)
                seen = lens[s] - (starts[s + 1] - first) + 1  # keys of the block's first query
                rows = (count * G + 3) // 4 * 4
                for kh in range(K):
                    sums[: rows * d] = np.float32(0.0)
                    peak[:rows] = np.float32(-np.inf)
                    mass[:rows] = np.float32(0.0)
                    for r in range(count * G):
                        base = ((first + r // G) * K * G + kh * G + r % G) * d
                        for i in range(d):
                            query[r * d + i] = load(q, base + i) * scale
                    for n in range((seen + count - 2) // B + 1):
                        at = tables[s * table_stride + n] * page_stride + kh * B * d
                        filled = min(B, seen + count - 1 - n * B)  # what lies behind may be another request's NaN
                        for r in range(0, rows, 4):
                            for j in range(0, B, width):
                                a0, a1, a2, a3 = (
                                    vector_zero(width),
                                    vector_zero(width),
                                    vector_zero(width),
                                    vector_zero(width),
                                )
                                b0, b1, b2, b3 = a0, a1, a2, a3
                                for i in range(0, d, 2):
                                    even = vector_load(k_pages, at + i * B + j, width)
                                    odd = vector_load(k_pages, at + (i + 1) * B + j, width)
                                    w = r * d + i
                                    a0 = vector_multiply_add(query[w], even, a0)
                                    b0 = vector_multiply_add(query[w + 1], odd, b0)
                                    a1 = vector_multiply_add(query[w + d], even, a1)
                                    b1 = vector_multiply_add(query[w + d + 1], odd, b1)
                                    a2 = vector_multiply_add(query[w + 2 * d], even, a2)
                                    b2 = vector_multiply_add(query[w + 2 * d + 1], odd, b2)
                                    a3 = vector_multiply_add(query[w + 3 * d], even, a3)
                                    b3 = vector_multiply_add(query[w + 3 * d + 1], odd, b3)
                                vector_store(scores, r * B + j, vector_multiply_add(one, a0, b0))
                                vector_store(scores, (r + 1) * B + j, vector_multiply_add(one, a1, b1))
                                vector_store(scores, (r + 2) * B + j, vector_multiply_add(one, a2, b2))
                                vector_store(scores, (r + 3) * B + j, vector_multiply_add(one, a3, b3))
                        for r in range(rows):
                            visible = max(0, min(B, seen + r // G - n * B))
                            peak[r], shrink, total = _soften(scores, r * B, B, visible, peak[r])
                            mass[r] = mass[r] * shrink + total
                            if shrink != one:
                                for i in range(r * d, (r + 1) * d):
                                    sums[i] *= shrink
                        for r in range(0, rows, 4):
                            for i in range(0, d, wide):
                                t0 = vector_load(sums, r * d + i, wide)
                                t1 = vector_load(sums, (r + 1) * d + i, wide)
                                t2 = vector_load(sums, (r + 2) * d + i, wide)
                                t3 = vector_load(sums, (r + 3) * d + i, wide)
                                for j in range(filled):
                                    value = vector_load(v_pages, at + j * d + i, wide)
                                    t0 = vector_multiply_add(scores[r * B + j], value, t0)
                                    t1 = vector_multiply_add(scores[(r + 1) * B + j], value, t1)
                                    t2 = vector_multiply_add(scores[(r + 2) * B + j], value, t2)
                                    t3 = vector_multiply_add(scores[(r + 3) * B + j], value, t3)
                                vector_store(sums, r * d + i, t0)
                                vector_store(sums, (r + 1) * d + i, t1)
                                vector_store(sums, (r + 2) * d + i, t2)
                                vector_store(sums, (r + 3) * d + i, t3)
                    for r in range(count * G):
                        base = ((first + r // G) * K * G + kh * G + r % G) * d
                        for i in range(d):
                            store(out, base + i, sums[r * d + i] / mass[r])

    return kernel
