"""Who gets which share of the experts: the first leases, experts that do not fit, newcomers, shards that come back."""

from __future__ import annotations

import pytest

from herd.cluster.errors import PlacementError
from herd.cluster.expert_map import Expert
from herd.cluster.leases import Lease, LeaseState
from herd.cluster.router_state import SUSPECT_S, VACANT_S, RouterState

from .router_world import SPEC, RouterWorld


def slots_of(leases: list[Lease]) -> list[int]:
    return [lease.slot for lease in leases]


# The first leases


def test_the_experts_are_divided_once_all_shards_have_asked() -> None:
    world = RouterWorld()
    assert world.ask("x") is None
    assert world.ask("y") is None
    assert world.ask("x") is None, "asking again does not count twice"
    leases = [world.lease("z"), world.lease("x"), world.lease("y")]
    assert sorted(slots_of(leases)) == [0, 1, 2]
    assert sorted(expert for lease in leases for expert in lease.experts) == list(SPEC.experts)
    assert {len(lease.experts) for lease in leases} == {4}
    assert world.state.map.epoch == 0
    assert world.state.missing == SPEC.experts


def test_a_shard_that_asks_again_has_the_same_lease() -> None:
    world = RouterWorld()
    (x, _, _) = world.start("x", "y", "z")
    assert world.ask("x") is x
    assert len(world.state.map.shards) == 3


def test_the_window_closes_without_those_who_do_not_come() -> None:
    """Their share is planned as if they were like the others, on nodes of their own."""
    world = RouterWorld(replicas=2)
    first_asked = world.clock.now
    while world.clock.now < first_asked + world.state.gather_s - 0.2:
        assert world.ask("x", "a", capacity=800) is None
        assert world.ask("y", "b", capacity=800) is None
        world.pass_time(0.5)
    world.pass_time(0.5)
    leases = [world.lease("x", "a", capacity=800), world.lease("y", "b", capacity=800)]
    late = world.lease("z", "c", capacity=800)
    assert slots_of(leases) == [0, 1]
    assert late.slot == 2
    assert {len(lease.experts) for lease in [*leases, late]} == {8}


def test_who_stops_asking_is_not_waited_for() -> None:
    world = RouterWorld()
    assert world.ask("x") is None
    world.pass_time(world.state.gather_s + 0.1)
    assert world.ask("y") is None, "x is gone, so that y is the first"


def test_shares_follow_the_capacities() -> None:
    world = RouterWorld()
    world.ask("small", capacity=250)
    world.ask("large", capacity=10_000)
    world.ask("middle", capacity=400)
    taken = {i: len(world.lease(i).experts) for i in ("small", "middle", "large")}
    assert taken == {"small": 2, "middle": 4, "large": 6}


def test_the_absent_are_planned_with_the_lower_median_of_the_present() -> None:
    world = RouterWorld()
    world.ask("small", capacity=250)
    world.ask("large", capacity=10_000)
    world.pass_time(world.state.gather_s - 0.1)
    world.ask("small", capacity=250)
    world.ask("large", capacity=10_000)
    world.pass_time(0.2)
    assert len(world.lease("large", capacity=10_000).experts) == 8


def test_copies_are_on_different_nodes() -> None:
    world = RouterWorld(shards=4, replicas=2)
    nodes = {"w": "a", "x": "a", "y": "b", "z": "b"}
    world.start(*nodes, nodes="aabb")
    for replicas in world.state.map.replicas.values():
        assert {nodes[shard_id] for shard_id in replicas} == {"a", "b"}


def test_shards_that_outlived_their_router_keep_what_they_hold() -> None:
    """When its checkpoint is lost as well."""
    world = RouterWorld()
    before = {lease.shard_id: lease.experts for lease in world.start("x", "y", "z")}
    world.state = RouterState(SPEC, world.clock, token="another")
    for shard_id in ("z", "y"):
        assert world.ask(shard_id, hosted=before[shard_id]) is None
    world.lease("x", hosted=before["x"])
    assert {i: world.lease(i).experts for i in before} == before


# Experts that do not fit


def test_every_asker_hears_that_the_experts_do_not_fit() -> None:
    world = RouterWorld()
    assert world.ask("x", capacity=300) is None
    assert world.ask("y", capacity=300) is None
    says = "12 copies of 12 experts take 1.2 KiB; 3 shards have room for 900 bytes .*, 300 bytes too little"
    for shard_id in ("z", "x", "y"):
        with pytest.raises(PlacementError, match=says):
            world.ask(shard_id, capacity=300)
    world.check()
    # Those who ask again wait anew, and shards with more room are welcome.
    assert world.ask("x", capacity=300) is None
    assert world.ask("large", capacity=600) is None
    world.lease("larger", capacity=1200)
    assert len(world.lease("x").experts) == 3
    world.ready("x")


def test_a_newcomer_too_small_for_any_vacant_share_hears_so() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    world.state.leave("y")
    with pytest.raises(PlacementError, match=r"shard tiny has room for 350 bytes .* needs 400 bytes, 50 bytes more"):
        world.ask("tiny", capacity=350)
    assert world.lease("enough", capacity=400).slot == 1


# Newcomers


def test_a_vacant_slot_with_orphans_comes_first() -> None:
    world = RouterWorld(shards=3, replicas=1)
    world.start("x", "y", "z")
    world.ask("mirror")
    world.pass_time(world.state.lease_ttl_s)
    mirrored = world.lease("mirror").slot
    for shard_id in ("x", "y", "z"):
        world.state.leave(shard_id)
    world.kill("x", "y", "z")
    slots = slots_of([world.lease("u"), world.lease("v")])
    assert sorted([mirrored, *slots]) == [0, 1, 2]


def test_a_vacant_slot_whose_copies_are_elsewhere_is_preferred() -> None:
    """Slots 0 and 1 hold copies of each other's experts on nodes a and b, as do 2 and 3 on nodes c and d."""
    world = RouterWorld(shards=4, replicas=2, layers=(0,), num_experts=4)
    leases = world.start("w", "x", "y", "z")
    first = leases[0].experts
    pair = next(lease for lease in leases[1:] if lease.experts == first)
    other, another = (lease for lease in leases[1:] if lease is not pair)
    world.state.leave(pair.shard_id)
    world.state.leave(another.shard_id)
    node_of_first, node_of_other = leases[0].node_id, other.node_id
    assert world.lease("near first", node_of_first).experts == other.experts
    assert world.lease("near other", node_of_other).experts == first


def test_a_large_newcomer_leaves_small_slots_to_small_ones() -> None:
    world = RouterWorld()
    capacities = {"small": 250, "large": 10_000, "middle": 400}
    for shard_id, capacity in capacities.items():
        world.ask(shard_id, capacity=capacity)
    for shard_id in capacities:
        world.lease(shard_id)
        world.state.leave(shard_id)
    assert len(world.lease("new large", capacity=10_000).experts) == 6
    assert len(world.lease("new middle", capacity=400).experts) == 4
    assert len(world.lease("new small", capacity=250).experts) == 2


def test_a_newcomer_waits_for_the_slot_of_the_dead() -> None:
    """Serve may start the replacement before anybody knows of the death."""
    world = RouterWorld()
    world.start("x", "y", "z")
    world.kill("y")
    assert world.ask("new") is None
    world.pass_time(world.state.lease_ttl_s - 0.2)
    assert world.ask("new") is None
    world.pass_time(0.3)
    assert world.lease("new").slot == 1


def test_one_more_shard_becomes_a_mirror() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    slots = []
    for number in range(4):
        name = f"mirror {number}"
        assert world.ask(name) is None
        world.pass_time(world.state.lease_ttl_s)
        slots.append(world.lease(name).slot)
        world.ready(name)
    assert sorted(slots[:3]) == [0, 1, 2], "beside the fewest others"
    assert len(world.state.map.shards) == 7
    assert all(len(replicas) > 1 for replicas in world.state.map.replicas.values())


def test_a_mirror_is_on_another_node_if_it_can_be() -> None:
    world = RouterWorld()
    leases = world.start("x", "y", "z", nodes="abc")
    world.ask("mirror", "a")
    world.pass_time(world.state.lease_ttl_s)
    assert world.lease("mirror", "a").node_id not in {s.node_id for s in leases if s.slot == world.lease("mirror").slot}


def test_a_mirror_is_released_for_experts_that_nobody_replaces() -> None:
    """As when the last shard of an old version ends after its slot's neighbour got two of the new ones."""
    world = RouterWorld()
    world.start("x", "y", "z")
    world.ask("mirror")
    world.pass_time(world.state.lease_ttl_s)
    mirrored = world.lease("mirror")
    world.ready("mirror")
    lost = next(lease for lease in world.state._leases.values() if lease.slot != mirrored.slot)
    world.state.leave(lost.shard_id)
    world.kill(lost.shard_id)
    world.pass_time(VACANT_S - 0.2)
    assert "mirror" in world.state.map.shards, "a replacement may be on its way"
    world.pass_time(0.4)
    assert "mirror" not in world.state.map.shards
    assert len(world.state.missing) == 4
    assert world.lease("mirror", hosted=mirrored.experts).slot == lost.slot
    world.ready("mirror")
    world.pass_time(2 * VACANT_S)
    assert len(world.state.map.shards) == 3
    assert not world.state.missing


def hang_until_expelled(world: RouterWorld, shard_id: str) -> tuple[Expert, ...]:
    hosted = world.state.map.hosted[shard_id]
    world.hung.add(shard_id)
    world.state.report_lost(shard_id, "engine")
    world.pass_time(SUSPECT_S + 0.1)
    assert shard_id not in world.state.map.shards
    world.hung.remove(shard_id)
    world.pass_time(1.0)
    assert shard_id not in world.state.map.shards, "it has not asked"
    return hosted


def test_a_shard_that_was_only_hung_gets_its_experts_back() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    hosted = hang_until_expelled(world, "z")
    epoch = world.state.map.epoch
    assert world.lease("z", hosted=hosted).experts == hosted
    assert world.ready("z") == epoch + 1


def test_it_gets_them_back_while_its_replacement_loads() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    hosted = hang_until_expelled(world, "z")
    replacement = world.lease("new")
    assert replacement.experts == hosted
    assert world.lease("z", hosted=hosted).slot == replacement.slot
    world.ready("z")
    world.ready("new")
    assert set(world.state.map.shards) == {"x", "y", "z", "new"}


def test_but_a_vacant_slot_comes_before_a_second_copy() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    hosted = hang_until_expelled(world, "z")
    world.lease("new")
    world.ready("new")
    world.state.leave("x")
    world.kill("x")
    assert world.lease("z", hosted=hosted).slot == 0


def test_without_a_vacant_slot_it_is_a_second_copy_of_its_own() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    hosted = hang_until_expelled(world, "z")
    world.lease("new")
    world.ready("new")
    assert world.ask("z", hosted=hosted) is None
    world.pass_time(0.1)
    assert world.lease("z", hosted=hosted).experts == hosted


# The lease itself


def test_a_lease_refuses_illegal_moves() -> None:
    lease = Lease("x", 0, (), "a", "", 1, heard_at=0.0, expires_at=2.0)
    with pytest.raises(AssertionError, match="loading -> suspect"):
        lease.advance(LeaseState.SUSPECT)
    lease.suspect(1.0)
    assert lease.expires_at == 2.0, "nobody can have lost a shard that serves nobody"
    lease.advance(LeaseState.READY)
    lease.advance(LeaseState.GONE)
    with pytest.raises(AssertionError, match="gone -> ready"):
        lease.advance(LeaseState.READY)
