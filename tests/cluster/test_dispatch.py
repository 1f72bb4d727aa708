"""The dispatcher over fake shards: whatever they do, each row comes back once and right, or is named as failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest
import torch

from herd.cluster.dispatch import Dispatcher
from herd.cluster.errors import ExpertUnavailable
from herd.cluster.expert_frames import Kind
from herd.cluster.experts_config import ExpertsConfig
from herd.model.experts import ExpertsUnavailable

from .fake_shards import Act, FakeCluster, expected

LAYERS, EXPERTS = 2, 4
ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
WAIT_S = 20.0


@pytest.fixture
def make() -> Iterator[Callable[..., Dispatcher]]:
    made: list[Dispatcher] = []

    def build(cluster: FakeCluster, complete: bool = True, **settings_: object) -> Dispatcher:
        config = ExpertsConfig.model_validate({"call_timeout_s": 0.03, "recovery_timeout_s": WAIT_S} | settings_)
        made.append(Dispatcher(config, experts=ALL, connect=cluster.connect))
        cluster.publish(made[-1].update)
        if complete:
            made[-1].wait_complete(WAIT_S)
            cluster.wait_connected(made[-1])
        return made[-1]

    yield build
    for dispatcher in made:
        dispatcher.stop()
        dispatcher.close()


def rows(*counts: int) -> torch.Tensor:
    total = sum(counts)
    return torch.arange(total * 3, dtype=torch.float32).view(total, 3)


def run(dispatcher: Dispatcher, counts: Sequence[int] = (3, 0, 2, 5), layer: int = 0) -> None:
    """One layer, with the right result."""
    rows_ND = rows(*counts)
    result_ND = dispatcher.collect(dispatcher.dispatch(layer, rows_ND, counts))
    assert torch.equal(result_ND, expected(layer, rows_ND, counts))


def halves() -> FakeCluster:
    """Two shards, each with half of the experts."""
    cluster = FakeCluster()
    cluster.add("even", [e for e in ALL if e[1] % 2 == 0])
    cluster.add("odd", [e for e in ALL if e[1] % 2])
    return cluster


def twins() -> FakeCluster:
    """Two shards, each with all experts."""
    cluster = FakeCluster()
    cluster.add("a", ALL)
    cluster.add("b", ALL)
    return cluster


def test_rows_go_to_their_experts_in_one_call_per_shard(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    run(dispatcher)
    assert [call.groups for call in cluster.shards["even"].calls] == [[(0, 3), (2, 2)]]
    assert [call.ranges for call in cluster.shards["even"].calls] == [[(0, 5)]]  # neighbours travel as one
    assert [call.groups for call in cluster.shards["odd"].calls] == [[(3, 5)]]
    run(dispatcher, (0, 0, 0, 1), layer=1)
    assert len(cluster.shards["even"].calls) == 1


def test_calls_larger_than_a_slot_are_cut_and_queued_behind_each_other(make: Callable[..., Dispatcher]) -> None:
    cluster = FakeCluster(max_rows=3, max_calls=2)
    cluster.add("one", ALL)
    run(make(cluster), (10, 1, 0, 9))
    assert sum(sum(n for _, n in call.groups) for call in cluster.shards["one"].calls) == 20
    assert len(cluster.shards["one"].calls) == 7


def test_two_layers_under_way_are_collected_in_any_order(make: Callable[..., Dispatcher]) -> None:
    dispatcher = make(halves())
    first_ND, second_ND = rows(4, 4, 0, 0), rows(0, 1, 1, 1) + 7
    first = dispatcher.dispatch(0, first_ND, (4, 4, 0, 0))
    second = dispatcher.dispatch(1, second_ND, (0, 1, 1, 1))
    assert torch.equal(dispatcher.collect(second), expected(1, second_ND, (0, 1, 1, 1)))
    assert torch.equal(dispatcher.collect(first), expected(0, first_ND, (4, 4, 0, 0)))


def test_busy_experts_are_shared_among_replicas_by_queue_depth(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    run(make(cluster), (6, 5, 4, 3))
    loads = sorted(sum(n for _, n in call.groups) for shard in cluster.shards.values() for call in shard.calls)
    assert loads == [9, 9]  # 6 + 3 and 5 + 4


@pytest.mark.parametrize("act", [Act.DIE_LATER, Act.DIE_ON_SUBMIT, Act.HOLD, Act.BUSY, Act.STALE, Act.ERROR])
def test_a_replica_takes_over(make: Callable[..., Dispatcher], act: Act) -> None:
    cluster = twins()
    dispatcher = make(cluster)
    cluster.shards["a"].acts.append(act)
    run(dispatcher)
    run(dispatcher)
    counted = {Act.HOLD: "late", Act.BUSY: "busy", Act.STALE: "stale", Act.ERROR: "errors"}.get(act, "lost_shards")
    assert dispatcher.stats()[counted] >= 1
    assert dispatcher.stats()["retries"] >= 1


def test_a_late_answer_of_an_earlier_call_changes_nothing(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    dispatcher = make(cluster)
    cluster.shards["a"].acts.append(Act.HOLD)
    run(dispatcher)
    assert dispatcher.stats()["late"] == 1
    cluster.shards["a"].channel.release()
    run(dispatcher, (1, 1, 1, 1))
    run(dispatcher, (1, 1, 1, 1))


def test_without_a_replica_a_late_shard_is_waited_for(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    odd = cluster.shards["odd"]
    odd.acts.append(Act.HOLD)
    pending = dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    timer = threading.Timer(0.1, odd.channel.release)
    timer.start()
    assert torch.equal(dispatcher.collect(pending), expected(0, rows(1, 1, 1, 1), (1, 1, 1, 1)))
    assert len(odd.calls) == 1
    timer.join()


@pytest.mark.parametrize("act", [Act.DIE_LATER, Act.HOLD])
def test_without_a_replica_the_replacement_is_waited_for(make: Callable[..., Dispatcher], act: Act) -> None:
    """Whether the old shard broke, or hangs and is then taken out of the map."""
    cluster = halves()
    dispatcher = make(cluster)
    old = cluster.shards.pop("odd")
    old.reachable = False
    old.acts.append(act)

    def replace() -> None:
        cluster.publish(dispatcher.update)
        cluster.add("new", old.experts)
        cluster.publish(dispatcher.update)

    timer = threading.Timer(0.1, replace)
    timer.start()
    run(dispatcher)
    timer.join()
    assert cluster.shards["new"].calls


def test_a_broken_connection_to_a_living_shard_is_made_anew(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    cluster.shards["odd"].acts.append(Act.DIE_LATER)
    run(dispatcher)
    assert len(cluster.shards["odd"].channels) == 2


def test_missing_experts_end_only_their_own_rows(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster, recovery_timeout_s=0.05)
    odd = cluster.shards.pop("odd")
    odd.reachable = False
    odd.channel.kill()
    with pytest.raises(ExpertsUnavailable) as caught:
        run(dispatcher, (2, 3, 1, 1))
    assert sorted(caught.value.rows) == [2, 3, 4, 6]
    assert "expert 1 of layer 0" in caught.value.message
    run(dispatcher, (2, 0, 1, 0))  # the others go on at once


def test_a_shard_that_keeps_failing_ends_its_rows(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    cluster.shards["odd"].acts.extend([Act.ERROR] * 3)
    with pytest.raises(ExpertsUnavailable, match="planted") as caught:
        run(dispatcher, (2, 3, 1, 1))
    assert sorted(caught.value.rows) == [2, 3, 4, 6]
    run(dispatcher)


def test_a_refusal_is_forgotten_with_the_next_map(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    cluster.shards["odd"].acts.append(Act.STALE)
    timer = threading.Timer(0.1, lambda: cluster.publish(dispatcher.update))
    timer.start()
    run(dispatcher)
    timer.join()
    assert dispatcher.stats()["stale"] == 1


def test_busy_shards_without_replicas_are_asked_again(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    cluster.shards["odd"].acts.extend([Act.BUSY] * 5)
    run(dispatcher)
    assert dispatcher.stats()["busy"] == 5


def test_hedging_sends_late_calls_twice_within_its_budget(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    dispatcher = make(cluster, call_timeout_s=WAIT_S, hedge_after_s=0.01, hedge_share=0.5)
    cluster.shards["a"].acts.append(Act.HOLD)
    run(dispatcher)
    stats = dispatcher.stats()
    assert (stats["hedges"], stats["hedge_wins"], stats["late"]) == (1, 1, 0)


def test_without_a_budget_nothing_is_hedged(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    dispatcher = make(cluster, call_timeout_s=WAIT_S, hedge_after_s=0.01, hedge_share=0.0)
    cluster.shards["a"].acts.append(Act.HOLD)
    pending = dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    timer = threading.Timer(0.1, cluster.shards["a"].channel.release)
    timer.start()
    dispatcher.collect(pending)
    timer.join()
    assert dispatcher.stats()["hedges"] == 0


def test_abandoned_layers_do_not_reach_later_ones(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    for shard in cluster.shards.values():
        shard.acts.append(Act.HOLD)
    dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    dispatcher.abandon()
    for shard in cluster.shards.values():
        shard.channel.release()
    run(dispatcher)


def test_stop_ends_a_wait(make: Callable[..., Dispatcher]) -> None:
    cluster = halves()
    dispatcher = make(cluster)
    cluster.shards["odd"].acts.append(Act.HOLD)
    timer = threading.Timer(0.05, dispatcher.stop)
    timer.start()
    with pytest.raises(ExpertsUnavailable, match="stopping"):
        run(dispatcher)
    timer.join()


def test_an_incomplete_cluster_is_said_to_be_so(make: Callable[..., Dispatcher]) -> None:
    cluster = FakeCluster()
    cluster.add("few", [(0, 0), (0, 1)])
    dispatcher = make(cluster, complete=False)
    with pytest.raises(ExpertUnavailable, match="expert 2 of layer 0, 3 of layer 0, 0 of layer 1 and 3 more"):
        dispatcher.wait_complete(0.3)


def test_shards_that_leave_the_map_finish_what_they_have(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    dispatcher = make(cluster, call_timeout_s=WAIT_S)
    leaving = cluster.shards["a"]
    leaving.acts.append(Act.HOLD)
    pending = dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    assert leaving.channel.held
    del cluster.shards["a"]
    cluster.publish(dispatcher.update)
    timer = threading.Timer(0.05, leaving.channel.release)
    timer.start()
    dispatcher.collect(pending)
    timer.join()
    run(dispatcher)
    assert leaving.channel.closed
    assert len(leaving.calls) == 1


def test_channels_are_closed_with_the_dispatcher() -> None:
    cluster = halves()
    dispatcher = Dispatcher(ExpertsConfig(), experts=ALL, connect=cluster.connect)
    cluster.publish(dispatcher.update)
    dispatcher.wait_complete(WAIT_S)
    dispatcher.close()
    assert all(channel.closed for shard in cluster.shards.values() for channel in shard.channels)


def triangle() -> FakeCluster:
    """Three shards and two copies of each expert, as placement makes them: no shard has all that another one has."""
    cluster = FakeCluster()
    cluster.add("a", [e for e in ALL if e[1] in (0, 1, 2)])
    cluster.add("b", [e for e in ALL if e[1] in (0, 3)])
    cluster.add("c", [e for e in ALL if e[1] in (1, 2, 3)])
    return cluster


def test_a_late_call_is_divided_among_those_that_have_its_experts(make: Callable[..., Dispatcher]) -> None:
    cluster = triangle()
    dispatcher = make(cluster)
    cluster.shards["a"].acts.append(Act.HOLD)
    run(dispatcher, (4, 4, 4, 4))
    assert cluster.shards["a"].calls[0].groups == [(0, 4), (2, 4)]
    assert dispatcher.stats()["late"] == 1


def test_a_late_answer_may_still_win_over_its_repetition(make: Callable[..., Dispatcher]) -> None:
    """Its rows count once, whoever comes first and whoever comes after."""
    cluster = triangle()
    dispatcher = make(cluster)
    for name in "abc":
        cluster.shards[name].acts.extend([Act.HOLD] * 2)
    releases = [cluster.shards[name].channel.release for name in "cabcab"]

    def release() -> None:
        for answer in releases:
            with suppress(IndexError):
                answer()

    timer = threading.Timer(0.2, release)
    timer.start()
    run(dispatcher, (4, 3, 2, 2))
    timer.join()
    for name in "abc":
        while cluster.shards[name].channel.held:
            cluster.shards[name].channel.release()
    run(dispatcher, (4, 3, 2, 2))


def test_what_waits_behind_a_late_call_goes_elsewhere(make: Callable[..., Dispatcher]) -> None:
    cluster = FakeCluster(max_rows=1, max_calls=2)
    cluster.add("a", ALL)
    cluster.add("b", ALL)
    dispatcher = make(cluster, recovery_timeout_s=600)
    cluster.shards["a"].acts.extend([Act.HOLD] * 2)
    give_up = threading.Timer(WAIT_S, dispatcher.stop)
    give_up.start()
    run(dispatcher, (0, 0, 0, 12))
    give_up.cancel()
    assert len(cluster.shards["a"].calls) <= 2


def test_a_refusal_under_an_older_map_is_not_held_against_the_shard(make: Callable[..., Dispatcher]) -> None:
    """The shard left and came back while the call was under way; its STALE comes after the map that has it again."""
    cluster = halves()
    dispatcher = make(cluster, call_timeout_s=WAIT_S)
    odd = cluster.shards["odd"]
    odd.acts.append(Act.HOLD)
    pending = dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    cluster.publish(dispatcher.update)
    odd.channel.release(Kind.STALE_MAP)
    assert torch.equal(dispatcher.collect(pending), expected(0, rows(1, 1, 1, 1), (1, 1, 1, 1)))
    assert dispatcher.stats()["stale"] == 1


def test_a_shard_that_fails_is_chosen_last(make: Callable[..., Dispatcher]) -> None:
    cluster = twins()
    dispatcher = make(cluster)
    cluster.shards["a"].acts.extend([Act.ERROR] * 50)
    for _ in range(8):
        run(dispatcher, (1, 0, 0, 0))
    assert dispatcher.stats()["errors"] == 3  # enough for the shard to know it, too


def test_an_idle_dispatcher_keeps_up_with_the_map(make: Callable[..., Dispatcher]) -> None:
    """Connections to shards that were replaced meanwhile do not pile up."""
    cluster = halves()
    dispatcher = make(cluster)
    experts = cluster.shards["odd"].experts
    generations = []
    for generation in range(5):
        generations.append(cluster.shards.pop("odd" if generation == 0 else f"odd{generation}"))
        cluster.add(f"odd{generation + 1}", experts)
        cluster.publish(dispatcher.update)
        deadline = time.monotonic() + WAIT_S
        while dispatcher.stats()["shards_connected"] < 2 or dispatcher.epoch < cluster.epoch:
            assert time.monotonic() < deadline
            dispatcher.refresh()
    assert all(shard.channel.closed for shard in generations)


def test_a_wait_for_a_late_shard_sleeps(make: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = halves()
    dispatcher = make(cluster, call_timeout_s=0.1)
    cluster.shards["odd"].acts.append(Act.HOLD)
    pending = dispatcher.dispatch(0, rows(1, 1, 1, 1), (1, 1, 1, 1))
    ready, waits = dispatcher._links.ready, []
    monkeypatch.setattr(dispatcher._links, "ready", lambda timeout_s: (waits.append(timeout_s), ready(timeout_s))[1])
    timer = threading.Timer(0.5, cluster.shards["odd"].channel.release)
    timer.start()
    dispatcher.collect(pending)
    timer.join()
    assert len(waits) < 30
