"""Whatever three shards with copies do, in whatever order: every row comes back once and right."""

from __future__ import annotations

import threading

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.cluster.dispatch import Dispatcher
from herd.cluster.dispatch_link import Span
from herd.cluster.expert_map import Expert
from herd.cluster.experts_config import ExpertsConfig
from herd.cluster.row_split import split_spans

from .fake_shards import Act, FakeCluster, expected

LAYERS, EXPERTS = 2, 4
ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
WAIT_S = 20.0
EVERYWHERE = [ALL, ALL, ALL]
PAIRWISE = [[expert for expert in ALL if expert[1] % 3 != shard] for shard in range(3)]
"""Two copies of each expert; no shard has all that another one has."""

ACTS = st.lists(st.sampled_from([Act.ANSWER, Act.ANSWER, Act.ANSWER, *Act]), max_size=6)
COUNTS = st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS).filter(any)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    acts=st.lists(ACTS, min_size=3, max_size=3),
    hosted=st.sampled_from([EVERYWHERE, PAIRWISE]),
    steps=st.lists(st.tuples(st.integers(0, LAYERS - 1), COUNTS), min_size=1, max_size=4),
    max_rows=st.integers(1, 12),
    max_calls=st.integers(1, 3),
)
def test_whatever_three_replicas_do_every_row_comes_back_once(
    acts: list[list[Act]], hosted: list[list[Expert]], steps: list[tuple[int, list[int]]], max_rows: int, max_calls: int
) -> None:
    """Calls may be held, refused, failed or lost with their shard; held ones are answered late, after others."""
    cluster = FakeCluster(max_rows, max_calls)
    for name, experts, script in zip("abc", hosted, acts, strict=True):
        # Two errors at most, so that no part meets three.
        kept = [act for i, act in enumerate(script) if act is not Act.ERROR or i == 0]
        cluster.add(name, experts, kept if name != "c" else [act for act in kept if act is not Act.ERROR])
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
            rows_ND = torch.arange(sum(counts) * 3, dtype=torch.float32).view(-1, 3)
            result_ND = dispatcher.collect(dispatcher.dispatch(layer, rows_ND, counts))
            assert torch.equal(result_ND, expected(layer, rows_ND, counts))
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
