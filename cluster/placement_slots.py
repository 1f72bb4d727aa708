"""Slots (shards) while experts are being put into them: what each holds, how much room and load it has, and how copies
find a slot. Knows nothing of how many copies there should be or how many a slot should take."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from .expert_map import Expert


class Slots:
    """`sizes`, `weights`: bytes and load of one copy of each expert. `nodes`, `free`, `others`: node, free bytes and
    load of other layers of each slot. A slot never holds two copies of an expert."""

    def __init__(
        self,
        sizes: Mapping[Expert, int],
        weights: Mapping[Expert, float],
        nodes: Sequence[str],
        free: Sequence[int],
        others: Sequence[float],
    ) -> None:
        self.held: list[set[Expert]] = [set() for _ in nodes]
        self.free = list(free)
        self.loads = [0.0] * len(nodes)
        self._sizes = sizes
        self._weights = weights
        self._nodes = nodes
        self._others = others
        self._on_node: Counter[tuple[Expert, str]] = Counter()

    def put(self, slot: int, expert: Expert) -> None:
        assert expert not in self.held[slot]
        self.held[slot].add(expert)
        self.free[slot] -= self._sizes[expert]
        self.loads[slot] += self._weights[expert]
        self._on_node[expert, self._nodes[slot]] += 1

    def remove(self, slot: int, expert: Expert) -> None:
        self.held[slot].remove(expert)
        self.free[slot] += self._sizes[expert]
        self.loads[slot] -= self._weights[expert]
        self._on_node[expert, self._nodes[slot]] -= 1

    def keep(self, before: Sequence[Collection[Expert]], copies: Mapping[Expert, int], quotas: Sequence[int]) -> None:
        """Leave copies where they were `before`: of each expert no more than its `copies`, in each slot no more than
        its quota and its free bytes."""
        wanted: list[list[Expert]] = [[] for _ in before]
        for expert, count in copies.items():
            where = [slot for slot, experts in enumerate(before) if expert in experts]
            first_on_node = {self._nodes[slot]: slot for slot in reversed(where)}
            where.sort(key=lambda slot: (first_on_node[self._nodes[slot]] != slot, slot))
            for slot in where[:count]:
                wanted[slot].append(expert)
        for slot, experts in enumerate(wanted):
            experts.sort(key=lambda expert: (-self._weights[expert], expert))
            # What goes is a sample of heavy and light ones, so that both the slot and whoever takes them stay even.
            count, quota = len(experts), min(quotas[slot], len(experts))
            for i, expert in enumerate(experts, slot):
                if (i + 1) * quota // count > i * quota // count and self._sizes[expert] <= self.free[slot]:
                    self.put(slot, expert)

    def fill(self, copies: Mapping[Expert, int], quotas: Sequence[int]) -> list[Expert]:
        """Put in what is still missing of `copies`, each slot up to its quota of experts: heaviest first, each copy
        where its expert has fewest on the node, then where load is least. Returns the copies that found no slot."""
        placed = Counter(expert for experts in self.held for expert in experts)
        left_over: list[Expert] = []
        for expert in sorted(copies, key=lambda expert: (-copies[expert], -self._weights[expert], expert)):
            for _ in range(copies[expert] - placed[expert]):
                open_slots = [
                    slot
                    for slot, held in enumerate(self.held)
                    if len(held) < quotas[slot] and expert not in held and self._sizes[expert] <= self.free[slot]
                ]
                if open_slots:
                    self.put(min(open_slots, key=lambda slot: self._rank(slot, expert, quotas[slot])), expert)
                elif not self.reroute(expert, lambda slot: len(self.held[slot]) < quotas[slot]):
                    left_over.append(expert)
        return left_over

    def _rank(self, slot: int, expert: Expert, quota: int) -> tuple[float, ...]:
        """The slot with the least is the best one for a copy of `expert`."""
        on_node = self._on_node[expert, self._nodes[slot]]
        return (on_node, self.loads[slot], len(self.held[slot]) - quota, self._others[slot], -self.free[slot], slot)

    def spread(self) -> None:
        """Swap copies that share a node with another of their expert for ones of about the same load elsewhere."""
        for slot, held in enumerate(self.held):
            for expert in sorted(held):
                if self._on_node[expert, self._nodes[slot]] > 1:
                    swaps = [
                        (abs(self._weights[expert] - self._weights[other]), there, other)
                        for there, other in self._swaps(slot, expert, gain=1)
                    ]
                    if swaps:
                        self._swap(slot, expert, *min(swaps)[1:])

    def level(self, limit: float) -> None:
        """Swap copies of the fullest slot for lighter ones until no slot's load is over `limit` or nothing helps."""
        for _ in range(sum(map(len, self.held))):
            fullest = max(range(len(self.held)), key=lambda slot: (self.loads[slot], -slot))
            if self.loads[fullest] <= limit:
                return
            swaps = [
                (max(self.loads[fullest] - lighter, self.loads[there] + lighter), there, other, expert)
                for expert in self.held[fullest]
                for there, other in self._swaps(fullest, expert, gain=0)
                if (lighter := self._weights[expert] - self._weights[other]) > 0
            ]
            if not swaps or min(swaps)[0] >= self.loads[fullest]:
                return
            _, there, other, expert = min(swaps)
            self._swap(fullest, expert, there, other)

    def _swaps(self, slot: int, expert: Expert, gain: int) -> Iterator[tuple[int, Expert]]:
        """(slot, expert) of whatever may change places with `expert`, which then has at least `gain` copies fewer on
        its node than before, and neither has more on a node than it had on one before."""
        here = self._nodes[slot]
        for other_slot, held in enumerate(self.held):
            there = self._nodes[other_slot]
            if other_slot == slot or expert in held:
                continue
            if self._on_node[expert, here] - self._on_node[expert, there] < gain + (here != there):
                continue
            for other in held:
                if other in self.held[slot] or self._on_node[other, there] - self._on_node[other, here] < (
                    here != there
                ):
                    continue
                larger = self._sizes[other] - self._sizes[expert]
                if -self.free[other_slot] <= larger <= self.free[slot]:
                    yield other_slot, other

    def _swap(self, slot: int, expert: Expert, other_slot: int, other: Expert) -> None:
        self.remove(slot, expert)
        self.remove(other_slot, other)
        self.put(slot, other)
        self.put(other_slot, expert)

    def reroute(self, expert: Expert, is_open: Callable[[int], bool] = lambda slot: True) -> bool:
        """Make room for a copy of `expert` along the shortest augmenting path: it takes the place of a copy that takes
        the place of another, and so on to a slot that is open and has free bytes. False if there is no such path."""
        came: dict[int, tuple[int | None, Expert]] = {}
        """Slot -> (slot before it on the path, the expert that would come from there)."""
        queue: deque[int] = deque()
        for slot, held in enumerate(self.held):
            if expert not in held:
                came[slot] = (None, expert)
                queue.append(slot)
        while queue:
            slot = queue.popleft()
            incoming = came[slot][1]
            if is_open(slot) and self._sizes[incoming] <= self.free[slot]:
                self._shift(slot, came)
                return True
            needed = self._sizes[incoming] - self.free[slot]
            going = [other for other in self.held[slot] if self._sizes[other] >= needed]
            for following, held in enumerate(self.held):
                if following in came:
                    continue
                movable = [other for other in going if other not in held]
                if movable:
                    # One of its own layer, to leave the balance of other layers alone.
                    came[following] = (slot, min(movable, key=lambda other: (other[0] != expert[0], other)))
                    queue.append(following)
        return False

    def _shift(self, slot: int | None, came: Mapping[int, tuple[int | None, Expert]]) -> None:
        """Carry out the path that ends in `slot`, from its end."""
        while slot is not None:
            source, expert = came[slot]
            if source is not None:
                self.remove(source, expert)
            self.put(slot, expert)
            slot = source
