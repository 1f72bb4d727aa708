from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.route import (
    Route,
    combine_,
    combine_ref_,
    gather_scaled,
    gather_scaled_ref,
    route,
    route_ref,
)

from .tolerances import assert_as_exact, noise

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, 1, id="one token, one expert"),
    pytest.param(1, 16, 1, id="one token"),
    pytest.param(17, 16, 1, id="Scout"),
    pytest.param(13, 128, 1, id="Maverick, most experts empty"),
    pytest.param(31, 7, 2, id="prime counts, k = 2"),
    pytest.param(5, 4, 4, id="every expert"),
]


def experts_of(plan: Route) -> Tensor:
    """The expert of each routed row."""
    counts = torch.tensor(plan.counts_E)
    return torch.arange(len(counts)).repeat_interleave(counts)


def check_invariants(plan: Route, T: int, E: int, k: int) -> None:
    assert len(plan.counts_E) == E
    assert sum(plan.counts_E) == T * k == len(plan.tokens_N) == len(plan.scores_N)
    assert sorted(plan.rows_TK.flatten().tolist()) == list(range(T * k)), "each row belongs to one token"
    tokens_TK = plan.tokens_N[plan.rows_TK.long()]
    assert torch.equal(tokens_TK, torch.arange(T).int()[:, None].expand(T, k)), "and to the token that it came from"
    experts_TK = experts_of(plan)[plan.rows_TK.long()]
    assert (experts_TK.diff(dim=1) > 0).all(), "k different experts, in ascending order"
    for end, count in zip(accumulate(plan.counts_E), plan.counts_E, strict=True):
        assert (plan.tokens_N[end - count : end].diff() > 0).all(), "tokens ascend within an expert"


def assert_same(plan: Route, reference: Route) -> None:
    assert plan.counts_E == reference.counts_E
    assert torch.equal(plan.tokens_N, reference.tokens_N)
    assert torch.equal(plan.rows_TK, reference.rows_TK)
    assert plan.tokens_N.dtype == plan.rows_TK.dtype == torch.int32
    assert plan.scores_N.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "k"), SHAPES)
def test_route(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    logits = noise(T, E, dtype=dtype, scale=3.0)
    plan, reference = route(logits, k), route_ref(logits, k)
    check_invariants(plan, T, E, k)
    assert_same(plan, reference)
    truth = torch.sigmoid(logits.double()[plan.tokens_N.long(), experts_of(plan)])
    assert_as_exact(plan.scores_N.to(dtype), reference.scores_N.to(dtype), truth)
    assert torch.equal(plan.scores_N, plan.scores_N.to(dtype).float()), "scores are rounded to the model's dtype"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2, 2, 0], [0, 0, 0, 0], [-1, 3, 0, 3], [0.0, -0.0, -1, 0.0]], dtype=dtype)
    for k, expected in ((1, [1, 0, 1, 0]), (2, [1, 2, 0, 1, 1, 3, 0, 1]), (3, [0, 1, 2, 0, 1, 2, 1, 2, 3, 0, 1, 3])):
        plan = route(logits, k)
        assert experts_of(plan)[plan.rows_TK.long()].flatten().tolist() == expected
        assert_same(plan, route_ref(logits, k))


def test_all_tokens_on_one_expert() -> None:
    logits = torch.zeros(9, 5)
    logits[:, 3] = 1
    plan = route(logits, 1)
    assert plan.counts_E == [0, 0, 0, 9, 0]
    assert plan.tokens_N.tolist() == list(range(9))
    torch.testing.assert_close(plan.scores_N, torch.sigmoid(torch.ones(9)))


def test_scores_far_out() -> None:
    logits = torch.tensor([[200.0], [-200.0], [88.5], [-88.5], [0.0]])
    torch.testing.assert_close(route(logits, 1).scores_N, torch.sigmoid(logits[:, 0]), atol=1e-37, rtol=1e-6)


def test_a_token_without_numbers_is_still_routed() -> None:
    """It must not take others down: NaN reaches its own rows only."""
    logits = noise(3, 4)
    logits[1] = float("nan")
    plan = route(logits, 2)
    check_invariants(plan, 3, 4, 2)
    assert plan.scores_N.isnan().tolist() == (plan.tokens_N == 1).tolist()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_routing_is_that_of_the_reference(data: st.DataObject) -> None:
    """Small integers, so that ties are frequent."""
    T, E = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, E))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=T * E, max_size=T * E))
    logits = torch.tensor(values, dtype=torch.float32).view(T, E)
    plan = route(logits, k)
    check_invariants(plan, T, E, k)
    assert_same(plan, route_ref(logits, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "k"), SHAPES)
def test_gather_scaled(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    x, plan = noise(T, 33, dtype=dtype), route(noise(T, E, dtype=dtype, seed=1), k)
    out = gather_scaled(x, plan)
    assert torch.equal(out, gather_scaled_ref(x, plan)), "one product, rounded once"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "k"), SHAPES)
def test_combine(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    plan = route(noise(T, E, dtype=dtype), k)
    shared, rows = noise(T, 33, dtype=dtype, seed=1), noise(T * k, 33, dtype=dtype, seed=2)
    reference = combine_ref_(shared.clone(), rows, plan)
    truth = combine_ref_(shared.double(), rows.double(), plan)
    out = combine_(shared, rows, plan)
    assert out is shared
    assert_as_exact(out, reference, truth)


def test_gather_then_combine_is_a_weighted_sum() -> None:
    """With experts that do nothing, a token gets itself back times the sum of its scores."""
    x, plan = noise(11, 8), route(noise(11, 5, seed=1), 3)
    total_T = plan.scores_N[plan.rows_TK.long()].sum(1)
    out = combine_(torch.zeros_like(x), gather_scaled(x, plan), plan)
    torch.testing.assert_close(out, x * total_T[:, None])


def test_a_token_is_routed_alike_alone_and_in_company() -> None:
    x, logits = noise(9, 16), noise(9, 6, seed=1)
    plan = route(logits, 2)
    together = combine_(torch.zeros(9, 16), gather_scaled(x, plan), plan)
    for t in range(9):
        alone = route(logits[t : t + 1].contiguous(), 2)
        row = combine_(torch.zeros(1, 16), gather_scaled(x[t : t + 1].contiguous(), alone), alone)
        assert torch.equal(row[0], together[t])
