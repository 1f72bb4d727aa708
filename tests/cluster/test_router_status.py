"""What the router's status says, and how it gets rates and imbalance out of running totals."""

from __future__ import annotations

import pytest

from herd.cluster.expert_load import WINDOW_S, ClusterLoad, ShardLoad
from herd.cluster.expert_map import Expert, pack_experts
from herd.cluster.router_spec import RouterSpec
from herd.cluster.router_state import ENGINE_MEMORY_S, RouterState

from .router_world import Clock, RouterWorld


def loads(experts: tuple[Expert, ...], rows: dict[Expert, int], **totals: float) -> dict:
    packed = [[layer, [rows.get((layer, e), 0) for e in ids]] for layer, ids in pack_experts(experts)]
    return {"rows": sum(rows.values()), "experts": packed, **totals}


def test_status_tells_of_shards_engines_and_experts() -> None:
    clock = Clock()
    state = RouterState(RouterSpec("f00d", (4,), 4, 100, shards=2), clock, token="secret")
    state.request_lease("x", "a", "", None, pid=11)
    second = state.request_lease("y", "b", "GPU-3", None, pid=12)
    first = state.request_lease("x", "a", "", None, pid=11)
    assert first is not None
    assert second is not None
    state.ready("x", host="10.0.0.1", port=5000, uds="")
    state.follow("engine", 1)
    assert state.beat("x", loads(first.experts, {}))
    clock.now += 2.0
    rows = {first.experts[0]: 30, first.experts[1]: 10}
    assert state.beat("x", loads(first.experts, rows, busy_s=0.5, queued_rows=7))
    clock.now += 0.25
    status = state.status()
    assert status["model"] == "f00d"
    assert status["epoch"] == 1
    assert status["router"] == {"restarts": 0, "up_s": 2.25}
    assert status["experts"] == {
        "layers": 1, "per_layer": 4, "units": 4, "bytes_each": 100, "copies": 2, "missing": 2
    }  # fmt: skip
    assert status["shards"][0] == {
        "shard_id": "x",
        "slot": 0,
        "state": "ready",
        "node_id": "a",
        "host": "10.0.0.1",
        "experts": 2,
        "hosted": [[4, [0, 2]]],
        "bytes": 200,
        "epoch": 1,
        "beat_age_s": 0.25,
        "pid": 11,
        "device": "cpu",
        "rows_per_s": 20.0,
        "busy": 0.25,
        "queued_rows": 7,
        "rows": 40,
    }
    shard = status["shards"][1]
    assert (shard["state"], shard["host"], shard["device"], shard["epoch"]) == ("loading", "", "GPU-3", 0)
    assert status["engines"] == [{"engine_id": "engine", "epoch": 1, "seen_age_s": 2.25}]
    assert status["imbalance"] == {"max_over_mean": 1.0, "worst_layer": {"layer": 4, "max_over_mean": 1.0}}
    hot = [(expert["expert"], expert["share"], expert["copies"]) for expert in status["hot_experts"]]
    assert hot == [(first.experts[0][1], 0.75, 1), (first.experts[1][1], 0.25, 1)]


def test_the_load_of_a_shard_that_is_gone_is_forgotten() -> None:
    world = RouterWorld()
    (lease, _, _) = world.start("x", "y", "z")
    for rows in (0, 100):
        world.clock.now += 0.1
        world.state.beat("x", loads(lease.experts, {lease.experts[0]: rows}))
    assert world.state.status()["hot_experts"]
    world.state.leave("x")
    assert not world.state.status()["hot_experts"]


def test_an_engine_that_is_gone_is_forgotten() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    world.state.follow("old", 1)
    world.pass_time(ENGINE_MEMORY_S / 2)
    world.state.follow("new", 3)
    world.pass_time(ENGINE_MEMORY_S / 2 + 1.0)
    assert [engine["engine_id"] for engine in world.state.status()["engines"]] == ["new"]


def test_idle_is_when_nobody_is_heard_of() -> None:
    world = RouterWorld()
    world.start("x", "y", "z")
    world.pass_time(3.0)
    assert world.state.idle_s == 0.0
    world.kill("x", "y", "z")
    world.pass_time(5.0)
    assert world.state.idle_s == pytest.approx(5.0)
    world.state.follow("engine", 1)
    assert world.state.idle_s == 0.0


EXPERTS = ((0, 1), (0, 5), (3, 2))


def test_rates_are_of_the_last_seconds() -> None:
    load = ShardLoad(EXPERTS)
    assert (load.rows_per_s, load.busy, load.expert_rates()) == (0.0, 0.0, {})
    rows = 0
    for second in range(60):
        rows += 100 if second < 50 else 10
        load.beat(loads(EXPERTS, {(0, 5): rows}, busy_s=rows / 1000), float(second))
        assert len(load._samples) <= WINDOW_S + 2
    assert load.rows_per_s == pytest.approx(10.0)
    assert load.busy == pytest.approx(0.01)
    assert load.expert_rates() == pytest.approx({(0, 1): 0.0, (0, 5): 10.0, (3, 2): 0.0})
    assert load.rows == rows


@pytest.mark.parametrize("later", [{(0, 1): 5}, {(0, 1): 50, (0, 5): 2000}])
def test_counters_that_begin_anew_are_no_negative_rates(later: dict[Expert, int]) -> None:
    load = ShardLoad(EXPERTS)
    load.beat(loads(EXPERTS, {(0, 1): 1000}), 0.0)
    load.beat(loads(EXPERTS, {(0, 1): 1500}), 1.0)
    load.beat(loads(EXPERTS, later), 2.0)
    assert load.rows_per_s == 0.0
    load.beat(loads(EXPERTS, {expert: rows + 8 for expert, rows in later.items()}), 4.0)
    assert load.expert_rates()[0, 1] == 4.0


def test_beats_without_figures_are_beats() -> None:
    load = ShardLoad(EXPERTS)
    load.beat({}, 0.0)
    load.beat({"rows": 10, "experts": [[0, [10]]]}, 1.0)
    assert load.rows_per_s == 10.0
    assert load.expert_rates() == {}


def test_imbalance_overall_and_of_the_worst_layer() -> None:
    cluster = ClusterLoad()
    hosted = {"x": ((0, 0), (1, 0)), "y": ((0, 1), (1, 1)), "idle": ((0, 2), (1, 0))}
    rows = {"x": {(0, 0): 30, (1, 0): 10}, "y": {(0, 1): 30, (1, 1): 50}, "idle": {}}
    assert cluster.imbalance(hosted).max_over_mean is None
    for now, factor in ((0.0, 0), (1.0, 1)):
        for shard_id, experts in hosted.items():
            of_shard = {expert: count * factor for expert, count in rows[shard_id].items()}
            cluster.beat(shard_id, experts, loads(experts, of_shard), now)
    imbalance = cluster.imbalance(hosted)
    assert imbalance.max_over_mean == 80 * 3 / 120
    assert (imbalance.worst_layer, imbalance.worst_max_over_mean) == (1, 50 * 3 / 60)
    assert cluster.expert_rates() == {(0, 0): 30, (1, 0): 10, (0, 1): 30, (1, 1): 50, (0, 2): 0}
    cluster.forget("y")
    assert cluster.imbalance(["x", "idle"]).max_over_mean == 2.0
