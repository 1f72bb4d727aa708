"""The dispatcher over fake shards: whatever they do, each row comes back once and right, or is named as failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.cluster.dispatch import Dispatcher
from herd.cluster.dispatch_link import Span, split_spans
from herd.cluster.errors import ExpertUnavailable
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


ACTS = st.lists(st.sampled_from([Act.ANSWER, Act.ANSWER, Act.ANSWER, *Act]), max_size=6)
COUNTS = st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS).filter(any)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    acts=st.lists(ACTS, min_size=3, max_size=3),
    steps=st.lists(st.tuples(st.integers(0, LAYERS - 1), COUNTS), min_size=1, max_size=4),
    max_rows=st.integers(1, 12),
    max_calls=st.integers(1, 3),
)
def test_whatever_three_replicas_do_every_row_comes_back_once(
    acts: list[list[Act]], steps: list[tuple[int, list[int]]], max_rows: int, max_calls: int
) -> None:
    """Calls may be held, refused, failed or lost with their shard; held ones are answered late, after others."""
    cluster = FakeCluster(max_rows, max_calls)
    for name, script in zip("abc", acts, strict=True):
        # Two errors at most, so that no part meets three.
        kept = [act for i, act in enumerate(script) if act is not Act.ERROR or i == 0]
        cluster.add(name, ALL, kept if name != "c" else [act for act in kept if act is not Act.ERROR])
    config = ExpertsConfig(call_timeout_s=0.002, recovery_timeout_s=WAIT_S, hedge_after_s=0.001, hedge_share=0.3)
    dispatcher = Dispatcher(config, experts=ALL, connect=cluster.connect)
    cluster.publish(dispatcher.update)
    releasing = threading.Event()

    def release_and_publish() -> None:
        """What time would bring: held calls are answered in the end, and maps follow each other."""
        while not releasing.wait(0.01):
            for shard in cluster.shards.values():
                for channel in shard.channels:
                    if channel.held and not channel.closed:
                        channel.release()
            cluster.publish(dispatcher.update)

    helper = threading.Thread(target=release_and_publish)
    helper.start()
    try:
        dispatcher.wait_complete(WAIT_S)
        for layer, counts in steps:
            run(dispatcher, counts, layer)
    finally:
        releasing.set()
        helper.join()
        dispatcher.close()


@given(lengths=st.lists(st.integers(1, 9), max_size=6), max_rows=st.integers(1, 7))
def test_split_spans_keeps_every_row_in_order(lengths: list[int], max_rows: int) -> None:
    spans, start = [], 0
    for expert, length in enumerate(lengths):
        spans.append(Span(expert, start, start + length))
        start += length
    lists = split_spans(spans, max_rows)
    assert [row for piece in lists for s in piece for row in range(s.start, s.end)] == list(range(start))
    assert all(0 < sum(s.end - s.start for s in piece) <= max_rows for piece in lists)
    assert len(lists) == -(-start // max_rows)


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
