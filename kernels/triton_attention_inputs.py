"""What happens to q, k and v between their projection and attention, on GPUs, in one kernel: see `attention_inputs`.

Shapes: T tokens, K groups of G query heads and a key/value head each, D head_dim, DIM the same rounded up to a power of
two, B tokens a page. A program has the R rows of one token's group: its query heads, then its key."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .triton_tile import rounded
from .triton_tokens import e4m3_bits
from .variant import Variant


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """float32 as pages hold it: e4m3, of which pages have the bytes, or a wider type."""
    if dtype == tl.uint8:
        bits = e4m3_bits(tl.minimum(tl.maximum(x, -448.0), 448.0))
        return tl.where(x == x, bits, 0x7F).to(tl.uint8)
    return rounded(x, dtype)


@triton.jit
def inputs_kernel(
    qkv,
    q_out,
    k_pages,
    v_pages,
    slots,
    table,
    rows,
    q_scale,
    eps,
    page_stride,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Program (t * K + k). A token without a slot (negative) is not stored: it fills up the batch of a CUDA graph."""
    token, kv_head = tl.program_id(0).to(tl.int64) // K, tl.program_id(0) % K
    row, channel = tl.arange(0, R), tl.arange(0, DIM)
    head = tl.where(row < G, kv_head * G + row, K * G + kv_head)
    inside = (row <= G)[:, None] & (channel < D)[None, :]
    start = qkv + token * ((K * G + 2 * K) * D)
    x = tl.load(start + head[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        at = tl.load(rows + token) * D + channel
        cos, sin = tl.split(tl.reshape(tl.load(table + at, mask=channel < D, other=0.0), (DIM // 2, 2)))
        a, b = tl.split(tl.reshape(x, (R, DIM // 2, 2)))
        cos, sin = cos[None, :], sin[None, :]
        x = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (R, DIM))
    if NORMED:
        x = x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / D + eps))[:, None]
    if SCALED:
        x = tl.where((row < G)[:, None], x * tl.load(q_scale + token), x)
    to_q = q_out + token * (K * G * D) + head[:, None] * D + channel[None, :]
    tl.store(to_q, rounded(x, q_out.dtype.element_ty), mask=inside & (row < G)[:, None])
    slot = tl.load(slots + token)
    stored = channel < tl.where(slot >= 0, D, 0)
    page, offset = (slot // B) * page_stride, slot % B
    to_k = k_pages + page + (kv_head * D + channel) * B + offset
    to_k = tl.broadcast_to(to_k[None, :], (R, DIM))
    tl.store(to_k, _stored(x, k_pages.dtype.element_ty), mask=(row == G)[:, None] & stored[None, :])
    v = tl.load(start + (K * G + K + kv_head) * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    to_v = v_pages + page + (kv_head * B + offset) * D + channel
    tl.store(to_v, _stored(v, v_pages.dtype.element_ty), mask=stored)


def triton_attention_inputs(
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
    """`attention_inputs` on a GPU. Tokens with a negative slot are not stored."""
    _, K, B, D = v_pages.shape
    T, G = qkv_TN.shape[0], num_heads // K
    q_THd = torch.empty((T, num_heads, D), dtype=qkv_TN.dtype, device=qkv_TN.device)
    if k_pages.dtype is torch.float8_e4m3fn:
        k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    launch(
        inputs_kernel,
        (T * K,),
        qkv_TN,
        q_THd,
        k_pages,
        v_pages,
        slots_T,
        table_R,
        rows_T,
        q_scale_T,
        0.0 if qk_norm_eps is None else qk_norm_eps,
        v_pages.stride(0),
        K=K,
        G=G,
        D=D,
        DIM=triton.next_power_of_2(D),
        B=B,
        R=triton.next_power_of_2(G + 1),
        ROTATED=table_R is not None,
        NORMED=qk_norm_eps is not None,
        SCALED=q_scale_T is not None,
        num_warps=4,
    )
    return q_THd


def variants() -> list[Variant]:
    """Scout's and Maverick's local layers (with and without norm) and their global ones, for both types of pages."""
    signature = {
        "qkv": "*bf16",
        "q_out": "*bf16",
        "slots": "*i64",
        "table": "*fp32",
        "rows": "*i64",
        "q_scale": "*fp32",
        "eps": "fp32",
        "page_stride": "i32",
    }
    modes = {
        "rope and norm": {"ROTATED": True, "NORMED": True, "SCALED": False},
        "rope": {"ROTATED": True, "NORMED": False, "SCALED": False},
        "temperature": {"ROTATED": False, "NORMED": False, "SCALED": True},
    }
    aligned = ("qkv", "q_out", "k_pages", "v_pages", "slots", "table", "rows", "q_scale", "page_stride")
    return [
        Variant(
            f"attention inputs {mode}, pages of {B} {'bf16' if pages == '*bf16' else 'fp8'}",
            inputs_kernel,
            signature | {"k_pages": pages, "v_pages": pages},
            {"K": 8, "G": 5, "D": 128, "DIM": 128, "B": B, "R": 8} | flags,
            num_warps=4,
            divisible_by_16=aligned,
        )
        for (mode, flags), B, pages in product(modes.items(), (16, 64), ("*bf16", "*u8"))
    ]
