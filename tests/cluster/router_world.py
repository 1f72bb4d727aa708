"""A router's state with a clock that tests move, and shards that are only names. `check` holds whatever happened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from herd.cluster.expert_map import Expert, ExpertMap
from herd.cluster.leases import Lease, LeaseState
from herd.cluster.router_spec import RouterSpec
from herd.cluster.router_state import NAP_S, RouterState

SPEC = RouterSpec(model="f00d", layers=(1, 3), num_experts=6, expert_bytes=100, shards=3)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RouterWorld:
    """Shards and their router. `lives` are the shards whose processes run and beat at every move of the clock, unless
    they are in `hung`."""

    def __init__(self, spec: RouterSpec = SPEC, **options: Any) -> None:
        self.clock = Clock()
        self.state = RouterState(replace(spec, **options), self.clock, token="secret")
        self.lives: dict[str, tuple[str, int | None]] = {}
        """Shard id -> (node, capacity)"""
        self.hung: set[str] = set()
        self.published: dict[int, ExpertMap] = {0: self.state.map}

    def ask(
        self, shard_id: str, node: str = "a", capacity: int | None = None, hosted: tuple[Expert, ...] = ()
    ) -> Lease | None:
        self.lives[shard_id] = (node, capacity)
        return self.state.request_lease(shard_id, node, "", capacity, hosted, pid=7)

    def lease(
        self, shard_id: str, node: str = "a", capacity: int | None = None, hosted: tuple[Expert, ...] = ()
    ) -> Lease:
        lease = self.ask(shard_id, node, capacity, hosted)
        assert lease is not None
        return lease

    def ready(self, shard_id: str) -> int:
        epoch = self.state.ready(shard_id, host="10.0.0.1", port=5000, uds=f"/run/{shard_id}")
        assert epoch is not None
        return epoch

    def start(self, *shard_ids: str, nodes: str = "abcdefgh") -> list[Lease]:
        """These shards ask and become ready; returns their leases."""
        for shard_id, node in zip(shard_ids, nodes, strict=False):
            self.ask(shard_id, node)
        leases = [self.lease(shard_id, node) for shard_id, node in zip(shard_ids, nodes, strict=False)]
        for shard_id in shard_ids:
            self.ready(shard_id)
        self.check()
        return leases

    def kill(self, *shard_ids: str) -> None:
        for shard_id in shard_ids:
            del self.lives[shard_id]

    def pass_time(self, seconds: float) -> None:
        """In steps short enough that the router misses nothing."""
        steps = max(1, round(seconds / 0.1))
        for _ in range(steps):
            self.clock.now += seconds / steps
            for shard_id in self.lives.keys() - self.hung:
                self.state.beat(shard_id, {})
            self.state.tick()
            self.check()

    def restart_router(self, away_s: float = 0.0) -> None:
        old = self.state
        self.clock.now += away_s
        self.state = RouterState.restore(old.checkpoint(), self.clock)
        assert self.state.map == old.map
        assert self.state.map.replicas == old.map.replicas
        assert self.state.spec == old.spec
        self.check()

    def check(self) -> None:
        """What is true at any time."""
        state, expert_map = self.state, self.state.map
        seen = self.published.setdefault(expert_map.epoch, expert_map)
        assert seen == expert_map, "one epoch, two maps"
        assert expert_map.epoch == max(self.published), "the epoch went back"
        serving = {i: lease for i, lease in state._leases.items() if lease.is_serving}
        assert expert_map.shards.keys() == expert_map.hosted.keys() == serving.keys()
        for shard_id, lease in state._leases.items():
            assert lease.state is not LeaseState.GONE
            assert lease.experts == state._slots[lease.slot]
            assert lease.expires_at <= self.clock.now + state.lease_ttl_s
            assert lease.expires_at > self.clock.now - NAP_S
            if lease.is_serving:
                assert expert_map.hosted[shard_id] == lease.experts
                assert expert_map.shards[shard_id].slot == lease.slot
                assert 0 < lease.entered <= expert_map.epoch
        hosted = {expert for experts in expert_map.hosted.values() for expert in experts}
        assert set(state.missing) == set(state.spec.experts) - hosted
        if state._slots:
            assert {expert for slot in state._slots for expert in slot} == set(state.spec.experts)
