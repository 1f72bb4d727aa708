"""Placement as invariants on random problems, its quality on skewed loads, examples, and what its errors say."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herd.cluster.errors import PlacementError
from herd.cluster.expert_map import Expert
from herd.cluster.placement import Placement, place
from herd.cluster.placement_budget import count_copies, share_bytes, weigh

SIZE = 100
MANY = settings(max_examples=150, deadline=None)


def experts_of(num_layers: int, num_experts: int, size: int = SIZE) -> dict[Expert, int]:
    return {(layer, expert): size for layer in range(num_layers) for expert in range(num_experts)}


@dataclass(frozen=True)
class Problem:
    sizes: Mapping[Expert, int]
    capacities: Sequence[int | None]
    nodes: Sequence[str]
    replicas: int = 1
    redundancy: float = 0.0
    loads: Mapping[Expert, float] | None = None
    previous: Sequence[Sequence[Expert]] | None = None

    def place(self) -> Placement:
        return place(
            self.sizes,
            self.capacities,
            nodes=self.nodes,
            replicas=self.replicas,
            redundancy=self.redundancy,
            loads=self.loads,
            previous=self.previous,
        )

    def copies(self) -> dict[Expert, int]:
        weights = weigh(list(self.sizes), self.loads or {})
        return count_copies(weights, len(self.nodes), self.replicas, self.redundancy)

    def is_possible(self) -> bool:
        """Gale and Ryser's condition, for experts of one size: any j of them have no more copies than the slots can
        take of j experts."""
        rooms = [len(self.sizes) if c is None else c // SIZE for c in self.capacities]
        most = accumulate(sorted(self.copies().values(), reverse=True))
        return all(needed <= sum(min(room, j) for room in rooms) for j, needed in enumerate(most, 1))


@st.composite
def problems(draw: st.DrawFn, *, limited: bool = False, loaded: bool = False) -> Problem:
    sizes = experts_of(draw(st.integers(1, 5)), draw(st.integers(1, 20)))
    num_slots = draw(st.integers(1, 9))
    replicas = draw(st.integers(1, min(3, num_slots)))
    redundancy = draw(st.sampled_from([0.0, 0.0, 0.1, 0.25, 0.5, 1.5]))
    capacities: list[int | None] = [None] * num_slots
    if limited:
        about = int(len(sizes) * SIZE * (replicas + redundancy) / num_slots)
        room = st.integers(0, 2 * about) | st.integers(max(0, about - 60), about + 160)
        capacities = draw(st.lists(st.none() | room, min_size=num_slots, max_size=num_slots))
    loads = None
    if loaded:
        loads = dict.fromkeys(sizes, 0.0) | draw(st.dictionaries(st.sampled_from(sorted(sizes)), st.floats(0, 1e6)))
    num_nodes = draw(st.integers(1, 4))
    nodes = draw(st.lists(st.integers(1, num_nodes).map(str), min_size=num_slots, max_size=num_slots))
    return Problem(sizes, capacities, nodes, replicas, redundancy, loads)


def count_by_layer(placement: Placement) -> dict[int, list[int]]:
    """Layer -> copies in each slot."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0] * len(placement.slots))
    for slot, experts in enumerate(placement.slots):
        for layer, _ in experts:
            counts[layer][slot] += 1
    return counts


def check(problem: Problem, placement: Placement) -> None:
    """Whatever the problem: the right copies, each in its own slot, none too full, and figures that are true."""
    copies = problem.copies()
    assert Counter(e for experts in placement.slots for e in experts) == copies
    assert all(list(experts) == sorted(set(experts)) for experts in placement.slots)
    assert placement.bytes == tuple(sum(problem.sizes[e] for e in experts) for experts in placement.slots)
    for taken, capacity in zip(placement.bytes, problem.capacities, strict=True):
        assert capacity is None or taken <= capacity
    weights = weigh(list(problem.sizes), problem.loads or {})
    for experts, load in zip(placement.slots, placement.load, strict=True):
        assert load == pytest.approx(sum(weights[e] / copies[e] for e in experts), abs=1e-6)
    before = problem.previous or [()] * len(placement.slots)
    assert placement.moves == sum(len(set(a) - set(b)) for a, b in zip(placement.slots, before, strict=True))


def nodes_of(problem: Problem, placement: Placement) -> dict[Expert, list[str]]:
    nodes: dict[Expert, list[str]] = defaultdict(list)
    for node, experts in zip(problem.nodes, placement.slots, strict=True):
        for expert in experts:
            nodes[expert].append(node)
    return nodes


@MANY
@given(problems(limited=True, loaded=True))
def test_it_places_exactly_what_can_be_placed(problem: Problem) -> None:
    if problem.is_possible():
        check(problem, problem.place())
        assert problem.place() == problem.place()
    else:
        with pytest.raises(PlacementError, match=r"too little|are free"):
            problem.place()


@MANY
@given(problems(limited=True, loaded=True), st.randoms(use_true_random=False))
def test_any_previous_placement_will_do(problem: Problem, rng: random.Random) -> None:
    assume(problem.is_possible())
    experts = sorted(problem.sizes)
    before = [rng.sample(experts, rng.randint(0, len(experts))) for _ in problem.nodes]
    problem = replace(problem, previous=before)
    check(problem, problem.place())


@MANY
@given(problems())
def test_even_loads_are_placed_evenly(problem: Problem) -> None:
    placement = problem.place()
    for counts in count_by_layer(placement).values():
        assert max(counts) - min(counts) <= 1
    assert max(placement.bytes) - min(placement.bytes) <= SIZE


@MANY
@given(problems(loaded=True))
def test_uneven_loads_take_even_room(problem: Problem) -> None:
    placement = problem.place()
    assert all(max(counts) - min(counts) <= 1 for counts in count_by_layer(placement).values())
    assert max(placement.bytes) - min(placement.bytes) <= SIZE


@MANY
@given(problems(loaded=True))
def test_nothing_moves_without_a_reason(problem: Problem) -> None:
    placement = problem.place()
    again = replace(problem, previous=placement.slots).place()
    assert again.moves == 0
    assert again.slots == placement.slots


@MANY
@given(problems(), st.integers(0, 8))
def test_a_slot_more_or_less_moves_about_its_share(problem: Problem, lost: int) -> None:
    num_layers = len({layer for layer, _ in problem.sizes})
    problem = replace(problem, redundancy=0.0)
    # With several copies of each, one that finds only slots of its own kind takes the place of another.
    moves_each = 1 if problem.replicas == 1 else 2
    placement = problem.place()
    num_slots, num_copies = len(problem.nodes), sum(map(len, placement.slots))
    more = replace(problem, nodes=[*problem.nodes, "new"], capacities=[None] * (num_slots + 1))
    more = replace(more, previous=[*placement.slots, ()])
    assert more.place().moves <= moves_each * num_copies / (num_slots + 1) + 2 * num_layers
    assert all(max(counts) - min(counts) <= 1 for counts in count_by_layer(more.place()).values())
    lost %= num_slots
    kept = [slot for slot in range(num_slots) if slot != lost]
    if len(kept) >= problem.replicas:
        less = replace(problem, nodes=[problem.nodes[slot] for slot in kept], capacities=[None] * len(kept))
        less = replace(less, previous=[placement.slots[slot] for slot in kept])
        assert less.place().moves <= moves_each * num_copies / num_slots + 2 * num_layers


@MANY
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(2, 3),
    st.sampled_from([0.0, 0.25]),
)
def test_copies_are_on_different_nodes(
    num_layers: int, num_experts: int, num_nodes: int, per_node: int, replicas: int, redundancy: float
) -> None:
    nodes = [str(node) for node in range(num_nodes) for _ in range(per_node)]
    problem = Problem(
        experts_of(num_layers, num_experts), [None] * len(nodes), nodes, min(replicas, num_nodes), redundancy
    )
    for of_expert in nodes_of(problem, problem.place()).values():
        assert len(set(of_expert)) == min(len(of_expert), num_nodes)


def zipf(num_layers: int, num_experts: int, exponent: float, rng: random.Random) -> dict[Expert, float]:
    loads = {}
    for layer in range(num_layers):
        of_layer = [1 / rank**exponent for rank in range(1, num_experts + 1)]
        rng.shuffle(of_layer)
        loads |= {(layer, expert): load for expert, load in enumerate(of_layer)}
    return loads


def layer_max_over_mean(placement: Placement, loads: Mapping[Expert, float]) -> float:
    """Of the worst layer, with every expert's load shared evenly by its copies."""
    copies = Counter(expert for experts in placement.slots for expert in experts)
    worst = 0.0
    for layer in {layer for layer, _ in loads}:
        slots = [sum(loads[e] / copies[e] for e in experts if e[0] == layer) for experts in placement.slots]
        worst = max(worst, max(slots) * len(slots) / sum(slots))
    return worst


def mean_max_over_mean_of_rows(placement: Placement, loads: Mapping[Expert, float], rng: random.Random) -> float:
    """Of one layer over 40 steps of 2,048 drawn rows, each row sent to the copy on the slot with fewest rows."""
    hosts: dict[Expert, list[int]] = defaultdict(list)
    for slot, experts in enumerate(placement.slots):
        for expert in experts:
            hosts[expert].append(slot)
    total = 0.0
    for _ in range(40):
        rows = [0] * len(placement.slots)
        for expert in rng.choices(list(loads), list(loads.values()), k=2048):
            rows[min(hosts[expert], key=rows.__getitem__)] += 1
        total += max(rows) * len(rows) / sum(rows)
    return total / 40


def test_a_quarter_more_copies_level_skewed_loads() -> None:
    rng = random.Random(5)
    loads = zipf(1, 128, 0.6, rng)
    plain = place(experts_of(1, 128), [None] * 16, nodes=["a"] * 16, loads=loads)
    copied = place(experts_of(1, 128), [None] * 16, nodes=["a"] * 16, loads=loads, redundancy=0.25)
    assert layer_max_over_mean(copied, loads) <= 1.05
    assert mean_max_over_mean_of_rows(copied, loads, rng) <= 1.2
    assert mean_max_over_mean_of_rows(plain, loads, rng) > 1.3, "loads were meant to be skewed"


def test_all_layers_together_are_level_where_one_alone_cannot_be() -> None:
    """With fewer experts than slots the hottest ones of every layer have a slot to themselves, each another one."""
    loads = zipf(48, 16, 0.6, random.Random(8))
    placement = place(experts_of(48, 16), [None] * 20, nodes=["a"] * 20, loads=loads)
    assert layer_max_over_mean(placement, loads) > 1.5
    assert max(placement.load) <= 1.05 * sum(placement.load) / 20


def test_drifted_loads_are_levelled_with_few_moves() -> None:
    rng = random.Random(6)
    sizes, nodes = experts_of(6, 128), [str(slot // 4) for slot in range(16)]
    old = zipf(6, 128, 0.6, rng)
    new = {expert: load * rng.uniform(0.5, 1.5) for expert, load in old.items()}
    before = place(sizes, [None] * 16, nodes=nodes, redundancy=0.25, loads=old)
    after = place(sizes, [None] * 16, nodes=nodes, redundancy=0.25, loads=new, previous=before.slots)
    assert layer_max_over_mean(after, new) <= 1.15 < layer_max_over_mean(before, new)
    assert after.moves <= 0.1 * sum(map(len, after.slots))


def test_a_new_slot_takes_its_share_of_skewed_loads() -> None:
    rng = random.Random(7)
    sizes, loads = experts_of(6, 128), zipf(6, 128, 0.6, rng)
    before = place(sizes, [None] * 16, nodes=["a"] * 16, redundancy=0.25, loads=loads)
    after = place(sizes, [None] * 17, nodes=["a"] * 17, redundancy=0.25, loads=loads, previous=[*before.slots, ()])
    assert layer_max_over_mean(after, loads) <= 1.15
    assert after.moves <= 1.1 * sum(map(len, after.slots)) / 17
    assert max(after.bytes) - min(after.bytes) <= 2 * SIZE


@pytest.mark.parametrize(("num_experts", "num_slots", "replicas"), [(128, 12, 2), (16, 20, 1), (16, 3, 1)])
def test_a_new_slot_takes_little_more_than_its_share(num_experts: int, num_slots: int, replicas: int) -> None:
    problem = Problem(experts_of(24, num_experts), [None] * num_slots, ["a"] * num_slots, replicas)
    before = problem.place()
    after = place(
        problem.sizes,
        [None] * (num_slots + 1),
        nodes=["a"] * (num_slots + 1),
        replicas=replicas,
        previous=[*before.slots, ()],
    )
    assert after.moves <= 1.05 * sum(map(len, after.slots)) / (num_slots + 1)
    assert max(after.bytes) - min(after.bytes) <= 2 * SIZE


def test_16_experts_on_3_slots() -> None:
    placement = place(experts_of(48, 16), [None] * 3, nodes=["a"] * 3)
    assert [len(experts) for experts in placement.slots] == [256, 256, 256]
    assert all(sorted(counts) == [5, 5, 6] for counts in count_by_layer(placement).values())


def test_128_experts_on_7_slots_with_a_quarter_more() -> None:
    problem = Problem(experts_of(24, 128), [None] * 7, list("aaaabbb"), redundancy=0.25)
    placement = problem.place()
    check(problem, placement)
    assert sum(map(len, placement.slots)) == 24 * 160
    assert all(set(counts) == {22, 23} for counts in count_by_layer(placement).values())
    assert all(len(of) == len(set(of)) for of in nodes_of(problem, placement).values())


def test_16_experts_on_5_slots_twice() -> None:
    problem = Problem(experts_of(48, 16), [None] * 5, list("abcde"), replicas=2)
    check(problem, problem.place())
    for lost in range(5):
        assert {e for slot, held in enumerate(problem.place().slots) if slot != lost for e in held} == set(
            problem.sizes
        )


def test_uneven_capacities_are_filled_to_the_last_expert() -> None:
    """Every byte is needed, in every layer in proportion; the odd half expert of the last slot is of no use."""
    problem = Problem(experts_of(4, 10), [20 * SIZE, 10 * SIZE, 5 * SIZE, 5 * SIZE + 50], list("abcd"))
    placement = problem.place()
    assert placement.bytes == (2000, 1000, 500, 500)
    for counts in count_by_layer(placement).values():
        assert counts[:2] in ([5, 2], [5, 3])


def test_room_to_spare_is_shared_evenly() -> None:
    placement = place(experts_of(2, 12), [10_000, None, 300, 10_000], nodes=["a"] * 4)
    assert placement.bytes == (700, 700, 300, 700)


def test_more_slots_than_experts() -> None:
    placement = place(experts_of(6, 4), [None] * 8, nodes=["a"] * 8)
    assert [len(experts) for experts in placement.slots] == [3] * 8


def test_redundancy_ends_at_one_copy_per_slot() -> None:
    placement = place(experts_of(2, 4), [None] * 3, nodes=["a"] * 3, redundancy=8.0)
    assert all(experts == tuple(sorted(experts_of(2, 4))) for experts in placement.slots)


def test_further_copies_go_to_the_busiest_of_every_layer() -> None:
    loads = {(0, 0): 9.0, (0, 1): 4.0, (0, 2): 1.0, (0, 3): 1.0, (1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.0, (1, 3): 50.0}
    placement = place(experts_of(2, 4), [None] * 4, nodes=["a"] * 4, redundancy=0.5, loads=loads)
    copies = Counter(expert for experts in placement.slots for expert in experts)
    assert {expert: n for expert, n in copies.items() if n > 1} == {(0, 0): 3, (1, 3): 3}


def test_experts_of_different_sizes() -> None:
    sizes = experts_of(2, 6) | {(2, expert): 250 for expert in range(6)}
    problem = Problem(sizes, [1000, 1000, 1000], list("abc"))
    check(problem, problem.place())


def test_bytes_are_shared_by_filling_small_slots_first() -> None:
    assert share_bytes(100, [10, 1000, 1000]) == [10, 45, 45]
    assert share_bytes(100, [50, 50]) == [50, 50]
    assert share_bytes(100, [30, 1000, 1000, 1000]) == [25, 25, 25, 25]
    assert len(set(share_bytes(100, [1000] * 3))) == 1


GIB = 1 << 30


@pytest.mark.parametrize(
    ("capacities", "options", "says"),
    [
        (
            [None] * 2,
            {"replicas": 3},
            "3 copies of every expert need 3 shards, each on another one; there are 2, 1 too few",
        ),
        (
            [GIB // 2, GIB // 4],
            {},
            r"an expert takes 1.0 GiB \(layer 1, expert 3\); the largest shard has room for 512 MiB, 512 MiB too",
        ),
        (
            [3 * GIB, int(2.9 * GIB)],
            {},
            "8 copies of 8 experts take 8.0 GiB; 2 shards have room for 5.0 GiB .*, 3.0 GiB too little",
        ),
        (
            [4 * GIB] * 2,
            {"redundancy": 0.25},
            "10 copies of 8 experts take 10.0 GiB; .* 8.0 GiB .*, 2.0 GiB too little",
        ),
        ([20 * GIB, 4 * GIB], {"replicas": 2}, "16 copies .* take 16.0 GiB; .* 12.0 GiB .*, 4.0 GiB too little"),
    ],
)
def test_errors_say_what_does_not_fit_and_by_how_much(capacities: list[int | None], options: dict, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        place(experts_of(2, 4, GIB), capacities, nodes=["a"] * 2, **options)


def test_an_error_where_only_the_pieces_are_too_small() -> None:
    with pytest.raises(PlacementError, match="layer 0, expert 2, which takes 600 bytes: 600 bytes are free"):
        place({(0, 0): 600, (0, 1): 600, (0, 2): 600, (1, 0): 200}, [1000, 1000], nodes=["a"] * 2)
