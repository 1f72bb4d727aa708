"""RMSNorm on GPUs, alone and fused with the residual addition before it: see `rms_norm`. A program has one row, and its
sum has one order for each width.

Shapes: T rows, D hidden, BLOCK the same rounded up to a power of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .triton_tile import rounded
from .variant import Variant


@triton.jit
def norm_kernel(x_ptr, delta, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr, ADDED: tl.constexpr):
    """Program (t). ADDED: x becomes x + delta first, in place."""
    at = tl.program_id(0).to(tl.int64) * D
    channel = tl.arange(0, BLOCK)
    inside = channel < D
    number: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at + channel, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        total = rounded(x + tl.load(delta + at + channel, mask=inside, other=0.0).to(tl.float32), number)
        tl.store(x_ptr + at + channel, total, mask=inside)
        x = total.to(tl.float32)
    y = x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) / D + eps))
    y = rounded(y, number).to(tl.float32) * w
    tl.store(out + at + channel, rounded(y, number), mask=inside)


def triton_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` on a GPU."""
    return _launch(x_TD, None, weight_D, eps)


def triton_add_rms_norm_(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`add_rms_norm_` on a GPU."""
    return _launch(residual_TD, delta_TD, weight_D, eps)


def _launch(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    out_TD = torch.empty_like(x_TD)
    T, D = x_TD.shape
    launch(
        norm_kernel,
        (T,),
        x_TD,
        x_TD if delta_TD is None else delta_TD,
        weight_D,
        out_TD,
        eps,
        D=D,
        BLOCK=triton.next_power_of_2(D),
        ADDED=delta_TD is not None,
        num_warps=_warps(D),
    )
    return out_TD


def _warps(D: int) -> int:
    """Of 32 lanes with 16 channels or more each."""
    return min(16, max(1, triton.next_power_of_2(D) // 512))


def variants() -> list[Variant]:
    signature = {"x_ptr": "*bf16", "delta": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"}
    return [
        Variant(
            f"norm of {D}{' after addition' if added else ''}",
            norm_kernel,
            signature,
            {"D": D, "BLOCK": triton.next_power_of_2(D), "ADDED": added},
            num_warps=_warps(D),
            divisible_by_16=("x_ptr", "delta", "weight", "out"),
        )
        for D in (576, 5120, 14336)
        for added in (False, True)
    ]
