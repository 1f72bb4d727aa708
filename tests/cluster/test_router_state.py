"""How shards enter the map and leave it, and what outlives the router; `test_router_properties.py` mixes it all."""

from __future__ import annotations

import pytest

from herd.cluster.errors import DigestMismatch
from herd.cluster.router_spec import RouterSpec
from herd.cluster.router_state import NAP_S, SUSPECT_S

from .router_world import SPEC, RouterWorld

# Into the map and out of it


def test_a_shard_enters_the_map_when_it_is_ready() -> None:
    world = RouterWorld()
    for shard_id in ("x", "y", "z"):
        world.ask(shard_id)
    assert world.ready("z") == 1
    assert world.ready("z") == 1, "once"
    assert list(world.state.map.shards) == ["z"]
    assert world.ready("y") == 2
    endpoint = world.state.map.shards["y"]
    assert (endpoint.slot, endpoint.node_id, endpoint.host, endpoint.port) == (1, "a", "10.0.0.1", 5000)
    assert len(world.state.missing) == 4


def test_a_shard_without_a_lease_is_told_so() -> None:
    world = RouterWorld()
    assert not world.state.beat("ghost", {})
    assert world.state.ready("ghost", host="", port=1, uds="") is None
    world.state.leave("ghost")
    world.state.report_lost("ghost", "engine")
    assert world.state.map.epoch == 0


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_silent_shard_goes_after_its_time(is_ready: bool) -> None:
    world = RouterWorld()
    world.start("w", "x", "y")
    world.state.leave("y")
    world.kill("y")
    world.lease("z")
    if is_ready:
        world.ready("z")
    epoch = world.state.map.epoch
    world.kill("z")
    world.pass_time(world.state.lease_ttl_s - 0.2)
    assert world.state.map.epoch == epoch
    world.pass_time(0.3)
    assert world.state.map.epoch == epoch + is_ready
    assert not world.state.beat("z", {})


def test_shards_lost_at_once_make_one_map() -> None:
    world = RouterWorld(shards=4, replicas=2)
    world.start("w", "x", "y", "z")
    epoch = world.state.map.epoch
    world.kill("w", "y")
    world.pass_time(world.state.lease_ttl_s + 0.2)
    assert world.state.map.epoch == epoch + 1
    assert set(world.state.map.shards) == {"x", "z"}
    leases = world.start("v", "u", nodes="ef")
    assert sorted(lease.slot for lease in leases) == [0, 2]
    assert not world.state.missing


def test_a_reported_shard_goes_unless_it_beats() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    world.kill("z")
    world.state.report_lost("x", "engine")
    world.state.report_lost("z", "engine")
    assert set(world.state.map.shards) == {"x", "y", "z"}, "an engine may be wrong"
    assert [shard["state"] for shard in world.state.status()["shards"]] == ["suspect", "ready", "suspect"]
    world.pass_time(SUSPECT_S / 2)
    world.state.report_lost("z", "another engine")
    world.pass_time(SUSPECT_S / 2 + 0.1)
    assert set(world.state.map.shards) == {"x", "y"}


def test_a_shard_that_leaves_is_out_at_once() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    epoch = world.state.map.epoch
    world.state.leave("y")
    assert world.state.map.epoch == epoch + 1
    assert "y" not in world.state.map.shards
    world.kill("y")
    assert world.lease("new").slot == 1


def test_a_router_that_was_held_up_does_not_blame_the_shards() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    world.pass_time(1.0)
    world.clock.now += 60.0
    assert not world.state.tick()
    world.kill("z")
    world.pass_time(world.state.lease_ttl_s - NAP_S - 0.2)
    assert set(world.state.map.shards) == {"x", "y", "z"}
    world.pass_time(NAP_S + 0.3)
    assert set(world.state.map.shards) == {"x", "y"}


# Digests


def test_other_bytes_than_the_first_loader_had_are_refused() -> None:
    world = RouterWorld()
    world.state.check_digests("x", {(1, 0): "aa", (1, 1): "bb"})
    world.state.check_digests("y", {(1, 1): "bb", (3, 0): "cc"})
    with pytest.raises(DigestMismatch, match=r"layer 3, expert 0: shard z loaded weights with digest dd, .* has cc"):
        world.state.check_digests("z", {(3, 0): "dd", (3, 5): "ee"})
    world.restart_router()
    world.state.check_digests("w", {(3, 5): "ff"})
    with pytest.raises(DigestMismatch, match="layer 1, expert 0"):
        world.state.check_digests("w", {(1, 0): "bb"})


# The router's own death


def test_a_restarted_router_knows_what_it_knew() -> None:
    world = RouterWorld(redundancy=0.25)
    for shard_id in ("x", "y", "z", "x", "y"):
        world.ask(shard_id)
    loading = world.lease("z").experts
    world.ready("x")
    world.ready("y")
    world.restart_router(away_s=100.0)
    assert world.state.status()["router"]["restarts"] == 1
    world.pass_time(1.0)
    assert set(world.state.map.shards) == {"x", "y"}
    assert world.state.map.token == "secret"
    assert world.lease("z").experts == loading
    assert world.ready("z") == 3
    world.kill("x")
    world.pass_time(world.state.lease_ttl_s + 0.2)
    world.restart_router()
    assert world.state.map.epoch == 4
    assert world.state.status()["router"]["restarts"] == 2


def test_changes_tell_when_a_checkpoint_is_due() -> None:
    world = RouterWorld()

    def changed() -> bool:
        nonlocal last
        was, last = last, world.state.changes
        return last > was

    last = world.state.changes
    world.ask("x")
    world.ask("y")
    assert not changed()
    world.ask("z")
    assert changed(), "leases"
    world.ready("x")
    assert changed(), "map"
    world.ready("x")
    world.state.beat("x", {})
    world.state.follow("engine", 1)
    world.state.tick()
    assert not changed()
    world.state.check_digests("x", {(1, 0): "aa"})
    assert changed()
    world.state.check_digests("y", {(1, 0): "aa"})
    assert not changed()
    world.state.leave("y")
    assert changed(), "a lease ended, though the map is the same"


def test_the_spec_comes_back_from_its_wire_form() -> None:
    assert RouterSpec.from_wire(SPEC.to_wire()) == SPEC
    assert len(SPEC.experts) == 12
