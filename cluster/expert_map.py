"""Where every expert lives: one immutable, numbered map for the whole cluster. Values only; who publishes and who
follows it are others' matter. An expert is named by (layer, expert index)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

Expert = tuple[int, int]
"""(layer, expert)"""


@dataclass(frozen=True, slots=True)
class ShardEndpoint:
    """How to reach one shard process."""

    shard_id: str
    """Of one life of one process: a replacement has another."""
    slot: int
    """Which share of the experts it holds; two shards may hold the same one."""
    node_id: str
    host: str
    port: int
    """TCP"""
    uds: str
    """Path of its Unix socket on its node; empty where there is none."""


@dataclass(frozen=True)
class ExpertMap:
    """Version `epoch` of who hosts what. Only shards that are ready are in it."""

    epoch: int
    model: str
    """Fingerprint of the weights; peers of another one are refused."""
    token: str
    """The cluster's secret, which every peer of the data plane must prove to hold."""
    shards: Mapping[str, ShardEndpoint] = field(default_factory=dict)
    hosted: Mapping[str, tuple[Expert, ...]] = field(default_factory=dict)
    """Shard id -> its experts, ascending."""

    @cached_property
    def replicas(self) -> Mapping[Expert, tuple[str, ...]]:
        """Expert -> ids of the shards that host it, by slot."""
        found: dict[Expert, list[str]] = defaultdict(list)
        for shard_id in sorted(self.hosted, key=lambda s: (self.shards[s].slot, s)):
            for expert in self.hosted[shard_id]:
                found[expert].append(shard_id)
        return {expert: tuple(ids) for expert, ids in found.items()}

    def to_wire(self) -> dict[str, Any]:
        """Plain values, small for many experts."""
        shards = [asdict(shard) | {"experts": pack_experts(self.hosted[i])} for i, shard in self.shards.items()]
        return {"epoch": self.epoch, "model": self.model, "token": self.token, "shards": shards}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ExpertMap:
        shards, hosted = {}, {}
        for fields in wire["shards"]:
            fields = dict(fields)
            experts = unpack_experts(fields.pop("experts"))
            shard = ShardEndpoint(**fields)
            shards[shard.shard_id], hosted[shard.shard_id] = shard, experts
        return cls(wire["epoch"], wire["model"], wire["token"], shards, hosted)


def pack_experts(experts: Sequence[Expert]) -> list[list[Any]]:
    """[[layer, [expert, ...]], ...], both ascending."""
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, expert in sorted(experts):
        layers[layer].append(expert)
    return [[layer, ids] for layer, ids in layers.items()]


def unpack_experts(packed: Sequence[Sequence[Any]]) -> tuple[Expert, ...]:
    """The inverse of `pack_experts`."""
    return tuple((layer, expert) for layer, ids in packed for expert in ids)
