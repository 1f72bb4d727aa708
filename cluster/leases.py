"""A shard's lease: which slot of the placement one life of one shard process holds, and how far it has come. One table
of legal moves. Knows nothing of placement, maps or how shards are reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from .expert_map import Expert, ShardEndpoint


class LeaseState(StrEnum):
    LOADING = "loading"
    """It reads its experts; nobody may send to it."""
    READY = "ready"
    """It is in the map."""
    SUSPECT = "suspect"
    """Still in the map, but an engine lost it: the next beat clears it, else it goes soon."""
    GONE = "gone"
    """It left, or was not heard of in time. The same process may ask for a new lease."""


LEGAL_MOVES: dict[LeaseState, frozenset[LeaseState]] = {
    LeaseState.LOADING: frozenset({LeaseState.READY, LeaseState.GONE}),
    LeaseState.READY: frozenset({LeaseState.SUSPECT, LeaseState.GONE}),
    LeaseState.SUSPECT: frozenset({LeaseState.READY, LeaseState.GONE}),
    LeaseState.GONE: frozenset(),
}


@dataclass(slots=True, eq=False)
class Lease:
    """What one shard holds; equal only to itself."""

    shard_id: str
    slot: int
    experts: tuple[Expert, ...]
    """Ascending."""
    node_id: str
    gpu: str
    """Which GPU of its node; empty on CPU."""
    pid: int
    heard_at: float
    """When it last asked, beat or reported ready."""
    expires_at: float
    state: LeaseState = LeaseState.LOADING
    entered: int = 0
    """Epoch of the first map that it was in; 0 while it loads."""
    endpoint: ShardEndpoint | None = None

    @property
    def is_serving(self) -> bool:
        """Whether it belongs into the map."""
        return self.state in (LeaseState.READY, LeaseState.SUSPECT)

    def advance(self, to: LeaseState) -> None:
        """Move to `to`; an illegal move is a defect of the router."""
        if to not in LEGAL_MOVES[self.state]:
            raise AssertionError(f"shard {self.shard_id}: illegal move {self.state} -> {to}")
        self.state = to

    def renew(self, now: float, ttl_s: float) -> None:
        """It was heard of: alive, whatever others said."""
        self.heard_at, self.expires_at = now, now + ttl_s
        if self.state is LeaseState.SUSPECT:
            self.advance(LeaseState.READY)

    def suspect(self, until: float) -> None:
        """Somebody lost it. Being reported again does not give it more time."""
        if self.state is LeaseState.READY:
            self.advance(LeaseState.SUSPECT)
            self.expires_at = min(self.expires_at, until)

    def to_wire(self) -> dict[str, Any]:
        """Plain values; its experts are those of its slot, and its times mean nothing to another process."""
        fields = {name: getattr(self, name) for name in ("shard_id", "slot", "node_id", "gpu", "pid", "entered")}
        return fields | {"state": str(self.state), "endpoint": asdict(self.endpoint) if self.endpoint else None}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any], experts: tuple[Expert, ...], now: float, ttl_s: float) -> Lease:
        """As `to_wire` described it, with a fresh time to live."""
        fields = dict(wire) | {
            "state": LeaseState(wire["state"]),
            "endpoint": ShardEndpoint(**wire["endpoint"]) if wire["endpoint"] else None,
        }
        return cls(experts=experts, heard_at=now, expires_at=now + ttl_s, **fields)
