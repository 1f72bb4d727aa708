"""Which slot (shard) holds which experts. A pure function of sizes, capacities, nodes and loads, with the same answer
every time; knows nothing of leases, processes or clocks.

Replicate, then pack, as DeepSeek's EPLB does: each layer by itself, since a step waits for the fullest shard of every
layer. How many copies of a layer each slot takes is settled first, by bytes, so that memory is balanced as well; then
the heaviest copy goes to the slot with the least load of its layer, away from nodes that have a copy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .errors import PlacementError
from .expert_map import Expert
from .placement_budget import LayerQuotas, count_copies, group_by_layer, usable_bytes, weigh
from .placement_slots import Slots
from .sizes import format_size

STAY = 1.1
"""A copy stays where it was unless its slot would carry more than this many times what the fullest slot carries when
the layer is packed afresh."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What each slot holds."""

    slots: tuple[tuple[Expert, ...], ...]
    """Each ascending."""
    bytes: tuple[int, ...]
    load: tuple[float, ...]
    """Per slot, when every expert's load is shared evenly by its copies."""
    moves: int
    """Copies that a slot holds now and did not before."""


def place(
    sizes: Mapping[Expert, int],
    capacities: Sequence[int | None],
    *,
    nodes: Sequence[str],
    replicas: int = 1,
    redundancy: float = 0.0,
    loads: Mapping[Expert, float] | None = None,
    previous: Sequence[Collection[Expert]] | None = None,
) -> Placement:
    """Give every expert `replicas` slots, and the busiest of each layer further ones, `redundancy` times the number of
    experts in all (but never two copies of one to a slot).

    sizes, loads: bytes and load of each expert; without loads all are alike.
    capacities, nodes: bytes that each slot has room for (None: no limit) and the node that it is on.
    previous: what each slot holds now; copies stay where that costs little.
    Raises PlacementError, which says what does not fit and by how much; with experts of one size, only if no placement
    exists."""
    assert len(capacities) == len(nodes)
    assert previous is None or len(previous) == len(nodes)
    before = [frozenset(held) for held in previous or [()] * len(nodes)]
    weights = weigh(list(sizes), loads or {})
    copies = count_copies(weights, len(nodes), replicas, redundancy)
    weights = {expert: weights[expert] / n for expert, n in copies.items()}
    usable = usable_bytes(sizes, copies, capacities)
    quotas = LayerQuotas(sizes, copies, usable, nodes)
    slots = Slots(sizes, weights, nodes, usable, [0.0] * len(nodes))
    left_over: list[Expert] = []
    for layer, experts in group_by_layer(list(sizes)).items():
        of_layer = {expert: copies[expert] for expert in experts}
        before_of_layer = [[expert for expert in held if expert[0] == layer] for held in before]
        quota = quotas.of(experts, slots.free, [len(held) for held in before_of_layer])
        packed = Slots(sizes, weights, nodes, slots.free, slots.loads)
        missing = packed.fill(of_layer, quota)
        packed.spread()
        if any(before_of_layer):
            fullest = max(packed.loads)
            packed = Slots(sizes, weights, nodes, slots.free, slots.loads)
            packed.keep(before_of_layer, of_layer, quota)
            missing = packed.fill(of_layer, quota)
            packed.level(fullest * STAY)
        left_over += missing
        for slot, held in enumerate(packed.held):
            for expert in held:
                slots.put(slot, expert)
    for expert in left_over:
        if not slots.reroute(expert):
            raise PlacementError(
                f"no shard has room for another copy of layer {expert[0]}, expert {expert[1]}, which takes "
                f"{format_size(sizes[expert])}: {format_size(sum(slots.free))} are free, but in too small pieces or "
                f"where a copy is already"
            )
    return Placement(
        slots=tuple(tuple(sorted(held)) for held in slots.held),
        bytes=tuple(sum(sizes[expert] for expert in held) for held in slots.held),
        load=tuple(slots.loads),
        moves=sum(len(held - kept) for held, kept in zip(slots.held, before, strict=True)),
    )
