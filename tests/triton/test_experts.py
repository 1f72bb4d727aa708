"""The expert MLPs of a GPU, or interpreted: against float64, the fused path against the unfused one, and bits that do
not depend on company. Tiles have 8 to 128 rows of one expert, 16 or more output channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.expert_table import ExpertTable
from herd.kernels.grouped_mlp import GpuExpert
from herd.kernels.route import Route
from herd.kernels.triton_experts import grouped_mlp_triton, mlp_triton, moe_mlp, moe_mlp_ref
from herd.kernels.triton_route import DeviceRoute, combine_triton_, gather_scaled_triton, route_device

from ..kernels.tolerances import assert_as_exact, noise
from .weights import DEVICE, FEWER_KINDS, FP8_ROWS, INT4, INT8, PLAIN, Kind, widest

SHAPES = [
    pytest.param(1, 3, 1, 32, 32, True, id="one row"),
    pytest.param(7, 3, 1, 32, 64, True, id="prime counts"),
    pytest.param(132, 2, 1, 32, 32, False, id="wide tiles"),
]
MORE_SHAPES = [
    pytest.param(5, 128, 1, 32, 32, id="128 experts, nearly all empty"),
    pytest.param(5, 3, 3, 32, 32, id="every expert"),
    pytest.param(5, 4, 2, 64, 32, id="two experts a token"),
    pytest.param(18, 2, 1, 32, 32, id="tiles of 16 rows, one beyond"),
]


class Experts:
    """E experts of one kind, as weights and as a table."""

    def __init__(self, kind: Kind, E: int, D: int, F: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.gate_up = [kind.weight(2 * F, D, dtype, seed=e) for e in range(E)]
        self.down = [kind.weight(D, F, dtype, seed=1000 + e) for e in range(E)]
        self.weights = [GpuExpert(kind.linear(g), kind.linear(d)) for g, d in zip(self.gate_up, self.down, strict=True)]
        self.table = ExpertTable(self.weights, DEVICE)


def on_host(route: DeviceRoute) -> Route:
    return Route(route.tokens_N, route.scores_N, route.rows_TK, route.counts_E.tolist())


def unfused(x: Tensor, route: DeviceRoute, table: ExpertTable, shared: Tensor, exact: bool) -> Tensor:
    rows = gather_scaled_triton(x, route.tokens_N, route.scores_N)
    return combine_triton_(shared.clone(), grouped_mlp_triton(rows, route.counts_E, table, exact), route.rows_TK)


def tokens(T: int, E: int, D: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, router logits, shared outputs."""
    sizes = ((D, 1), (E, 2), (D, 3))
    x, logits, shared = (noise(T, size, dtype=dtype, seed=seed).to(DEVICE) for size, seed in sizes)
    return x, logits, shared


def check(kind: Kind, experts: Experts, route: DeviceRoute, x: Tensor, shared: Tensor, exact: bool) -> None:
    out = moe_mlp(x, route, experts.table, shared, exact)
    plan = on_host(route)
    reference = moe_mlp_ref(x, plan, experts.gate_up, experts.down, shared, kind.fp8_rows)
    exactly = [widest(w) for w in experts.gate_up], [widest(w) for w in experts.down]
    truth = moe_mlp_ref(x.double(), plan, *exactly, shared.double())  # where fp8 rounds is no matter of truth
    assert_as_exact(out, reference, truth)
    assert torch.equal(out, unfused(x, route, experts.table, shared, exact)), "the fused path has other bits"


@pytest.mark.parametrize(("T", "E", "k", "D", "F", "exact"), SHAPES)
@pytest.mark.parametrize("kind", FEWER_KINDS, ids=str)
def test_experts(kind: Kind, T: int, E: int, k: int, D: int, F: int, exact: bool) -> None:
    x, logits, shared = tokens(T, E, D)
    check(kind, Experts(kind, E, D, F), route_device(logits, k), x, shared, exact)


@pytest.mark.parametrize(("T", "E", "k", "D", "F"), MORE_SHAPES)
@pytest.mark.parametrize("kind", [PLAIN, INT4], ids=str)
def test_experts_in_other_shapes(kind: Kind, T: int, E: int, k: int, D: int, F: int) -> None:
    x, logits, shared = tokens(T, E, D)
    check(kind, Experts(kind, E, D, F), route_device(logits, k), x, shared, exact=True)


@pytest.mark.parametrize("kind", [PLAIN, INT4], ids=str)
def test_all_rows_on_one_expert(kind: Kind) -> None:
    x, logits, shared = tokens(26, 5, 32)
    logits[:, 3] = 100
    check(kind, Experts(kind, 5, 32, 32), route_device(logits, 1), x, shared, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [PLAIN, INT4], ids=str)
def test_other_dtypes(kind: Kind, dtype: torch.dtype) -> None:
    x, logits, shared = tokens(6, 3, 64, dtype)
    check(kind, Experts(kind, 3, 64, 32, dtype), route_device(logits, 1), x, shared, exact=True)


@pytest.mark.parametrize("kind", FEWER_KINDS, ids=str)
def test_a_token_keeps_its_bits_in_any_company(kind: Kind) -> None:
    experts = Experts(kind, 2, 64, 32)
    x, logits, shared = tokens(70, 2, 64)
    together = moe_mlp(x, route_device(logits, 1), experts.table, shared, exact=True)
    for T in (1, 9, 40):
        some = torch.randperm(70, generator=torch.Generator().manual_seed(T))[:T].to(DEVICE)
        out = moe_mlp(x[some], route_device(logits[some], 1), experts.table, shared[some], exact=True)
        assert torch.equal(out, together[some]), T


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rows_of_a_shard(data: st.DataObject) -> None:
    """Any counts, whatever tokens they came from, on any of the experts: each row as if it were alone."""
    counts = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 17]), min_size=3, max_size=3).filter(sum))
    rows = noise(sum(counts), 64, dtype=torch.bfloat16).to(DEVICE)
    table = _SHARD.table
    out = grouped_mlp_triton(rows, torch.tensor(counts, dtype=torch.int32, device=DEVICE), table, exact=True)
    experts = torch.arange(3).repeat_interleave(torch.tensor(counts))
    n = data.draw(st.integers(0, sum(counts) - 1))
    alone = torch.nn.functional.one_hot(experts[n], 3).int().to(DEVICE)
    assert torch.equal(grouped_mlp_triton(rows[n : n + 1], alone, table, exact=True)[0], out[n])


_SHARD = Experts(PLAIN, 3, 64, 32)


@pytest.mark.parametrize("kind", FEWER_KINDS, ids=str)
def test_one_mlp_for_all_rows(kind: Kind) -> None:
    """The shared expert's bits are those of a routed expert that gets every row."""
    experts = Experts(kind, 2, 64, 32)
    rows = noise(19, 64, dtype=torch.bfloat16).to(DEVICE)
    counts = torch.tensor([0, 19], dtype=torch.int32, device=DEVICE)
    alone = mlp_triton(rows, experts.weights[1], exact=True)
    assert torch.equal(alone, grouped_mlp_triton(rows, counts, experts.table, exact=True))


def test_experts_are_replaced_one_at_a_time() -> None:
    experts, others = Experts(INT8, 3, 64, 32), Experts(INT8, 3, 64, 32)
    others.weights[0] = Experts(INT8, 7, 64, 32).weights[6]
    table = ExpertTable([experts.weights[0], None, experts.weights[2]], DEVICE)
    rows = noise(5, 64, dtype=torch.bfloat16).to(DEVICE)
    counts = torch.tensor([3, 0, 2], dtype=torch.int32, device=DEVICE)
    before = grouped_mlp_triton(rows, counts, table, exact=True)
    assert torch.equal(before, grouped_mlp_triton(rows, counts, experts.table, exact=True)), "expert 1 is not needed"
    addresses = table.addresses
    table.replace(0, others.weights[0])
    table.replace(1, experts.weights[1])
    assert table.addresses is addresses, "a CUDA graph would read the old ones"
    after = grouped_mlp_triton(rows, counts, table, exact=True)
    assert torch.equal(after[3:], before[3:])
    assert not torch.equal(after[:3], before[:3])
    assert torch.equal(after[:3], mlp_triton(rows[:3], others.weights[0], exact=True))


def test_an_expert_of_another_layout_is_refused() -> None:
    experts = Experts(INT8, 2, 64, 32)
    with pytest.raises(AssertionError, match="one layout"):
        experts.table.replace(1, Experts(INT4, 1, 64, 32).weights[0])


def test_a_token_without_numbers_hurts_no_other() -> None:
    experts = Experts(INT8, 3, 96, 32)
    x, logits, shared = tokens(9, 3, 96)
    route = route_device(logits, 1)
    before = moe_mlp(x, route, experts.table, shared, exact=True)
    x[4, 95] = float("nan")
    after = moe_mlp(x, route, experts.table, shared, exact=True)
    assert after.isnan().all(dim=1).tolist() == [t == 4 for t in range(9)]
    assert torch.equal(after[[t for t in range(9) if t != 4]], before[[t for t in range(9) if t != 4]])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [PLAIN, INT8, Kind("int4", 128), Kind("fp8"), FP8_ROWS], ids=str)
@pytest.mark.parametrize("E", [16, 128], ids=["Scout", "Maverick"])
def test_real_shapes(kind: Kind, E: int) -> None:
    """Bits at 1 to 4096 rows, and a few rows against float64. The experts share four weights, so that they fit."""
    D, F = 5120, 8192
    four = Experts(kind, 4, D, F)
    table = ExpertTable([four.weights[e % 4] for e in range(E)], DEVICE)
    x, logits, shared = tokens(4096, E, D)
    route = route_device(logits, 1)
    together = moe_mlp(x, route, table, shared, exact=True)
    assert torch.equal(together, unfused(x, route, table, shared, exact=True))
    for T in (1, 2, 16, 64, 256):
        some = torch.randperm(4096, generator=torch.Generator().manual_seed(T))[:T].to(DEVICE)
        out = moe_mlp(x[some], route_device(logits[some], 1), table, shared[some], exact=True)
        assert torch.equal(out, together[some]), T
    few = slice(0, 32)
    plan = on_host(route_device(logits[few], 1))
    repeated = [four.gate_up[e % 4] for e in range(E)], [four.down[e % 4] for e in range(E)]
    reference = moe_mlp_ref(x[few], plan, *repeated, shared[few], kind.fp8_rows)
    exactly = [widest(w) for w in four.gate_up], [widest(w) for w in four.down]
    wide = [exactly[0][e % 4] for e in range(E)], [exactly[1][e % 4] for e in range(E)]
    truth = moe_mlp_ref(x[few].double(), plan, *wide, shared[few].double())
    for exact in (True, False):
        out = moe_mlp(x, route, table, shared, exact)
        assert_as_exact(out[few], reference, truth)


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_routing() -> None:
    """Nothing that was captured depends on which experts were chosen, or on which weights they had."""
    experts = Experts(INT4, 4, 512, 256)
    x, logits, shared = tokens(16, 4, 512)

    def step() -> Tensor:
        return moe_mlp(x, route_device(logits, 1), experts.table, shared, exact=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        logits.copy_(noise(16, 4, dtype=torch.bfloat16, seed=10 + seed))
        experts.table.replace(seed % 4, experts.weights[(seed + 1) % 4])
        graph.replay()
        assert torch.equal(captured, step())
