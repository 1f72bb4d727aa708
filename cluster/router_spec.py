"""What a router is there for: the experts of one model and how many shards are to hold how many copies of them.
Values only; a cluster that wants other ones has another router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .expert_map import Expert


@dataclass(frozen=True)
class RouterSpec:
    """The experts are (layer, expert) for every one of `layers`, `num_experts` each, all of one size."""

    model: str
    """Fingerprint of the weights."""
    layers: tuple[int, ...]
    """The layers that have routed experts, ascending."""
    num_experts: int
    """Per layer."""
    expert_bytes: int
    shards: int
    """How many shares the experts are divided into."""
    replicas: int = 1
    redundancy: float = 0.0

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All of them, ascending."""
        return tuple((layer, expert) for layer in self.layers for expert in range(self.num_experts))

    def to_wire(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> RouterSpec:
        fields: dict[str, Any] = dict(wire)
        fields["layers"] = tuple(fields["layers"])
        return cls(**fields)
