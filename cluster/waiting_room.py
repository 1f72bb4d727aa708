"""Shards that ask for a lease and have none yet. A newcomer asks again and again; one that stops asking is forgotten.
Decides who is waiting, not what anybody gets."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlacementError
from .expert_map import Expert


@dataclass(frozen=True, slots=True)
class Asker:
    """A shard that waits for a lease."""

    shard_id: str
    node_id: str
    gpu: str
    """Which GPU of its node; empty on CPU."""
    capacity_bytes: int | None
    """Room for experts; None: no limit."""
    hosted: tuple[Expert, ...]
    """What it still holds of an earlier lease, ascending."""
    pid: int


class WaitingRoom:
    """`patience_s`: who did not ask for so long is gone."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._askers: dict[str, tuple[Asker, float, float]] = {}
        """Shard id -> (as it asked last, when it asked first, when last), by first."""
        self._refused: dict[str, str] = {}
        """Who has yet to hear of a refusal, and its reason."""

    def ask(self, asker: Asker, now: float) -> float:
        """It asks, for the first time or again. Returns when it asked first. Raises PlacementError, once,
        if it was refused since it asked last."""
        if asker.shard_id in self._refused:
            raise PlacementError(self._refused.pop(asker.shard_id))
        self._askers = {i: entry for i, entry in self._askers.items() if entry[2] > now - self._patience_s}
        _, first, _ = self._askers.get(asker.shard_id, (asker, now, now))
        self._askers[asker.shard_id] = (asker, first, now)
        return first

    def gathered(self, count: int, gather_s: float, now: float) -> list[Asker] | None:
        """The first `count` of those who wait; fewer once the first of them has waited for `gather_s`; else None."""
        first = min(first for _, first, _ in self._askers.values())
        if len(self._askers) < count and now - first < gather_s:
            return None
        return [asker for asker, _, _ in self._askers.values()][:count]

    def leave(self, shard_id: str) -> None:
        """It need not wait any longer."""
        self._askers.pop(shard_id, None)

    def refuse(self, reason: str) -> None:
        """All who wait hear the reason when they next ask; who asks after that waits anew."""
        self._refused = dict.fromkeys(self._askers, reason)
        self._askers.clear()
