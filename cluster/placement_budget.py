"""What is to be placed and how much of it each slot (shard) takes: copies of every expert, bytes of every slot. Says
what does not fit and by how much. Knows nothing of which expert goes where."""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

from .errors import PlacementError
from .expert_map import Expert
from .sizes import format_size


def group_by_layer(experts: Sequence[Expert]) -> dict[int, list[Expert]]:
    """Layers and experts ascending."""
    layers: dict[int, list[Expert]] = defaultdict(list)
    for expert in sorted(experts):
        layers[expert[0]].append(expert)
    return layers


def weigh(experts: Sequence[Expert], loads: Mapping[Expert, float]) -> dict[Expert, float]:
    """The load of every expert; those of a layer without any load are taken to be alike."""
    weights: dict[Expert, float] = {}
    for of_layer in group_by_layer(experts).values():
        known = {expert: loads.get(expert, 0.0) for expert in of_layer}
        weights |= known if any(known.values()) else dict.fromkeys(of_layer, 1.0)
    return weights


def count_copies(
    weights: Mapping[Expert, float], num_slots: int, replicas: int, redundancy: float
) -> dict[Expert, int]:
    """`replicas` of each; every layer's part of the further ones goes, one by one, to whatever has most load per copy.
    No expert gets more copies than there are slots. Raises PlacementError where `replicas` is already more."""
    if replicas > num_slots:
        raise PlacementError(
            f"{replicas} copies of every expert need {replicas} shards, each on another one; there are {num_slots}, "
            f"{replicas - num_slots} too few"
        )
    layers = group_by_layer(list(weights))
    num_extra = int(round(redundancy * len(weights), 6))
    shares = {layer: num_extra * len(experts) // len(weights) for layer, experts in layers.items()}

    def skew(layer: int) -> float:
        of_layer = [weights[expert] for expert in layers[layer]]
        return max(of_layer) * len(of_layer) / sum(of_layer)

    for layer in sorted(layers, key=lambda layer: (-skew(layer), layer))[: num_extra - sum(shares.values())]:
        shares[layer] += 1
    copies = dict.fromkeys(weights, replicas)
    for layer, experts in layers.items():
        heaviest = [(-weights[expert] / replicas, expert) for expert in experts if replicas < num_slots]
        heapq.heapify(heaviest)
        for _ in range(shares[layer]):
            if not heaviest:
                break
            _, expert = heapq.heappop(heaviest)
            copies[expert] += 1
            if copies[expert] < num_slots:
                heapq.heappush(heaviest, (-weights[expert] / copies[expert], expert))
    return copies


def usable_bytes(
    sizes: Mapping[Expert, int], copies: Mapping[Expert, int], capacities: Sequence[int | None]
) -> list[int]:
    """What each slot can really take: whole experts, and no more than one copy of each. Raises PlacementError where
    that is too little."""
    unit, one_of_each = math.gcd(*sizes.values()), sum(sizes.values())
    usable = [one_of_each if c is None else min(c // unit * unit, one_of_each) for c in capacities]
    largest = max(sizes, key=lambda expert: (sizes[expert], expert))
    room = max((one_of_each if c is None else c) for c in capacities)
    if sizes[largest] > room:
        raise PlacementError(
            f"an expert takes {format_size(sizes[largest])} (layer {largest[0]}, expert {largest[1]}); the largest "
            f"shard has room for {format_size(room)}, {format_size(sizes[largest] - room)} too little"
        )
    needed = sum(sizes[expert] * n for expert, n in copies.items())
    if needed > sum(usable):
        raise PlacementError(
            f"{sum(copies.values())} copies of {len(sizes)} experts take {format_size(needed)}; {len(usable)} shards "
            f"have room for {format_size(sum(usable))} (in whole experts, one copy of each per shard), "
            f"{format_size(needed - sum(usable))} too little"
        )
    return usable


class LayerQuotas:
    """How many copies of each layer each slot takes. Slots share every layer in proportion to the bytes that they take
    in all, rounded so that what rounding costs a slot in one layer it gets in another."""

    def __init__(
        self, sizes: Mapping[Expert, int], copies: Mapping[Expert, int], usable: Sequence[int], nodes: Sequence[str]
    ) -> None:
        seen: Counter[str] = Counter()
        self._turns = []
        """Each slot's turn among the slots of its node: odd copies go around the nodes."""
        for node in nodes:
            seen[node] += 1
            self._turns.append(seen[node])
        self._sizes = sizes
        self._copies = copies
        needed = sum(sizes[expert] * n for expert, n in copies.items())
        shares = share_bytes(needed, usable)
        scale = math.lcm(*(share.denominator for share in shares))
        self._needed = needed * scale
        self._shares = [int(share * scale) for share in shares]
        """Bytes of each slot, of `_needed`; scaled so that both are whole numbers and equal slots have equal shares."""
        self._usable = usable
        self._due = [0] * len(usable)
        """Bytes that each slot should have taken by now, times `_needed`."""

    def of(self, experts: Sequence[Expert], free: Sequence[int], before: Sequence[int]) -> list[int]:
        """Of the layer that consists of `experts`. `free`: bytes that slots have left before it; `before`: how many of
        the layer they held; to stay that way is worth one copy out of turn."""
        count = sum(self._copies[expert] for expert in experts)
        taken = sum(self._copies[expert] * self._sizes[expert] for expert in experts)
        copy = taken * self._needed // count
        quotas, due = [], []
        for slot, share in enumerate(self._shares):
            self._due[slot] += taken * share
            quotas.append(min(count * share // self._needed, len(experts)))
            used = self._usable[slot] - free[slot] + quotas[slot] * taken // count
            due.append(self._due[slot] - used * self._needed)
        for _ in range(count - sum(quotas)):
            open_slots = [
                slot
                for slot, quota in enumerate(quotas)
                if quota < len(experts) and (quota + 1) * taken <= free[slot] * count
            ]
            if not open_slots:
                break  # Left to whoever finds room across layers.
            slot = min(open_slots, key=lambda s: (-due[s] - copy * (before[s] > quotas[s]), self._turns[s], s))
            quotas[slot] += 1
            due[slot] -= copy
        return quotas


def share_bytes(needed: int, usable: Sequence[int]) -> list[Fraction]:
    """How many of the `needed` bytes each slot takes: all the same, except that none takes more than it can."""
    shares = [Fraction()] * len(usable)
    left = Fraction(needed)
    for num_done, slot in enumerate(sorted(range(len(usable)), key=usable.__getitem__)):
        shares[slot] = min(Fraction(usable[slot]), left / (len(usable) - num_done))
        left -= shares[slot]
    return shares
