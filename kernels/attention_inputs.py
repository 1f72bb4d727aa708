"""What happens to q, k and v between their projection and attention, as one op: rotary positions and qk norm (RoPE
layers) or temperature tuning (NoPE layers), and the write of k and v into their cache pages.

Shapes: T tokens, H query heads, K key/value heads, d head_dim, R rows of the rotary table, P pages, B tokens a page.
Rotary pairs are interleaved (2j, 2j+1), the order of Llama 4 checkpoints. Knows nothing of layers or requests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_memory import dtype_tag, elements, f32_array, i64_array, jit, load, store
from .precision import widened


def rope_table(frequencies: list[float], num_positions: int) -> Tensor:
    """[R, d/2, 2] float32 of (cos, sin), angles in double precision."""
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float().contiguous()


def rope_ref(x_THd: Tensor, table_R: Tensor, rows_T: Tensor) -> Tensor:
    """Rotate interleaved pairs by the table's rows, in the precision of x."""
    cos, sin = table_R[rows_T][:, None].unbind(-1)
    a, b = x_THd[..., 0::2], x_THd[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def attention_inputs_ref(
    qkv_TN: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots_T: Tensor,
    *,
    num_heads: int,
    table_R: Tensor | None,
    rows_T: Tensor | None,
    q_scale_T: Tensor | None,
    qk_norm_eps: float | None,
) -> Tensor:
    """Reference of `attention_inputs`: float32 (or float64) throughout, rounded once at the end."""
    K, B, d = v_pages.shape[1:]
    q, k, v = qkv_TN.view(qkv_TN.shape[0], -1, d).split((num_heads, K, K), dim=1)
    q32, k32 = widened(q), widened(k)
    if table_R is not None:
        assert rows_T is not None
        q32, k32 = rope_ref(q32, table_R, rows_T), rope_ref(k32, table_R, rows_T)
    if qk_norm_eps is not None:
        q32 = q32 * torch.rsqrt(q32.pow(2).mean(-1, keepdim=True) + qk_norm_eps)
        k32 = k32 * torch.rsqrt(k32.pow(2).mean(-1, keepdim=True) + qk_norm_eps)
    if q_scale_T is not None:
        q32 = q32 * q_scale_T[:, None, None]
    pages, offsets = slots_T.long() // B, slots_T.long() % B
    k_pages[pages, :, :, offsets] = _stored(k32, k_pages.dtype)
    v_pages[pages, :, offsets] = _stored(v, v_pages.dtype)
    return q32.to(qkv_TN.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As pages hold it. fp8 has neither infinities nor a scale: what is larger becomes the largest."""
    if dtype is torch.float8_e4m3fn:
        x = x.clamp(-448.0, 448.0)
    return x.to(dtype)


def attention_inputs(
    qkv_TN: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots_T: Tensor,
    *,
    num_heads: int,
    table_R: Tensor | None,
    rows_T: Tensor | None,
    q_scale_T: Tensor | None,
    qk_norm_eps: float | None,
) -> Tensor:
    """Prepare attention of T tokens and store their keys and values.

    qkv_TN [T, (H + 2K) d]. k_pages [P, K, d, B] (transposed inside a page) and v_pages [P, K, B, d] are views with
    contiguous pages, written in place at slots_T int64 = page * B + offset (negative: nowhere); of qkv's dtype or, on
    GPUs, float8_e4m3fn.
    table_R of `rope_table` with rows_T int64, or None for no rotation; q_scale_T float32 factor of q, or None;
    qk_norm_eps, or None for no norm. Returns q [T, H, d].
    """
    if qkv_TN.is_cuda:
        from .triton_attention_inputs import triton_attention_inputs

        return triton_attention_inputs(
            qkv_TN,
            k_pages,
            v_pages,
            slots_T,
            num_heads=num_heads,
            table_R=table_R,
            rows_T=rows_T,
            q_scale_T=q_scale_T,
            qk_norm_eps=qk_norm_eps,
        )
    T = qkv_TN.shape[0]
    P, K, B, d = v_pages.shape
    q_THd = torch.empty((T, num_heads, d), dtype=qkv_TN.dtype)
    _inputs(
        qkv_TN.data_ptr(),
        q_THd.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        v_pages.stride(0),
        slots_T.data_ptr(),
        0 if table_R is None else table_R.data_ptr(),
        0 if rows_T is None else rows_T.data_ptr(),
        0 if q_scale_T is None else q_scale_T.data_ptr(),
        np.float32(-1.0 if qk_norm_eps is None else qk_norm_eps),
        T,
        num_heads,
        K,
        d,
        B,
        0 if table_R is None else table_R.shape[0],
        P,
        dtype_tag(qkv_TN),
    )
    return q_THd


@jit
def _transform(head, d, ptable, row, num_rows, eps, scale):
    """One head in float32, in place: rotate, normalise, scale."""
    if ptable != 0:
        table = f32_array(ptable, num_rows * d)
        for j in range(d // 2):
            cos, sin = table[row * d + 2 * j], table[row * d + 2 * j + 1]
            a, b = head[2 * j], head[2 * j + 1]
            head[2 * j] = a * cos - b * sin
            head[2 * j + 1] = a * sin + b * cos
    factor = scale
    if eps >= np.float32(0.0):
        total = np.float32(0.0)
        for i in range(d):
            total += head[i] * head[i]
        factor = scale / np.sqrt(total / np.float32(d) + eps)
    if factor != np.float32(1.0):
        for i in range(d):
            head[i] *= factor


@jit
def _inputs(pqkv, pq, pk, pv, page_stride, pslots, ptable, prows, pscale, eps, T, H, K, d, B, num_rows, P, tag):
    N = (H + 2 * K) * d
    qkv, q = elements(pqkv, T * N, tag), elements(pq, T * H * d, tag)
    k_pages, v_pages = elements(pk, P * page_stride, tag), elements(pv, P * page_stride, tag)
    slots = i64_array(pslots, T)
    head = np.empty(d, np.float32)
    for t in range(T):
        row = i64_array(prows, T)[t] if prows != 0 else 0
        scale = f32_array(pscale, T)[t] if pscale != 0 else np.float32(1.0)
        page, offset = (slots[t] // B) * page_stride, slots[t] % B
        for h in range(H + K):
            base = t * N + h * d
            for i in range(d):
                head[i] = load(qkv, base + i)
            _transform(head, d, ptable, row, num_rows, eps, scale if h < H else np.float32(1.0))
            if h < H:
                for i in range(d):
                    store(q, (t * H + h) * d + i, head[i])
            elif slots[t] >= 0:
                for i in range(d):
                    store(k_pages, page + ((h - H) * d + i) * B + offset, head[i])
        for h in range(K if slots[t] >= 0 else 0):
            for i in range(d):
                v_pages[page + (h * B + offset) * d + i] = qkv[t * N + (H + K + h) * d + i]
