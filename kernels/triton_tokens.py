"""Rows of activations as e4m3 with one scale each, on a GPU. Knows nothing of products.

Shapes: N rows, D channels."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .variant import Variant

_LARGEST = 448.0
_SMALLEST_SCALE = 1e-12
_BLOCK = 4096
"""Channels in registers at a time."""


def fp8_tokens_ref(x_ND: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Each row as float8_e4m3fn [N, D] times a float32 scale [N]: the row's largest value, or `cap` if that is smaller,
    becomes 448, and what lies beyond is clipped. (Meta's own fp8 release caps at 1200.)"""
    wide = x_ND.double() if x_ND.dtype is torch.float64 else x_ND.float()
    largest_N = wide.abs().amax(-1).clamp(max=float("inf") if cap is None else cap)
    scale_N = (largest_N / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (wide / scale_N[:, None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale_N


def fp8_tokens(x_ND: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """As `fp8_tokens_ref`; x contiguous. The first result is uint8, e4m3's bits: not every GPU has the type."""
    N, D = x_ND.shape
    q_ND = torch.empty((N, D), dtype=torch.uint8, device=x_ND.device)
    scale_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    launch(
        tokens_kernel, (N,), x_ND, q_ND, scale_N, D, float("inf") if cap is None else cap,
        BLOCK=min(_BLOCK, triton.next_power_of_2(D)), num_warps=8,
    )  # fmt: skip
    return q_ND, scale_N


@triton.jit
def e4m3_bits(x):
    """float32 in -448..448 -> uint8, to nearest, ties to even. By integers, so that every platform agrees."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the values are multiples of 2^-9: adding 2^14 rounds to them, and leaves their number in the low bits.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    return (((bits >> 24) & 0x80) | tl.where(size < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def tokens_kernel(x, q, scales, D, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    unordered = tl.zeros([BLOCK], tl.int32)
    for start in range(0, D, BLOCK):
        value = tl.load(x + row * D + start + i, mask=start + i < D, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        unordered |= (value != value).to(tl.int32)
    scale = tl.maximum(tl.div_rn(tl.minimum(tl.max(largest, 0), cap), 448.0), 1e-12)
    # e4m3 as made below has no NaN; the scale keeps it visible.
    tl.store(scales + row, tl.where(tl.max(unordered, 0) > 0, float("nan"), scale))
    for start in range(0, D, BLOCK):
        value = tl.load(x + row * D + start + i, mask=start + i < D, other=0.0).to(tl.float32)
        value = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + scale)
        value = tl.minimum(tl.maximum(value, -448.0), 448.0)
        tl.store(q + row * D + start + i, e4m3_bits(value), mask=start + i < D)


def variants() -> list[Variant]:
    return [
        Variant(
            f"tokens {block}",
            tokens_kernel,
            {"x": "*bf16", "q": "*u8", "scales": "*fp32", "D": "i32", "cap": "fp32"},
            {"BLOCK": block},
            num_warps=8,
            divisible_by_16=("x", "q", "scales", "D"),
        )
        for block in (1024, _BLOCK)
    ]
