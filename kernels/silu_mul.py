"""SwiGLU's gate: silu(gate) * up over the two halves of one row.

Shapes: N rows, F expert or MLP width. Knows nothing of experts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from .cpu_memory import dtype_tag, elements, exp_f32, jit, load, store
from .precision import widened


def silu_mul_ref(gate_up_N2F: Tensor) -> Tensor:
    """silu(first half) * second half, in float32, rounded once."""
    gate, up = widened(gate_up_N2F).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up_N2F.dtype)


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """[N, 2F] contiguous -> [N, F] of the same dtype."""
    if gate_up_N2F.is_cuda:
        return silu_mul_ref(gate_up_N2F)
    N, two_F = gate_up_N2F.shape
    out_NF = torch.empty((N, two_F // 2), dtype=gate_up_N2F.dtype)
    _silu_mul(gate_up_N2F.data_ptr(), out_NF.data_ptr(), N, two_F // 2, dtype_tag(gate_up_N2F))
    return out_NF


@jit
def _silu_mul(pin, pout, N, F, tag):
    x, out = elements(pin, N * 2 * F, tag), elements(pout, N * F, tag)
    for n in range(N):
        for i in range(F):
            gate = load(x, n * 2 * F + i)
            store(out, n * F + i, gate / (np.float32(1.0) + exp_f32(-gate)) * load(x, n * 2 * F + F + i))
