"""Routing on a GPU, or interpreted: the same rows as the reference, sorted and deterministic. A block has 32 tokens."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.route import Route, combine_ref_, gather_scaled_ref, route_ref
from herd.kernels.triton_route import DeviceRoute, combine_triton_, gather_scaled_triton, route_device

from ..kernels.tolerances import assert_as_exact, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    pytest.param(1, 1, 1, id="one token, one expert"),
    pytest.param(1, 16, 1, id="one token"),
    pytest.param(17, 16, 1, id="Scout"),
    pytest.param(33, 16, 1, id="a token beyond the first block"),
    pytest.param(13, 128, 1, id="Maverick, most experts empty"),
    pytest.param(31, 7, 2, id="prime counts, k = 2"),
    pytest.param(5, 4, 4, id="every expert"),
    pytest.param(70, 5, 3, id="three blocks, k = 3"),
    pytest.param(1100, 3, 1, id="more blocks than a block has tokens"),
]


def check(logits: Tensor, k: int) -> DeviceRoute:
    route, reference = route_device(logits, k), route_ref(logits, k)
    assert torch.equal(route.tokens_N, reference.tokens_N)
    assert torch.equal(route.rows_TK, reference.rows_TK)
    assert route.counts_E.tolist() == reference.counts_E
    assert route.offsets_E1.tolist() == list(accumulate(reference.counts_E, initial=0))
    integers = (route.tokens_N, route.rows_TK, route.counts_E, route.offsets_E1)
    assert all(tensor.dtype == torch.int32 for tensor in integers)
    return route


def experts_of(route: DeviceRoute) -> Tensor:
    """The expert of each routed row."""
    return torch.arange(len(route.counts_E), device=DEVICE).repeat_interleave(route.counts_E.long())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "k"), SHAPES)
def test_route(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    logits = noise(T, E, dtype=dtype, scale=3.0).to(DEVICE)
    route = check(logits, k)
    truth = torch.sigmoid(logits.double()[route.tokens_N.long(), experts_of(route)])
    assert_as_exact(route.scores_N.to(dtype), route_ref(logits, k).scores_N.to(dtype), truth)
    assert torch.equal(route.scores_N, route.scores_N.to(dtype).float()), "scores are rounded to the model's dtype"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2, 2, 0], [0, 0, 0, 0], [-1, 3, 0, 3], [0.0, -0.0, -1, 0.0]], dtype=dtype).to(DEVICE)
    for k, expected in ((1, [1, 0, 1, 0]), (2, [1, 2, 0, 1, 1, 3, 0, 1]), (3, [0, 1, 2, 0, 1, 2, 1, 2, 3, 0, 1, 3])):
        route = check(logits, k)
        assert experts_of(route)[route.rows_TK.long()].flatten().tolist() == expected


def test_all_tokens_on_one_expert() -> None:
    logits = torch.zeros(90, 5, device=DEVICE)
    logits[:, 3] = 1
    assert check(logits, 1).tokens_N.tolist() == list(range(90))


def test_scores_far_out() -> None:
    logits = torch.tensor([[200.0], [-200.0], [88.5], [-88.5], [0.0]], device=DEVICE)
    torch.testing.assert_close(check(logits, 1).scores_N, torch.sigmoid(logits[:, 0]), atol=1e-37, rtol=1e-5)


def test_a_token_without_numbers_is_still_routed() -> None:
    """It must not take others down: NaN reaches its own rows only, and infinities are numbers."""
    logits = noise(4, 4).to(DEVICE)
    logits[1] = float("nan")
    logits[2, 2] = float("nan")
    logits[3] = -float("inf")
    route = check(logits, 2)
    assert route.scores_N[route.rows_TK.long()].isnan().any(dim=1).tolist() == [False, True, True, False]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_routing_is_that_of_the_reference(data: st.DataObject) -> None:
    """Small integers, so that ties are frequent."""
    T, E = data.draw(st.sampled_from([1, 2, 7, 33, 40])), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    check(torch.randint(-2, 3, (T, E), generator=generator).float().to(DEVICE), data.draw(st.integers(1, E)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("T", "E", "k"), SHAPES[:-1:2])
def test_there_and_back(T: int, E: int, k: int, dtype: torch.dtype) -> None:
    """1,030 channels are more than a program moves."""
    route = route_device(noise(T, E, dtype=dtype, seed=1).to(DEVICE), k)
    plan = Route(route.tokens_N, route.scores_N, route.rows_TK, route.counts_E.tolist())
    x, shared = (noise(T, 1030, dtype=dtype, seed=seed).to(DEVICE) for seed in (2, 3))
    rows = gather_scaled_triton(x, route.tokens_N, route.scores_N)
    assert torch.equal(rows, gather_scaled_ref(x, plan)), "one product, rounded once"
    out = combine_triton_(shared.clone(), rows, route.rows_TK)
    truth = combine_ref_(shared.double(), rows.double(), plan)
    assert_as_exact(out, combine_ref_(shared.clone(), rows, plan), truth)


def test_combine_adds_in_order_of_expert_ids() -> None:
    """Three terms whose sum depends on the order."""
    rows = torch.tensor([[1e8], [1.0], [-1e8]], device=DEVICE)
    for table, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        rows_TK = torch.tensor([table], dtype=torch.int32, device=DEVICE)
        assert combine_triton_(torch.zeros(1, 1, device=DEVICE), rows, rows_TK).item() == expected


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E"), [(1, 16), (64, 16), (8192, 16), (8192, 128), (20000, 128)])
def test_real_shapes(T: int, E: int) -> None:
    check(noise(T, E, dtype=torch.bfloat16).to(DEVICE), 1)
    check(noise(T, E, dtype=torch.bfloat16).to(DEVICE), 2)
