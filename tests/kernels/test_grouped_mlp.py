from __future__ import annotations

import pytest
import torch

from herd.kernels.grouped_mlp import ExpertWeights, grouped_mlp, grouped_mlp_ref
from herd.kernels.linear import Linear

from .tolerances import assert_as_exact, noise

DTYPES = [torch.float32, torch.bfloat16]
D, F = 40, 24


def weights(E: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    gate_up = [noise(2 * F, D, dtype=dtype, seed=e, scale=D**-0.5) for e in range(E)]
    return gate_up, [noise(D, F, dtype=dtype, seed=100 + e, scale=F**-0.5) for e in range(E)]


def packed(gate_up: list[torch.Tensor], down: list[torch.Tensor]) -> list[ExpertWeights]:
    return [ExpertWeights(Linear(g), Linear(d)) for g, d in zip(gate_up, down, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([1], id="one row, one expert"),
        pytest.param([0, 0, 9, 0], id="all rows on one of four"),
        pytest.param([3, 0, 1, 7, 0, 2, 0], id="empty first, last and between"),
        pytest.param([2, 3, 5, 7, 11], id="prime counts"),
        pytest.param([40, 1], id="many and one"),
    ],
)
def test_grouped_mlp(counts: list[int], dtype: torch.dtype) -> None:
    gate_up, down = weights(len(counts), dtype)
    rows = noise(sum(counts), D, dtype=dtype, seed=7)
    out = grouped_mlp(rows, counts, packed(gate_up, down))
    reference = grouped_mlp_ref(rows, counts, gate_up, down)
    truth = grouped_mlp_ref(rows.double(), counts, [w.double() for w in gate_up], [w.double() for w in down])
    assert_as_exact(out, reference, truth)


def test_experts_without_rows_are_not_touched() -> None:
    gate_up, down = weights(1, torch.float32)
    (expert,) = packed(gate_up, down)
    rows = noise(4, D)
    assert torch.equal(grouped_mlp(rows, [0, 4, 0], [None, expert, None]), expert(rows))


def test_each_row_goes_through_its_own_expert() -> None:
    """Expert e multiplies by e + 1: silu(20) is 20 to float32's last place, so weights of 1/20 pick out the factor."""
    experts = []
    for e in range(3):
        gate_up = torch.tensor([[20.0], [0.05 * (e + 1)]])
        experts.append(ExpertWeights(Linear(gate_up), Linear(torch.ones(1, 1))))
    out = grouped_mlp(torch.ones(6, 1), [2, 1, 3], experts)
    torch.testing.assert_close(out[:, 0], torch.tensor([1.0, 1, 2, 3, 3, 3]), atol=1e-5, rtol=0)
