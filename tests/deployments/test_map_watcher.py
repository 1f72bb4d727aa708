"""The engine's map watcher against a router that answers, is away, restarts and forgets."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

from herd.cluster.expert_map import ExpertMap, ShardEndpoint
from herd.deployments.map_watcher import MapWatcher
from herd.deployments.router_client import RouterAway

WAIT_S = 10.0


def map_of(epoch: int, *shards: str) -> ExpertMap:
    endpoints = {shard: ShardEndpoint(shard, 0, "node", "127.0.0.1", 1, "") for shard in shards}
    return ExpertMap(epoch, "model", "token", endpoints, dict.fromkeys(shards, ((0, 0),)))


class FakeRouter:
    """Answers what the test puts into `answers`; notes what it was asked."""

    def __init__(self) -> None:
        self.answers: queue.Queue[ExpertMap | Exception | None] = queue.Queue()
        self.asked: queue.Queue[int] = queue.Queue()
        self.reports: queue.Queue[tuple[str, str]] = queue.Queue()
        self.refuse_reports = False

    def call(self, method: str, *args: Any, timeout_s: float = 0.0) -> Any:
        if method == "report_lost":
            self.reports.put((args[0], args[1]))
            if self.refuse_reports:
                raise RouterAway("away")
            return None
        assert method == "watch"
        engine, epoch, longest_s = args
        assert engine == "engine"
        assert timeout_s > longest_s
        self.asked.put(epoch)
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return None if answer is None else answer.to_wire()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def maps() -> queue.Queue[ExpertMap]:
    return queue.Queue()


@pytest.fixture
def watcher(router: FakeRouter, maps: queue.Queue[ExpertMap]) -> Iterator[MapWatcher]:
    watcher = MapWatcher(router.call, "engine")
    watcher.start(maps.put)
    yield watcher
    watcher.stop()
    router.answers.put(None)


@pytest.mark.usefixtures("watcher")
def test_every_map_is_passed_on_and_its_epoch_told(router: FakeRouter, maps: queue.Queue[ExpertMap]) -> None:
    assert router.asked.get(timeout=WAIT_S) == -1
    for epoch in (4, 5):
        router.answers.put(map_of(epoch, "a"))
        assert maps.get(timeout=WAIT_S) == map_of(epoch, "a")
        assert router.asked.get(timeout=WAIT_S) == epoch
    router.answers.put(None)
    assert router.asked.get(timeout=WAIT_S) == 5
    assert maps.empty()


@pytest.mark.usefixtures("watcher")
@pytest.mark.parametrize("trouble", [RouterAway("away"), ValueError("a defect")])
def test_trouble_with_the_router_ends_nothing(
    router: FakeRouter, maps: queue.Queue[ExpertMap], trouble: Exception
) -> None:
    router.answers.put(map_of(7, "a"))
    assert maps.get(timeout=WAIT_S).epoch == 7
    for _ in range(3):
        router.answers.put(trouble)
    router.answers.put(map_of(8, "a"))
    assert maps.get(timeout=WAIT_S).epoch == 8
    assert [router.asked.get(timeout=WAIT_S) for _ in range(5)] == [-1, 7, 7, 7, 7]


@pytest.mark.usefixtures("watcher")
def test_a_router_that_has_forgotten_all_takes_nothing_away(router: FakeRouter, maps: queue.Queue[ExpertMap]) -> None:
    """What it knows when the shards have come back to it counts, whatever its epoch."""
    for answer in (map_of(7, "a", "b"), map_of(0), map_of(1, "b")):
        router.answers.put(answer)
    assert [maps.get(timeout=WAIT_S).epoch for _ in range(2)] == [7, 1]


def test_lost_shards_are_reported_also_after_the_router_was_away(router: FakeRouter, watcher: MapWatcher) -> None:
    router.refuse_reports = True
    watcher.report_lost("a", "it broke off")
    assert router.reports.get(timeout=WAIT_S) == ("a", "engine")
    router.refuse_reports = False
    watcher.report_lost("b", "it broke off")
    assert router.reports.get(timeout=WAIT_S) == ("b", "engine")


def test_a_map_that_cannot_be_taken_in_does_not_end_the_watch(router: FakeRouter) -> None:
    taken: queue.Queue[int] = queue.Queue()

    def take(expert_map: ExpertMap) -> None:
        if expert_map.epoch == 1:
            raise ValueError("planted")
        taken.put(expert_map.epoch)

    watcher = MapWatcher(router.call, "engine")
    watcher.start(take)
    router.answers.put(map_of(1, "a"))
    router.answers.put(map_of(2, "a"))
    assert taken.get(timeout=WAIT_S) == 2
    assert watcher.faults == 1
    watcher.stop()
    router.answers.put(None)
