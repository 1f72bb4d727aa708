"""RMSNorm, alone and fused with the residual addition before it.

Shapes: T rows, D hidden. Source: Llama 4 normalises in float32, casts to the model dtype, then multiplies by the
weight. Knows nothing of layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu_memory import dtype_tag, elements, jit, load, store
from .precision import widened


def rms_norm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """y = cast(x / sqrt(mean(x^2) + eps)) * weight, the mean in float32."""
    x = widened(x_TD)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x_TD.dtype) * weight_D


def add_rms_norm_ref_(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual += delta` in place, then the norm of the sum."""
    residual_TD.add_(delta_TD)
    return rms_norm_ref(residual_TD, weight_D, eps)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row; x contiguous. Returns a new [T, D] tensor of x's dtype."""
    if x_TD.is_cuda:
        from .triton_norm import triton_rms_norm

        return triton_rms_norm(x_TD, weight_D, eps)
    out_TD = torch.empty_like(x_TD)
    T, D = x_TD.shape
    _norm(x_TD.data_ptr(), 0, weight_D.data_ptr(), out_TD.data_ptr(), T, D, np.float32(eps), dtype_tag(x_TD))
    return out_TD


def add_rms_norm_(residual_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`residual += delta` in place, then RMSNorm of the sum. All contiguous, of one dtype."""
    if residual_TD.is_cuda:
        from .triton_norm import triton_add_rms_norm_

        return triton_add_rms_norm_(residual_TD, delta_TD, weight_D, eps)
    out_TD = torch.empty_like(residual_TD)
    T, D = residual_TD.shape
    pointers = (residual_TD.data_ptr(), delta_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr())
    _norm(*pointers, T, D, np.float32(eps), dtype_tag(residual_TD))
    return out_TD


@jit
def _norm(px, pdelta, pw, pout, T, D, eps, tag):
    x, w, out = elements(px, T * D, tag), elements(pw, D, tag), elements(pout, T * D, tag)
    delta = elements(pdelta, T * D, tag)
    for t in range(T):
        base = t * D
        if pdelta != 0:
            for i in range(D):
                store(x, base + i, load(x, base + i) + load(delta, base + i))
        total = np.float32(0.0)
        for i in range(D):
            total += load(x, base + i) * load(x, base + i)
        r = np.float32(1.0) / np.sqrt(total / np.float32(D) + eps)
        for i in range(D):
            store(out, base + i, load(x, base + i) * r)
            store(out, base + i, load(out, base + i) * load(w, i))
