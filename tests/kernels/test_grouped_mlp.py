from __future__ import annotations

import weakref

import pytest
import torch

from herd.kernels.grouped_mlp import ExpertGroup, ExpertWeights, grouped_mlp, grouped_mlp_ref
from herd.kernels.linear import Linear
from herd.kernels.quantized import QuantKind
from herd.kernels.silu_mul import silu_mul

from .tolerances import assert_as_exact, noise
from .weights import KINDS, kind_id, made

DTYPES = [torch.float32, torch.bfloat16]
KINDS_APART: list[tuple[QuantKind | None, int]] = [(None, 0), ("int4", 32), ("int8", 0)]
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("threads", [1, 2])
def test_together_as_alone_and_as_three_operations(kind: tuple, dtype: torch.dtype, threads: int) -> None:
    """A shard runs single experts, a process of its own all at once: no bit may differ, nor from the parts."""
    hidden, width, counts = 256, 384, [1, 0, 5, 70, 2, 13]
    experts = [
        ExpertWeights(
            Linear(made(2 * width, hidden, kind, dtype, seed=e)), Linear(made(hidden, width, kind, dtype, seed=50 + e))
        )
        for e in range(len(counts))
    ]
    rows = noise(sum(counts), hidden, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = ExpertGroup(experts)(rows, counts)
    finally:
        torch.set_num_threads(before)
    parts = rows.split(counts)
    alone = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    steps = torch.cat([e.down(silu_mul(e.gate_up(part))) for e, part in zip(experts, parts, strict=True)])
    assert torch.equal(together, alone)
    assert torch.equal(together, steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_of_different_kinds(dtype: torch.dtype) -> None:
    experts = [
        ExpertWeights(Linear(made(128, 64, kind, dtype)), Linear(made(64, 64, kind, dtype, seed=2)))
        for kind in KINDS_APART
    ]
    rows = noise(9, 64, dtype=dtype)
    expected = torch.cat([expert(part) for expert, part in zip(experts, rows.split([2, 3, 4]), strict=True)])
    assert torch.equal(grouped_mlp(rows, [2, 3, 4], experts), expected)


def test_odd_widths() -> None:
    """Pairs of bfloat16 reach beyond the last channel of rows and of hidden rows."""
    gate_up, down = noise(10, 7, dtype=torch.bfloat16), noise(7, 5, dtype=torch.bfloat16, seed=1)
    rows = noise(4, 7, dtype=torch.bfloat16, seed=2)
    out = ExpertWeights(Linear(gate_up), Linear(down))(rows)
    truth = grouped_mlp_ref(rows.double(), [4], [gate_up.double()], [down.double()])
    assert_as_exact(out, grouped_mlp_ref(rows, [4], [gate_up], [down]), truth)


def test_no_rows_and_no_experts() -> None:
    gate_up, down = weights(2, torch.bfloat16)
    experts = packed(gate_up, down)
    rows = noise(0, D, dtype=torch.bfloat16)
    assert grouped_mlp(rows, [0, 0], experts).shape == (0, D)
    assert grouped_mlp(rows, [0, 0], [None, None]).shape == (0, D)
    assert experts[0](rows).shape == (0, D)


def test_an_experts_memory_is_freed_with_it() -> None:
    """Without waiting for the collector of cycles: experts move between shards."""
    gate_up, down = weights(1, torch.bfloat16)
    (expert,) = packed(gate_up, down)
    assert expert.gate_up.packed is not None
    memory = weakref.ref(expert.gate_up.packed)
    del expert
    assert memory() is None
