"""How busy shards and experts are: turns the running totals that shards send with their beats into rates over the last
seconds, and those into imbalance. A total that fell belongs to a counter that began anew: what was before is
forgotten. Knows nothing of leases, maps or clocks of its own.

What is read of a load, all of it optional: "rows" and "busy_s" since the process began, "queued_rows" now, and
"experts": [[layer, [rows of each hosted expert since the process began]], ...] in the order of `pack_experts`."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .expert_map import Expert

WINDOW_S = 5.0
"""Rates are means over about this long."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The totals of one beat."""

    at: float
    rows: int
    busy_s: float
    expert_rows: tuple[int, ...]
    """In the order of the shard's experts; empty when the beat did not tell."""

    def is_before(self, later: Sample) -> bool:
        """Whether both come from the same life of the same counters."""
        return (
            self.rows <= later.rows
            and self.busy_s <= later.busy_s
            and len(self.expert_rows) == len(later.expert_rows)
            and all(a <= b for a, b in zip(self.expert_rows, later.expert_rows, strict=True))
        )


class ShardLoad:
    """One shard's load over the window."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts = tuple(experts)
        self.rows = 0
        self.queued_rows = 0
        self._samples: deque[Sample] = deque()

    def beat(self, load: Mapping[str, Any], now: float) -> None:
        """Take note of a beat."""
        expert_rows = tuple(rows for _, of_layer in load.get("experts") or () for rows in of_layer)
        if len(expert_rows) != len(self.experts):
            expert_rows = ()
        self.rows = int(load.get("rows") or 0)
        self.queued_rows = int(load.get("queued_rows") or 0)
        sample = Sample(now, self.rows, float(load.get("busy_s") or 0.0), expert_rows)
        if self._samples and not self._samples[-1].is_before(sample):
            self._samples.clear()
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at <= now - WINDOW_S:
            self._samples.popleft()

    @property
    def _seconds(self) -> float:
        return self._samples[-1].at - self._samples[0].at if self._samples else 0.0

    @property
    def rows_per_s(self) -> float:
        seconds = self._seconds
        return (self._samples[-1].rows - self._samples[0].rows) / seconds if seconds > 0 else 0.0

    @property
    def busy(self) -> float:
        """Share of the time that it computed."""
        seconds = self._seconds
        return min((self._samples[-1].busy_s - self._samples[0].busy_s) / seconds, 1.0) if seconds > 0 else 0.0

    def expert_rates(self) -> dict[Expert, float]:
        """Rows per second of each of its experts; empty when not known."""
        seconds = self._seconds
        if seconds <= 0:
            return {}
        first, last = self._samples[0].expert_rows, self._samples[-1].expert_rows
        return {e: (b - a) / seconds for e, a, b in zip(self.experts, first, last, strict=False)}


@dataclass(frozen=True, slots=True)
class Imbalance:
    """Load of the fullest shard over the mean: 1.0 is even. None where nothing ran."""

    max_over_mean: float | None
    worst_layer: int | None
    worst_max_over_mean: float | None


class ClusterLoad:
    """All shards' loads."""

    def __init__(self) -> None:
        self._shards: dict[str, ShardLoad] = {}

    def beat(self, shard_id: str, experts: Sequence[Expert], load: Mapping[str, Any], now: float) -> None:
        if shard_id not in self._shards:
            self._shards[shard_id] = ShardLoad(experts)
        self._shards[shard_id].beat(load, now)

    def forget(self, shard_id: str) -> None:
        self._shards.pop(shard_id, None)

    def of(self, shard_id: str) -> ShardLoad:
        """Nothing, for a shard that never beat."""
        return self._shards.get(shard_id) or ShardLoad(())

    def expert_rates(self) -> dict[Expert, float]:
        """Rows per second of each expert, all its copies together."""
        rates: dict[Expert, float] = defaultdict(float)
        for shard in self._shards.values():
            for expert, rate in shard.expert_rates().items():
                rates[expert] += rate
        return dict(rates)

    def imbalance(self, shard_ids: Collection[str]) -> Imbalance:
        """Over those shards; the worst layer is the one that strays furthest from even."""
        overall = _max_over_mean([self.of(shard_id).rows_per_s for shard_id in shard_ids])
        layers: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(shard_ids, 0.0))
        for shard_id in shard_ids:
            for (layer, _), rate in self.of(shard_id).expert_rates().items():
                layers[layer][shard_id] += rate
        ratios = {layer: _max_over_mean(list(rates.values())) for layer, rates in layers.items()}
        known = {layer: ratio for layer, ratio in ratios.items() if ratio is not None}
        worst = max(sorted(known), key=known.__getitem__, default=None)
        return Imbalance(overall, worst, known[worst] if worst is not None else None)


def _max_over_mean(rates: Sequence[float]) -> float | None:
    total = sum(rates)
    return max(rates) * len(rates) / total if total > 0 else None
