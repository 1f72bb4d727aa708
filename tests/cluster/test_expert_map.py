"""The map's wire form and the order of replicas."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.cluster.expert_map import Expert, ExpertMap, ShardEndpoint, pack_experts, unpack_experts

experts = st.sets(st.tuples(st.integers(0, 50), st.integers(0, 200)), max_size=40).map(lambda e: tuple(sorted(e)))


def endpoint(shard_id: str, slot: int) -> ShardEndpoint:
    return ShardEndpoint(shard_id, slot, node_id=f"node of {shard_id}", host="10.0.0.1", port=5000 + slot, uds="")


@st.composite
def maps(draw: st.DrawFn) -> ExpertMap:
    slots = draw(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 4), max_size=6))
    return ExpertMap(
        epoch=draw(st.integers(0, 2**40)),
        model="f00d",
        token="secret",
        shards={shard_id: endpoint(shard_id, slot) for shard_id, slot in slots.items()},
        hosted={shard_id: draw(experts) for shard_id in slots},
    )


@given(maps())
def test_the_wire_form_gives_the_same_map(expert_map: ExpertMap) -> None:
    assert ExpertMap.from_wire(json.loads(json.dumps(expert_map.to_wire()))) == expert_map


@given(experts)
def test_packed_experts_come_back(of_shard: tuple[Expert, ...]) -> None:
    packed = pack_experts(of_shard)
    assert unpack_experts(packed) == of_shard
    assert [layer for layer, _ in packed] == sorted({layer for layer, _ in of_shard})


@given(maps())
def test_replicas_are_who_hosts_by_slot(expert_map: ExpertMap) -> None:
    replicas = expert_map.replicas
    assert set(replicas) == {expert for hosted in expert_map.hosted.values() for expert in hosted}
    for expert, shard_ids in replicas.items():
        assert sorted(shard_ids) == sorted(i for i, hosted in expert_map.hosted.items() if expert in hosted)
        assert list(shard_ids) == sorted(shard_ids, key=lambda i: (expert_map.shards[i].slot, i))


def test_replicas_of_one_slot_come_by_name() -> None:
    shards = {name: endpoint(name, slot) for name, slot in (("z", 0), ("b", 1), ("a", 1), ("c", 0))}
    expert_map = ExpertMap(3, "f00d", "secret", shards, dict.fromkeys(shards, ((7, 1),)))
    assert expert_map.replicas == {(7, 1): ("c", "z", "a", "b")}


def test_a_map_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        ExpertMap(1, "f00d", "secret").epoch = 2  # pyright: ignore[reportAttributeAccessIssue]
