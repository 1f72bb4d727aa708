"""SwiGLU MLPs of many experts over rows grouped by expert.

Shapes: N rows sorted by expert, D hidden, E experts, F expert width. Knows nothing of routing or of where rows come
from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear import Linear
from .silu_mul import silu_mul, silu_mul_ref


class ExpertWeights:
    """One expert, laid out for its device. `gate_up` maps D to 2F (gate first), `down` maps F to D."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, rows_ND: Tensor) -> Tensor:
        """down(silu(gate) * up) of each row."""
        return self.down(silu_mul(self.gate_up(rows_ND)))


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
    """Run each expert on its own rows: the first counts_E[0] rows through expert 0, and so on. Experts without rows
    are not touched and may be None. Returns [N, D] in the same order."""
    parts = []
    start = 0
    for expert, count in zip(experts, counts_E, strict=True):
        if count:
            assert expert is not None
            parts.append(expert(rows_ND[start : start + count]))
            start += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)
