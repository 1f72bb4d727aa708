"""SwiGLU's gate: silu(gate) * up over the two halves of one row.

Shapes: N rows, F expert or MLP width. Knows nothing of experts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from .cpu_memory import dtype_tag, elements, jit, load, store
from .cpu_vector import vector_load, vector_silu_multiply, vector_store
from .precision import widened

_LANES = 16


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
    F = two_F // 2
    silu_mul_rows(gate_up_N2F.data_ptr(), out_NF.data_ptr(), N, F, F, dtype_tag(gate_up_N2F))
    return out_NF


@jit
def silu_mul_rows(pin, pout, N, F, stride, tag):
    """Rows of out are `stride` >= F numbers apart; zeros fill the rest."""
    x, out = elements(pin, N * 2 * F, tag), elements(pout, N * stride, tag)
    rest = np.zeros(2 * _LANES, np.float32)
    for n in range(N):
        gate, up, to = 2 * n * F, 2 * n * F + F, n * stride
        whole = F // _LANES * _LANES
        for i in range(0, whole, _LANES):
            values = vector_load(x, gate + i, _LANES), vector_load(x, up + i, _LANES)
            vector_store(out, to + i, vector_silu_multiply(values[0], values[1]))
        for i in range(whole, F):
            rest[i - whole], rest[_LANES + i - whole] = load(x, gate + i), load(x, up + i)
        if whole < F:
            values = vector_load(rest, 0, _LANES), vector_load(rest, _LANES, _LANES)
            vector_store(rest, 0, vector_silu_multiply(values[0], values[1]))
        for i in range(whole, F):
            store(out, to + i, rest[i - whole])
        for i in range(F, stride):
            store(out, to + i, np.float32(0.0))
