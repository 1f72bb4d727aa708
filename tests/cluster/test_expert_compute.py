"""What a shard computes: requests that wait together are answered together, each row by its own expert."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from herd.cluster.expert_compute import ExpertCompute
from herd.cluster.expert_frames import Kind
from herd.cluster.transport import Request
from herd.kernels.grouped_mlp import ExpertWeights
from herd.kernels.linear import Linear

HIDDEN, WIDTH = 16, 24
HOSTED = [(0, 1), (0, 2), (3, 0)]
NOW_S = 100.0


@dataclass(eq=False)
class Asked:
    """A request without a peer; keeps what it was answered."""

    layer: int
    groups: list[tuple[int, int]]
    rows_ND: Tensor
    epoch: int = 7
    deadline_s: float = NOW_S + 1
    replies: list[Kind] = field(default_factory=list)

    def reply(self, kind: Kind, message: str = "") -> None:
        self.replies.append(kind)


def weights(seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(2 * WIDTH, HIDDEN, generator=generator)
    return ExpertWeights(Linear(gate_up), Linear(torch.randn(HIDDEN, WIDTH, generator=generator)))


EXPERTS = {expert: weights(i) for i, expert in enumerate(HOSTED)}


@pytest.fixture
def compute() -> ExpertCompute:
    return ExpertCompute(EXPERTS, clock=lambda: NOW_S)


def ask(layer: int, *groups: tuple[int, int], seed: int = 0, **more: Any) -> Asked:
    rows = sum(count for _, count in groups)
    generator = torch.Generator().manual_seed(seed)
    return Asked(
        **{"layer": layer, "groups": list(groups), "rows_ND": torch.randn(rows, HIDDEN, generator=generator)} | more
    )


def expected(asked: Asked) -> Tensor:
    """Each group alone through its expert."""
    parts = asked.rows_ND.split([count for _, count in asked.groups])
    pairs = zip(asked.groups, parts, strict=True)
    return torch.cat([EXPERTS[asked.layer, expert](part.clone()) for (expert, _), part in pairs])


def run(compute: ExpertCompute, *asked: Asked) -> deque[Request]:
    """One call with these waiting; returns what still waits."""
    waiting = cast("deque[Request]", deque(asked))
    compute(waiting)
    return waiting


def test_rows_go_through_their_experts_in_place(compute: ExpertCompute) -> None:
    asked = ask(0, (1, 3), (2, 2))
    wanted = expected(asked)
    assert not run(compute, asked)
    assert asked.replies == [Kind.RESULT]
    assert torch.equal(asked.rows_ND, wanted)


def test_requests_for_one_layer_are_computed_together_with_the_same_bits(compute: ExpertCompute) -> None:
    asked = [ask(0, (1, 1), (2, 4), seed=1), ask(0, (2, 1), seed=2), ask(0, (1, 7), seed=3)]
    wanted = [expected(a) for a in asked]
    assert not run(compute, *asked)
    for a, rows_ND in zip(asked, wanted, strict=True):
        assert a.replies == [Kind.RESULT]
        assert torch.equal(a.rows_ND, rows_ND)
    assert (compute.load()["calls"], compute.load()["merged_calls"]) == (3, 2)


def test_the_oldest_layer_goes_first_and_others_wait(compute: ExpertCompute) -> None:
    first, other, third = ask(0, (1, 1)), ask(3, (0, 1)), ask(0, (2, 1))
    waiting = run(compute, first, other, third)
    assert list(waiting) == [other]
    assert (first.replies, other.replies, third.replies) == ([Kind.RESULT], [], [Kind.RESULT])


def test_experts_that_are_not_here_are_refused_alone(compute: ExpertCompute) -> None:
    good, bad = ask(0, (1, 1)), ask(0, (1, 1), (0, 1))
    before = bad.rows_ND.clone()
    run(compute, good, bad)
    assert (good.replies, bad.replies) == ([Kind.RESULT], [Kind.STALE_MAP])
    assert torch.equal(bad.rows_ND, before)


def test_callers_with_a_map_from_before_this_shard_are_refused(compute: ExpertCompute) -> None:
    compute.entered_epoch = 8
    old, new = ask(0, (1, 1), epoch=7), ask(0, (1, 1), epoch=8)
    run(compute, old, new)
    assert (old.replies, new.replies) == ([Kind.STALE_MAP], [Kind.RESULT])
    assert compute.load()["stale_calls"] == 1


def test_calls_that_came_too_late_are_not_computed(compute: ExpertCompute) -> None:
    late = ask(0, (1, 1), deadline_s=NOW_S - 1)
    run(compute, late)
    assert late.replies == [Kind.BUSY]
    assert (compute.load()["expired_calls"], compute.load()["rows"]) == (1, 0)


def test_a_defect_is_an_error_to_its_callers_and_no_more(compute: ExpertCompute) -> None:
    broken = ask(0, (1, 2))
    broken.rows_ND = torch.zeros(2, HIDDEN + 1)
    run(compute, broken)
    good = ask(0, (1, 2))
    run(compute, good)
    assert (broken.replies, good.replies) == ([Kind.ERROR], [Kind.RESULT])
    assert compute.load()["faults"] == 1


def test_faults_in_a_row_are_told_from_faults(compute: ExpertCompute) -> None:
    def broken() -> Asked:
        return ask(0, (1, 2), rows_ND=torch.zeros(2, HIDDEN + 1))

    counts = []
    for asked in (broken(), broken(), ask(0, (1, 2), epoch=-1), broken(), ask(0, (1, 2)), broken()):
        run(compute, asked)
        counts.append(compute.faults_in_a_row)
    assert counts == [1, 2, 2, 3, 0, 1]  # a call that is refused says nothing of the experts
    run(compute, broken(), broken())  # together
    assert compute.faults_in_a_row == 2


def test_load_counts_rows_by_expert(compute: ExpertCompute) -> None:
    run(compute, ask(0, (1, 3), (2, 2)))
    run(compute, ask(0, (2, 2)))
    run(compute, ask(3, (0, 1)))
    load = compute.load()
    assert load["experts"] == [[0, [3, 4]], [3, [1]]]
    assert load["rows"] == 8
