"""The router under random arrivals, deaths, hangs, reports and restarts: what `RouterWorld.check` says holds after
every move, and once nothing dies any more every expert is served again."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from herd.cluster.errors import PlacementError
from herd.cluster.expert_map import Expert
from herd.cluster.leases import LeaseState
from herd.cluster.router_spec import RouterSpec
from herd.cluster.router_state import VACANT_S

from .router_world import RouterWorld

picks = st.integers(0, 10**6)


class RouterMachine(RuleBasedStateMachine):
    @initialize(
        shards=st.integers(1, 5),
        replicas=st.integers(1, 3),
        redundancy=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        num_experts=st.integers(1, 7),
        layers=st.sampled_from([(0,), (1, 3), (0, 1, 2)]),
    )
    def begin(self, shards, replicas, redundancy, num_experts, layers) -> None:
        replicas = min(replicas, shards)
        self.world = RouterWorld(RouterSpec("f00d", layers, num_experts, 100, shards, replicas, redundancy))
        self.num_born = 0
        self.hosted: dict[str, tuple[Expert, ...]] = {}
        """What a process holds in memory, with or without a lease."""

    def pick(self, number: int) -> str | None:
        alive = sorted(self.world.lives)
        return alive[number % len(alive)] if alive else None

    def ask_again(self, shard_id: str) -> None:
        """A shard that runs asks, and has its experts loaded some time later; see `load`."""
        node, capacity = self.world.lives[shard_id]
        try:
            lease = self.world.ask(shard_id, node, capacity, self.hosted.get(shard_id, ()))
        except PlacementError:
            return
        if lease is not None and lease.experts == self.hosted.get(shard_id):
            self.world.ready(shard_id)

    @rule(node=st.sampled_from("abc"), room=st.sampled_from([None, None, None, 100, 700, 5000]))
    def arrive(self, node, room) -> None:
        if len(self.world.lives) < 9:
            self.num_born += 1
            shard_id = f"s{self.num_born}"
            self.world.lives[shard_id] = (node, room)
            self.ask_again(shard_id)

    @rule(number=picks)
    def ask(self, number) -> None:
        shard_id = self.pick(number)
        if shard_id is not None and shard_id not in self.world.hung:
            self.ask_again(shard_id)

    @rule(number=picks)
    def load(self, number) -> None:
        shard_id = self.pick(number)
        lease = self.world.state._leases.get(shard_id or "")
        if lease is not None and shard_id not in self.world.hung:
            before = self.world.state.map.epoch
            was_serving = lease.is_serving
            self.hosted[lease.shard_id] = lease.experts
            epoch = self.world.ready(lease.shard_id)
            assert was_serving or epoch == before + 1 == self.world.state.map.epoch
            assert lease.state is LeaseState.READY

    @rule(number=picks)
    def die(self, number) -> None:
        shard_id = self.pick(number)
        if shard_id is not None:
            self.world.kill(shard_id)
            self.hosted.pop(shard_id, None)

    @rule(number=picks)
    def leave(self, number) -> None:
        shard_id = self.pick(number)
        if shard_id is not None:
            was_in_map = shard_id in self.world.state.map.shards
            before = self.world.state.map.epoch
            self.world.state.leave(shard_id)
            assert self.world.state.map.epoch == before + was_in_map
            self.die(number)

    @rule(number=picks)
    def hang_or_wake(self, number) -> None:
        shard_id = self.pick(number)
        if shard_id is not None:
            self.world.hung ^= {shard_id}

    @rule(number=picks)
    def report(self, number) -> None:
        known = sorted(self.world.state.map.shards)
        if known:
            before = self.world.state.map
            self.world.state.report_lost(known[number % len(known)], "engine")
            assert self.world.state.map is before, "an engine alone takes nobody out of the map"

    @rule(seconds=st.sampled_from([0.05, 0.2, 0.6, 1.5, 2.5, 6.0]))
    def wait(self, seconds) -> None:
        asked = set(self.world.state._leases)
        serving = set(self.world.state.map.shards)
        healthy = (self.world.lives.keys() - self.world.hung) & serving
        self.world.pass_time(seconds)
        assert set(self.world.state._leases) <= asked, "nobody comes back without asking"
        assert self.world.state.map.shards.keys() <= serving
        for shard_id in healthy - self.world.state.map.shards.keys():
            assert self.hosted[shard_id] in self.world.state.map.hosted.values(), "who beats stays, unless it mirrors"
        if seconds > self.world.state.lease_ttl_s + 0.1:
            assert self.world.state._leases.keys() <= self.world.lives.keys() - self.world.hung, (
                "who does not beat goes"
            )

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0]))
    def restart_router(self, seconds) -> None:
        self.world.restart_router(seconds)

    @rule(seconds=st.sampled_from([1.0, 30.0]))
    def hold_up_router(self, seconds) -> None:
        before = set(self.world.state.map.shards) & (self.world.lives.keys() - self.world.hung)
        for shard_id in before:
            self.world.state.beat(shard_id, {})
        self.world.clock.now += seconds
        self.world.state.tick()
        assert before <= self.world.state.map.shards.keys(), "the router slept, not they"

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.world.state.status()

    def teardown(self) -> None:
        """The platform replaces what died; then all is served again."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.hung.clear()
        for shard_id, (_, room) in list(world.lives.items()):
            if room is not None:
                world.kill(shard_id)
        while len(world.lives) < world.state.spec.shards:
            self.arrive("a", None)
        deadline = world.clock.now + (VACANT_S + 3) * world.state.spec.shards
        while world.clock.now < deadline and (world.state.missing or not world.state.map.shards):
            for shard_id in sorted(world.lives):
                self.ask_again(shard_id)
            for number in range(len(world.lives)):
                self.load(number)
            world.pass_time(0.5)
        assert not world.state.missing


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
