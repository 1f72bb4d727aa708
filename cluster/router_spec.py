"""What a router is there for: the experts of one model and how many shards are to hold how many copies of them.
Values only; a cluster that wants other ones has another router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from .expert_map import Expert


@dataclass(frozen=True)
class RouterSpec:
    """The experts are (layer, expert) for every one of `layers`, `num_experts` each, those of a layer of one size."""

    model: str
    """Fingerprint of the weights."""
    layers: tuple[int, ...]
    """The layers that have routed experts, ascending."""
    num_experts: int
    """Per layer."""
    expert_bytes: int
    """Of an expert of most layers."""
    shards: int
    """How many shares the experts are divided into."""
    replicas: int = 1
    redundancy: float = 0.0
    other_bytes: tuple[tuple[int, int], ...] = ()
    """(layer, bytes of one of its experts) where that is not `expert_bytes`."""

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All of them, ascending."""
        return tuple((layer, expert) for layer in self.layers for expert in range(self.num_experts))

    @cached_property
    def sizes(self) -> Mapping[Expert, int]:
        """Bytes of each."""
        other = dict(self.other_bytes)
        return {expert: other.get(expert[0], self.expert_bytes) for expert in self.experts}

    def num_bytes(self, experts: Iterable[Expert]) -> int:
        """Of all of `experts`, which need not be this model's."""
        return sum(self.sizes.get(expert, self.expert_bytes) for expert in experts)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers), "other_bytes": [list(pair) for pair in self.other_bytes]}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> RouterSpec:
        fields: dict[str, Any] = dict(wire)
        fields["layers"] = tuple(fields["layers"])
        fields["other_bytes"] = tuple((layer, size) for layer, size in fields["other_bytes"])
        return cls(**fields)
