"""Attention of one query per sequence over paged keys, on CPU: the inner loop of decoding.

Compiled once per (group size, head_dim, page size) so that the inner loops have constant length; keys are stored
transposed inside a page so that one vector holds one channel of a whole page. Scratch of the caller's dtype; online
softmax over pages in order, so a row's bits depend on its own sequence alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .cpu_memory import dtype_tag, elements, exp_f32, i32_array, jit, load, store
from .cpu_vector import vector_load, vector_multiply_add, vector_store, vector_zero


def decode_attention(
    q_SHd: Tensor, k_pages: Tensor, v_pages: Tensor, tables_SN: Tensor, lens_S: Tensor, scale: float
) -> Tensor:
    """q_SHd [S, H, d]; k_pages [P, K, d, B] and v_pages [P, K, B, d] views with contiguous pages; tables_SN int32 page
    ids; lens_S int32 number of keys of each sequence, at least 1. Returns [S, H, d] of q's dtype."""
    S, H, d = q_SHd.shape
    P, K, B, _ = v_pages.shape
    out_SHd = torch.empty_like(q_SHd)
    _kernel(H // K, d, B)(
        q_SHd.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out_SHd.data_ptr(),
        tables_SN.data_ptr(),
        lens_S.data_ptr(),
        tables_SN.stride(0),
        v_pages.stride(0),
        S,
        K,
        P,
        np.float32(scale),
        dtype_tag(q_SHd),
    )
    return out_SHd


@jit
def _soften(scores, start, count, peak):
    """Turn raw scores into weights relative to the running peak, in place. Returns (new peak, factor by which earlier
    sums shrink, mass of these weights)."""
    top = peak
    for j in range(start, start + count):
        top = max(top, scores[j])
    total = np.float32(0.0)
    for j in range(start, start + count):
        scores[j] = exp_f32(scores[j] - top)
        total += scores[j]
    return top, exp_f32(peak - top), total


@cache
def _kernel(G: int, d: int, B: int) -> Callable[..., None]:
    """The kernel for G query heads per key/value head, head_dim d, B tokens a page. Its closure holds integers only:
    Numba's disk cache recognises nothing else from one process to the next."""
    width = math.gcd(B, d, 16)

    @jit
    def kernel(pq, pk, pv, pout, ptables, plens, table_stride, page_stride, S, K, P, scale, tag):
        q, out = elements(pq, S * K * G * d, tag), elements(pout, S * K * G * d, tag)
        k_pages, v_pages = elements(pk, P * page_stride, tag), elements(pv, P * page_stride, tag)
        tables, lens = i32_array(ptables, S * table_stride), i32_array(plens, S)
        query, sums = np.empty(G * d, np.float32), np.empty(G * d, np.float32)
        scores, peak, mass = np.empty(G * B, np.float32), np.empty(G, np.float32), np.empty(G, np.float32)
        one = np.float32(1.0)
        for pair in range(S * K):
            s, kh = pair // K, pair % K
            for i in range(G * d):
                query[i] = load(q, pair * G * d + i) * scale
                sums[i] = np.float32(0.0)
            for g in range(G):
                peak[g] = np.float32(-np.inf)
                mass[g] = np.float32(0.0)
            for n in range((lens[s] + B - 1) // B):
                count = min(B, lens[s] - n * B)
                at = tables[s * table_stride + n] * page_stride + kh * B * d
                for g in range(G):
                    for j in range(0, B, width):
                        even, odd = vector_zero(width), vector_zero(width)
                        for i in range(0, d, 2):
                            k = at + i * B + j
                            even = vector_multiply_add(query[g * d + i], vector_load(k_pages, k, width), even)
                            odd = vector_multiply_add(query[g * d + i + 1], vector_load(k_pages, k + B, width), odd)
                        vector_store(scores, g * B + j, vector_multiply_add(one, even, odd))
                for g in range(G):
                    peak[g], shrink, total = _soften(scores, g * B, count, peak[g])
                    mass[g] = mass[g] * shrink + total
                    if shrink != one:
                        for i in range(g * d, (g + 1) * d):
                            sums[i] *= shrink
                    for i in range(0, d, width):
                        part = vector_load(sums, g * d + i, width)
                        for j in range(count):
                            value = vector_load(v_pages, at + j * d + i, width)
                            part = vector_multiply_add(scores[g * B + j], value, part)
                        vector_store(sums, g * d + i, part)
            for g in range(G):
                for i in range(g * d, (g + 1) * d):
                    store(out, pair * G * d + i, sums[i] / mass[g])

    return kernel
