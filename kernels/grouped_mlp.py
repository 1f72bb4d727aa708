"""SwiGLU MLPs of many experts over rows grouped by expert.

Shapes: N rows sorted by expert, D hidden, E experts, F expert width. Knows nothing of routing or of where rows come
from."""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu_gemm import multiply_mlps
from .linear import Linear, rows_for
from .silu_mul import silu_mul, silu_mul_ref


class GpuExpert(NamedTuple):
    """The `TritonLinear`s of one expert."""

    gate_up: Any
    down: Any


class ExpertWeights:
    """One expert, laid out for its device. `gate_up` maps D to 2F (gate first), `down` maps F to D."""

    __slots__ = ("_table", "down", "gate_up", "on_gpu")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down
        self._table = _Table([(gate_up, down)])
        self.on_gpu: GpuExpert | None = None
        """What Triton kernels need of it; None on other devices."""
        if gate_up.on_gpu is not None and down.on_gpu is not None:
            self.on_gpu = GpuExpert(gate_up.on_gpu, down.on_gpu)

    def __call__(self, rows_ND: Tensor) -> Tensor:
        """down(silu(gate) * up) of each row."""
        if self.on_gpu is not None:
            kernels = importlib.import_module(".triton_experts", __package__)
            return kernels.mlp_triton(rows_ND, self.on_gpu, self.gate_up.exact)
        if not self._table.ready(rows_ND.dtype):
            return self.down(silu_mul(self.gate_up(rows_ND)))
        return self._table.run(rows_ND, array("q", (rows_ND.shape[0],)))


class ExpertGroup:
    """The experts of a layer, called together. Experts that are None must not get rows."""

    __slots__ = ("_experts", "_table")

    def __init__(self, experts: Sequence[ExpertWeights | None]) -> None:
        self._experts = list(experts)
        self._table = _Table([expert and (expert.gate_up, expert.down) for expert in experts])

    def __call__(self, rows_ND: Tensor, counts_E: Sequence[int]) -> Tensor:
        """Run each expert on its own rows: the first counts_E[0] rows through expert 0, and so on; with the bits that
        each would give alone. Returns [N, D] in the same order."""
        if self._table.ready(rows_ND.dtype):
            return self._table.run(rows_ND, array("q", counts_E))
        parts = []
        start = 0
        for expert, count in zip(self._experts, counts_E, strict=True):
            if count:
                assert expert is not None
                parts.append(expert(rows_ND[start : start + count]))
                start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def grouped_mlp_ref(
    rows_ND: Tensor, counts_E: Sequence[int], gate_up_E: Sequence[Tensor], down_E: Sequence[Tensor]
) -> Tensor:
    """Reference over plain [2F, D] and [D, F] weights."""
    parts = [
        silu_mul_ref(group @ gate_up.T) @ down.T
        for group, gate_up, down in zip(rows_ND.split(list(counts_E)), gate_up_E, down_E, strict=True)
    ]
    return torch.cat(parts)


def grouped_mlp(rows_ND: Tensor, counts_E: Sequence[int], experts: Sequence[ExpertWeights | None]) -> Tensor:
    """`ExpertGroup` for experts that meet only once."""
    return ExpertGroup(experts)(rows_ND, counts_E)


class _Table:
    """Where kernels find the packed weights of some experts."""

    __slots__ = ("_addresses", "_dtypes", "_first", "_weights")

    def __init__(self, weights: Sequence[tuple[Linear, Linear] | None]) -> None:
        self._weights = list(weights)
        self._addresses = array("q", (0,) * (2 * len(weights)))
        self._dtypes: frozenset[torch.dtype] = frozenset()
        present = (pair for pair in weights if pair is not None)
        self._first = next(present, None)

    def ready(self, dtype: torch.dtype) -> bool:
        """Whether all weights are packed; if so, they are prepared for rows of `dtype`."""
        if dtype in self._dtypes:
            return True
        for e, pair in enumerate(self._weights):
            for n, linear in enumerate(pair or ()):
                if linear.packed is None:
                    return False
                self._addresses[2 * e + n] = linear.packed.prepared(dtype)
        self._dtypes |= {dtype}
        return True

    def run(self, rows_ND: Tensor, counts_E: array[int]) -> Tensor:
        assert len(counts_E) == len(self._weights)
        if self._first is None:
            return rows_ND.new_empty(rows_ND.shape)
        gate_up, down = self._first
        assert gate_up.packed is not None
        assert down.packed is not None
        out_ND = rows_ND.new_empty((rows_ND.shape[0], down.out_features))
        x_ND = rows_for(gate_up.packed, rows_ND)
        width = max(gate_up.out_features // 2, down.packed.x_stride)
        multiply_mlps(self._addresses.buffer_info()[0], counts_E, width, x_ND, out_ND)
        return out_ND
